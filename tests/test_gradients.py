"""Gradients against central differences, in float64."""

import numpy as np
import pytest
from conftest import NUMERIC_BACKENDS
from helpers import assert_close, difference_error, draw, on_backend, random_params, run_attention, small_config
from limits import DIFFERENCE, FITTED, KINK_DIFFERENCE, KINK_STEP, SMALL_STEP
from oracle import fit

import lingrad_rs as lg
from lingrad_rs import Exact, Polynomial

CONSISTENT = {
    "exact": Exact(),
    "degree 1": Polynomial(degree=1, gradient="consistent"),
    "degree 2": Polynomial(gradient="consistent"),
    "degree 4": Polynomial(degree=4, gradient="consistent"),
    "polynomial diagonal": Polynomial(gradient="consistent", diagonal="polynomial"),
    "no window": Polynomial(gradient="consistent", window=0),
    "given coefficients": Polynomial(coefficients=(1.2, 0.9, 0.6), gradient="consistent"),
}
SHIFTED = Polynomial(shift="mean", gradient="consistent")


def engines(table):
    return pytest.mark.parametrize("engine", table.values(), ids=table.keys())


def assert_passes_central_differences(backend, inputs, rng, **options):
    grads = run_attention(backend, inputs, **options)
    for name in ("q", "k", "v", *(["key_bias"] if "key_bias" in inputs else [])):
        x, grad = inputs[name], grads[f"d{name}"]

        def loss(x, name=name):
            return float(np.sum(run_attention(backend, inputs | {name: x}, **options)["out"] * inputs["dout"]))

        error = difference_error(loss, x, grad, rng)
        assert error <= DIFFERENCE, f"d{name}: {error:.1e}"


@pytest.mark.parametrize("causal", [False, True])
@engines(CONSISTENT)
def test_consistent_gradient_of_attention_passes_central_differences(engine, causal, backend, rng):
    inputs = draw(rng, n=150, heads=(4,), key_heads=(2,), size=0.5)
    inputs["key_bias"] = rng.standard_normal((2, 150))
    assert_passes_central_differences(backend, inputs, rng, engine=engine, causal=causal)


def test_consistent_gradient_goes_through_the_means(backend, rng):
    inputs = draw(rng, n=60, m=80, heads=(4,), key_heads=(2,), size=0.5)
    inputs["q"] += 0.7
    inputs["k"] -= 0.4
    inputs["key_bias"] = rng.standard_normal((2, 80))
    assert_passes_central_differences(backend, inputs, rng, engine=SHIFTED)


def test_consistent_gradient_with_fixed_fitted_coefficients_is_that_of_the_same_numbers(backend, rng):
    # Fitted coefficients are constants of the call, so the derivative is that with the numbers given.
    inputs = draw(rng, n=100, size=0.5)
    scores = inputs["q"] @ inputs["k"].T / np.sqrt(5)
    given = Polynomial(coefficients=tuple(fit(2, scores, np.zeros(100))), gradient="consistent")
    assert_passes_central_differences(backend, inputs, rng, engine=given)
    fitted = run_attention(backend, inputs, engine=Polynomial(coefficients="fitted", gradient="consistent"))
    same = run_attention(backend, inputs, engine=given)
    assert_close(fitted, same, FITTED[np.dtype(np.float64)])


def test_closed_form_is_not_the_derivative_of_the_approximation(backend, rng):
    # Otherwise the tests above would not tell the two gradients apart.
    inputs = draw(rng, n=150, size=0.5)
    with pytest.raises(AssertionError, match="dq"):
        assert_passes_central_differences(backend, inputs, rng, engine=Polynomial())


@pytest.mark.parametrize(
    "options",
    [
        {"engine": Exact()},
        {"engine": Polynomial(gradient="consistent", window=0)},
        {"engine": Polynomial(gradient="consistent", diagonal="polynomial"), "norm": "layer", "rope": False},
        {"engine": SHIFTED, "causal": False, "activation": "gelu_tanh"},
        {"engine": Polynomial(gradient="consistent"), "score_bound": 1.5, "n_kv_heads": None},
        {"engine": Exact(), "norm": "layer", "activation": "relu", "causal": False},
    ],
    ids=["exact", "no window", "polynomial diagonal", "shift", "score bound", "relu"],
)
@pytest.mark.parametrize("backend", NUMERIC_BACKENDS, indirect=True, ids=lambda backend: backend.name)
def test_every_gradient_of_a_transformer_passes_central_differences(options, backend, rng):
    config = small_config(**options)
    params = random_params(config, rng)
    for name in params:
        if name.endswith((".w_q", ".w_k")):
            params[name] /= 2  # small scores, so that odd degrees have positive denominators too
    tokens, targets = rng.integers(0, config.vocab_size, (2, 2, 90))

    def value_and_grad(params):
        model = lg.Transformer(config, on_backend(backend, params))
        return model.value_and_grad(backend.array(tokens), backend.array(targets))

    step, limit = (KINK_STEP, KINK_DIFFERENCE) if config.activation == "relu" else (SMALL_STEP, DIFFERENCE)
    _, grads = value_and_grad(params)
    assert list(grads) == list(params)
    for name, x in params.items():
        if name.startswith("layers.1.") and not backend.is_rust:
            continue  # slow, and the same code as layer 0, whose gradients come through layer 1

        def loss(x, name=name):
            return value_and_grad(params | {name: x})[0]

        error = difference_error(loss, x, backend.numpy(grads[name]), rng, step)
        assert error <= limit, f"{name}: {error:.1e}"
