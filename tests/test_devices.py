"""Arrays that are not NumPy's: where they lie, and that the size of temporary arrays does not matter."""

import re

import numpy as np
import pytest
from conftest import GPU_NUMPY, GPU_STRICT
from helpers import assert_close, on_backend, on_host, random_params, run_vjp, small_config
from limits import SAME_MODEL

import lingrad_rs as lg
from lingrad_rs.backends.array import device

X, W = np.ones((5, 6)), np.ones((6, 6))
CONFIG = small_config()
TOKENS = np.arange(5)


def there(x):
    return GPU_STRICT.array(x)


def model(place):
    rng = np.random.default_rng(0)
    return lg.Transformer(CONFIG, {name: place(x) for name, x in random_params(CONFIG, rng).items()})


class Moves:
    """A module that gives its result, or its gradient, back as a NumPy array."""

    def __init__(self, forward=np.asarray, backward=np.asarray):
        self.forward, self.backward = forward, backward

    def vjp(self, x):
        return self.forward(X), lambda dy: (self.backward(X), {})


MIXED = {
    "weight and x": (lambda: lg.Linear(w=W).vjp(there(X)), "x is a array_api_strict"),
    "weight and bias": (lambda: lg.Linear(w=there(W), b=W[0]), "b is a numpy.ndarray and w is a array_api_strict"),
    "x and dy": (
        lambda: lg.Linear(w=there(W)).vjp(there(X))[1](X),
        "dy is a numpy.ndarray and x is a array_api_strict",
    ),
    "dy of a norm": (lambda: lg.RMSNorm(gain=W[0]).vjp(X)[1](there(X)), "dy is a array_api_strict"),
    "dy of a chain": (lambda: lg.Chain([]).vjp(there(X))[1](X), "dy is a numpy.ndarray and x is a array_api_strict"),
    "tokens and embedding": (
        lambda: lg.Embedding(embed=there(W)).vjp(TOKENS),
        "tokens is a numpy.ndarray and the param",
    ),
    "y of a user's module": (lambda: lg.Chain([Moves()]).vjp(there(X)), "y of modules[0] (Moves) is a numpy.ndarray"),
    "dx of a user's module": (
        lambda: lg.Residual(Moves(forward=there)).vjp(there(X))[1](there(X)),
        "dx of module (Moves) is a numpy.ndarray and dy is a array_api_strict",
    ),
    "parameters": (
        lambda: model(lambda x: there(x) if x.ndim == 1 else x),
        "layers.0.attn_norm.gain is a array_api_strict",
    ),
    "parameters and tokens": (
        lambda: model(there).value_and_grad(TOKENS, TOKENS),
        "tokens is a numpy.ndarray and the parameters is a array_api_strict",
    ),
    "tokens and targets": (
        lambda: model(there).value_and_grad(there(TOKENS), TOKENS),
        "targets is a numpy.ndarray",
    ),
    "embeddings": (lambda: model(there).vjp(np.ones((5, 16))), "x is a numpy.ndarray and params is a array_api_strict"),
    "dy of a model": (lambda: model(there).vjp(there(TOKENS))[1](np.ones((5, 13))), "dy is a numpy.ndarray and y is a"),
    "landmarks": (
        lambda: lg.LandmarkConstants(1.0, X[0], X[0], 1.0, there(X), np.eye(5)),
        "landmarks is a array_api_strict",
    ),
    "a saved array": (lambda: lg.save("unused", {"a": there(X)}), "expected a NumPy array: nothing is copied"),
    "a saved model": (lambda: lg.save("unused", model(there)), "embed is a array_api_strict"),
}


@pytest.mark.parametrize("backend", [GPU_STRICT], indirect=True, ids=["strict"])
@pytest.mark.parametrize(("call", "message"), MIXED.values(), ids=MIXED.keys())
def test_arrays_of_two_libraries_are_a_device_error(call, message, backend):
    with pytest.raises(lg.DeviceError, match=re.escape(message)):
        call()


@pytest.mark.parametrize("backend", [GPU_STRICT], indirect=True, ids=["strict"])
@pytest.mark.parametrize("shift", [lambda: there(W[:2]), lambda: (there(W[0]), W[1])])
def test_a_shift_is_not_copied_from_a_device_number_by_number(shift, backend):
    with pytest.raises(lg.ArgumentError, match="expected 'none', 'mean' or two sequences of d numbers"):
        lg.Polynomial(shift=shift())


def modules(p):
    heads = {"n_heads": 4, "n_kv_heads": 2, "engine": lg.Exact()}
    weights = {name: p[name] for name in ("w_q", "w_k", "w_v", "w_o")}
    return [
        lg.Linear(w=p["w"], b=p["b"]),
        lg.RMSNorm(gain=p["b"]),
        lg.LayerNorm(gain=p["b"], bias=p["b"]),
        lg.FeedForward(w_in=p["w_q"], w_out=p["w_o"], activation="gelu_tanh"),
        lg.SelfAttention(w=p["w"], w_v=p["w"], engine=lg.Exact()),
        lg.SelfAttention(**weights, **heads, rope=True, score_bound=2.0, causal=True),
    ]


@pytest.mark.parametrize("backend", [GPU_NUMPY], indirect=True, ids=["NumPy"])
def test_the_size_of_temporary_arrays_changes_nothing_but_rounding(backend, monkeypatch, rng):
    shapes = {"w": (6, 6), "b": (6,), "w_q": (6, 16), "w_k": (6, 8), "w_v": (6, 8), "w_o": (16, 6)}
    params = on_backend(backend, {name: rng.standard_normal(shape) for name, shape in shapes.items()})
    x, dy = rng.standard_normal((2, 2, 280, 6))
    tokens, targets = rng.integers(0, CONFIG.vocab_size, (2, 2, 280))
    of_model = lg.Transformer(CONFIG, on_backend(backend, random_params(CONFIG, rng)))

    def compute():
        results = {}
        for i, module in enumerate(modules(params)):
            y, pullback = run_vjp(backend, module, x)
            dx, grads = pullback(dy)
            results |= {f"{i}.{name}": z for name, z in {"y": y, "dx": dx, **grads}.items()}
        loss, grads = of_model.value_and_grad(backend.array(tokens), backend.array(targets))
        return results | on_host(backend, grads) | {"loss": np.array(loss)}

    want = compute()
    monkeypatch.setattr(device, "_USUAL", device._LEAST)
    assert_close(compute(), want, SAME_MODEL)
