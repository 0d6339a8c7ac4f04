"""Keys that a bias removes: whatever they hold, nothing takes from them and nothing goes to them."""

import numpy as np
import pytest
from conftest import NUMERIC_BACKENDS
from helpers import assert_close, cast, difference_error, draw, run_attention
from limits import DIFFERENCE, ORACLE

import lingrad_rs as lg
from lingrad_rs import Exact, Polynomial

SHIFTED = {
    "closed form": Polynomial(shift="mean"),
    "consistent": Polynomial(shift="mean", gradient="consistent"),
    "consistent, fitted": Polynomial(shift="mean", gradient="consistent", coefficients="fitted"),
}


def engines(table):
    return pytest.mark.parametrize("engine", table.values(), ids=table.keys())


def padded(rng, n=90, m=140, heads=(4,), key_heads=(2,), **options):
    """Inputs whose last keys, and some between, are removed; and which."""
    inputs = draw(rng, n=n, m=m, heads=heads, key_heads=key_heads, **options)
    gone = np.zeros((*key_heads, m), bool)
    gone[..., 2::9] = True
    gone[..., -m // 3 :] = True
    inputs["key_bias"] = np.where(gone, -np.inf, 0.5 * rng.standard_normal(gone.shape))
    return inputs, gone


def assert_nothing_for(gone, got):
    for name in ("dk", "dv", "dkey_bias"):
        assert not got[name][gone].any(), f"{name} of removed keys"


@engines(SHIFTED)
def test_the_means_are_those_of_the_keys_that_are_left(engine, backend, dtype, rng):
    inputs, gone = padded(rng, size=0.4)
    inputs["q"] += 0.5
    far = inputs | {"k": inputs["k"] + 30.0 * gone[..., None]}
    want, got = (run_attention(backend, cast(x, dtype), engine=engine) for x in (inputs, far))
    assert_close(got, want, ORACLE[dtype])
    assert_nothing_for(gone, got)


@engines(SHIFTED)
def test_removed_keys_leave_the_accuracy_of_a_mean_shift_as_it_is(engine, backend, dtype, rng):
    inputs, gone = padded(rng, size=0.4)
    inputs["k"] = np.where(gone[..., None], 8.0, inputs["k"] - 2.0)
    got, exact = (run_attention(backend, cast(inputs, dtype), engine=e)["out"] for e in (engine, Exact()))
    assert np.linalg.norm(got - exact) <= 1e-2 * np.linalg.norm(exact)


@pytest.mark.parametrize("backend", NUMERIC_BACKENDS, indirect=True)
def test_the_gradient_through_the_means_of_the_keys_that_are_left_passes_central_differences(backend, rng):
    inputs, gone = padded(rng, size=0.5)
    inputs["q"] += 0.7
    inputs["k"] -= 0.4
    engine = SHIFTED["consistent"]
    grads = run_attention(backend, inputs, engine=engine)
    assert_nothing_for(gone, grads)
    for name in "qkv":

        def loss(x, name=name):
            return float(np.sum(run_attention(backend, inputs | {name: x}, engine=engine)["out"] * inputs["dout"]))

        assert difference_error(loss, inputs[name], grads[f"d{name}"], rng) <= DIFFERENCE, name


def test_the_bound_of_an_error_is_of_the_keys_that_are_left(backend, dtype, rng):
    inputs, gone = padded(rng, size=0.05)
    bounds = []
    for of_gone in (1.0, 1e3):
        k, v = (np.where(gone[..., None], of_gone, inputs[x]) for x in "kv")
        arrays = cast(inputs | {"k": k, "v": v + 3.0 * ~gone[..., None]}, dtype)
        q, k, v, bias, dout = (backend.array(arrays[x]) for x in ("q", "k", "v", "key_bias", "dout"))
        _, vjp = lg.attention_vjp(q, k, v, engine=Polynomial(), key_bias=bias)
        vjp(dout, samples=8)
        bounds.append([head.error_bound for head in vjp.heads])
    assert bounds[0] == bounds[1]
    assert None not in bounds[0]
