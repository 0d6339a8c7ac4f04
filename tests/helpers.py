"""What several tests need: data, calls through a backend, errors, and central differences."""

import dataclasses
import math

import numpy as np
import oracle
from limits import DIFFERENCE_STEP, ZERO_NORM

import lingrad_rs as lg


def relative_error(got, want):
    """``||got - want|| / ||want||``, NaN where there is a NaN; where `want` is 0 but for rounding, an entry's error."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape
    error, norm = np.linalg.norm(got - want), np.linalg.norm(want)
    return float(error / (norm if norm > ZERO_NORM else np.sqrt(max(got.size, 1))))


def assert_close(got, want, limit):
    """Each array of the dict `want` within `limit` of that in `got`, which holds no others."""
    assert got.keys() == want.keys()
    for name in want:
        error = relative_error(got[name], want[name])
        assert error <= limit, f"{name}: relative error {error:.2e}, limit {limit:.0e}"


def assert_same_bits(got, want):
    assert got.keys() == want.keys()
    for name in want:
        assert got[name].dtype == want[name].dtype
        assert np.array_equal(got[name], want[name]), f"{name} differs"
        assert not np.isnan(want[name]).any()


def draw(rng, *, n, m=None, d=5, dv=3, heads=(), key_heads=None, bias=False, size=0.8):
    """``q, k, v, dout`` and perhaps ``key_bias``, float64; queries and keys have standard deviation `size`.

    With a bias, keys 1, 6, 11, ... are removed.
    """
    m = n if m is None else m
    key_heads = heads if key_heads is None else key_heads
    inputs = {
        "q": size * rng.standard_normal((*heads, n, d)),
        "k": size * rng.standard_normal((*key_heads, m, d)),
        "v": rng.standard_normal((*key_heads, m, dv)),
        "dout": rng.standard_normal((*heads, n, dv)),
    }
    if bias:
        inputs["key_bias"] = rng.standard_normal((*key_heads, m))
        inputs["key_bias"][..., 1::5] = -np.inf
    return inputs


def cast(inputs, dtype):
    return {name: x.astype(dtype) for name, x in inputs.items()}


def on_backend(backend, arrays):
    """The arrays of a dict, where the backend computes."""
    return {name: backend.array(x) for name, x in arrays.items()}


def on_host(backend, arrays):
    """The arrays of a dict, which a backend computed."""
    return {name: backend.numpy(x) for name, x in arrays.items()}


def run_vjp(backend, module, x):
    """``y`` and the pullback of a module whose gradients are a dict, with NumPy arrays in and out."""
    y, pullback = module.vjp(backend.array(x))

    def on_numpy(dy):
        dx, grads = pullback(backend.array(dy))
        return None if dx is None else backend.numpy(dx), on_host(backend, grads)

    return backend.numpy(y), on_numpy


def run_attention(backend, inputs, **options):
    """``{"out", "dq", "dk", "dv"}`` and, with a bias, ``"dkey_bias"``: what `lingrad_rs` makes of `inputs`."""
    arrays = on_backend(backend, inputs)
    dout = arrays.pop("dout")
    out, vjp = lg.attention_vjp(**arrays, **options)
    names = ("out", "dq", "dk", "dv", "dkey_bias")
    results = (out, *vjp(dout))
    assert len(results) == (5 if "key_bias" in inputs else 4)
    return on_host(backend, dict(zip(names, results, strict=False)))


def oracle_attention(inputs, engine, **options):
    """What `run_attention` should give, in float64."""
    description = None if isinstance(engine, lg.Exact) else dataclasses.asdict(engine)
    want = oracle.attention(inputs, description, **options)
    if "key_bias" not in inputs:
        del want["dkey_bias"]
    return want


def directional_derivative(f, x, direction, step=DIFFERENCE_STEP):
    """``d/dt f(x + t direction)`` at 0, by five points."""

    def at(t):
        return f(x + t * step * direction)

    return (8 * (at(1) - at(-1)) - (at(2) - at(-2))) / (12 * step)


def difference_error(f, x, gradient, rng, step=DIFFERENCE_STEP):
    """How far ``<gradient, u>`` is from the central difference of `f` along a random `u`.

    Relative to the size that ``<gradient, u>`` typically has.
    """
    direction = rng.standard_normal(x.shape)
    slope = directional_derivative(f, x, direction, step)
    typical = max(np.linalg.norm(gradient), abs(slope), ZERO_NORM)
    return float(abs(np.sum(gradient * direction) - slope) / typical)


def small_config(**options):
    """A transformer small enough for tests, and with every part that a large one has."""
    sizes = {"n_layers": 2, "d_model": 16, "n_heads": 4, "d_ff": 24, "vocab_size": 13, "n_kv_heads": 2}
    return lg.TransformerConfig(**(sizes | {"engine": lg.Exact()} | options))


def random_params(config, rng, dtype=np.float64):
    """Weights larger than those of a new model, so that every gradient matters; gains are not 1, biases not 0."""
    return {
        name: ((1.0 if name.endswith("gain") else 0.0) + rng.standard_normal(shape) / math.sqrt(8)).astype(dtype)
        for name, shape in config.param_shapes().items()
    }
