"""`lingrad_rs.jax.dot_product_attention`, held against that of `jax.nn`: values, gradients, transforms."""

import itertools
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import lingrad_rs as lg

jax = pytest.importorskip("jax", reason="JAX is not installed, which the tests do not require")
import jax.numpy as jnp  # noqa: E402

import lingrad_rs.jax as lgj  # noqa: E402

# JAX's softmax is float32 for float64 too. In half precision JAX rounds the weights, and each gradient on its way.
LIMIT = {"float32": 5e-6, "float64": 5e-6, "float16": 5e-3, "bfloat16": 3e-2}
B, S, N, H = 2, 7, 4, 8

# What each option may be. T is 5, 7 or 9 beside S = 7.
GRID = {
    "dtype": list(LIMIT),
    "key_heads": [4, 2, 1],
    "is_causal": [False, True],
    "t": [7, 5, 9],
    "bias": [None, (B, N), (1, N), (1, 1), "keys"],
    "mask": [None, (B, N), (B, 1), "keys"],
    "lengths": [None, "queries", "keys", "both"],
    "local_window_size": [None, 2, (1, 0), (0, 3)],
    "batch": [True, False],
}
# JAX compiles each shape anew: a second or two for each draw.
DRAWS = 60


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def inputs_of(rng, *, dtype="float32", t=7, key_heads=2, bias=None, mask=None, lengths=None, batch=True, **options):
    """``(query, key, value, bias)`` and the options that are left."""
    lead = (B,) if batch else ()

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape), dtype)

    arrays = [normal(*lead, t, N, H), normal(*lead, S, key_heads, H), normal(*lead, S, key_heads, H)]
    size = B if batch else 1

    def shape_of(kind):
        return (size, 1, 1, S) if kind == "keys" else (min(kind[0], size), kind[1], t, S)

    arrays.append(None if bias is None else normal(*shape_of(bias)))
    if mask is not None:
        options["mask"] = jnp.asarray(rng.random(shape_of(mask)) < 0.7)
    if lengths in ("queries", "both"):
        options["query_seq_lengths"] = jnp.asarray(rng.integers(0, t + 1, size), "int32")
    if lengths in ("keys", "both"):
        options["key_value_seq_lengths"] = jnp.asarray(rng.integers(0, S + 1, size), "int32")
    return arrays, options


def results_of(attend, arrays, options):
    """The output and the gradients of a loss that weighs each entry of it differently."""
    given = [i for i, x in enumerate(arrays) if x is not None]

    def loss(*parts):
        arguments = list(arrays)
        for i, x in zip(given, parts, strict=True):
            arguments[i] = x
        out = attend(*arguments, **options)
        weights = jnp.sin(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)
        return (out * weights.astype(out.dtype)).sum(dtype=jnp.float32), out

    grads, out = jax.grad(loss, argnums=tuple(range(len(given))), has_aux=True)(*(arrays[i] for i in given))
    names = ["query", "key", "value", "bias"]
    return {"out": out} | {f"d{names[i]}": x for i, x in zip(given, grads, strict=True)}


def assert_same(got, want, limit):
    assert got.keys() == want.keys()
    for name, wanted in want.items():
        x = got[name]
        assert (x.dtype, x.shape) == (wanted.dtype, wanted.shape), name
        x, wanted = (np.asarray(y, np.float64) for y in (x, wanted))
        error = np.linalg.norm(x - wanted)
        # Where a row sees one key, its gradients are 0 but for rounding.
        assert error <= limit * max(np.linalg.norm(wanted), 0.1 * np.sqrt(wanted.size)), f"{name}: error {error:.1e}"


def options_of_grid():
    """Each option by itself, and draws of all, which hold every pair of them; the same in each run."""
    rng = np.random.default_rng(7)
    singles = [{name: value} for name, values in GRID.items() for value in values]
    drawn = [{name: values[rng.integers(len(values))] for name, values in GRID.items()} for _ in range(DRAWS)]
    return singles + drawn


def test_values_and_gradients_are_those_of_jax_over_a_grid_of_options(rng, capsys):
    grid = options_of_grid()
    for options in grid:
        arrays, keywords = inputs_of(rng, **options)
        got, want = (
            results_of(attend, arrays, keywords) for attend in (lgj.dot_product_attention, jax.nn.dot_product_attention)
        )
        try:
            assert_same(got, want, LIMIT[options.get("dtype", "float32")])
        except AssertionError as error:
            raise AssertionError(f"{options}: {error}") from None
    with capsys.disabled():
        print(f"\nJAX {jax.__version__}: {len(grid)} cases of options, values and gradients")


def test_float64_is_exact_to_float64(rng):
    (q, k, v, _), _ = inputs_of(rng, dtype="float64", key_heads=N)
    scores = jnp.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(H)
    want = jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(scores), v)
    assert jnp.abs(lgj.dot_product_attention(q, k, v) - want).max() < 1e-14


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_bias_of_a_wider_dtype_is_not_rounded(dtype, rng):
    arrays, options = inputs_of(rng, dtype=dtype, bias=(B, N))
    arrays[3] = 1000 + jnp.asarray(rng.standard_normal(arrays[3].shape), "float32")
    got, want = (
        results_of(attend, arrays, options) for attend in (lgj.dot_product_attention, jax.nn.dot_product_attention)
    )
    assert_same(got, want, LIMIT[dtype])


@pytest.mark.parametrize("bias", [None, (1, N), "keys"])
def test_a_row_without_keys_is_what_it_is_in_jax(bias, rng):
    arrays, options = inputs_of(rng, bias=bias)
    mask = np.full((B, N, 7, S), True)
    mask[0, :, 2] = mask[1, 3] = False
    for lowest in (None, -np.inf, np.finfo(np.float32).min):
        if lowest is not None and bias is not None:
            arrays[3] = arrays[3].at[..., 2:].set(lowest)
            mask[1, 0, 4, :3] = False  # what the mask leaves, the bias takes
        options["mask"] = jnp.asarray(mask)
        got, want = (
            results_of(attend, arrays, options) for attend in (lgj.dot_product_attention, jax.nn.dot_product_attention)
        )
        assert_same(got, want, LIMIT["float32"])


def test_a_row_that_a_bias_alone_removes_is_nan_and_has_no_part_in_gradients(rng):
    (q, k, v, bias), _ = inputs_of(rng, bias=(1, 1))
    bias = bias.at[:, :, 3].set(-jnp.inf)
    out = lgj.dot_product_attention(q, k, v, bias)
    assert jnp.isnan(jax.nn.dot_product_attention(q, k, v, bias)[:, 3]).all()
    assert jnp.isnan(out[:, 3]).all()
    others = np.delete(np.arange(7), 3)
    assert jnp.isfinite(out[:, others]).all()
    grads = jax.grad(lambda *x: lgj.dot_product_attention(*x)[:, others].sum(), argnums=(0, 1, 2, 3))(q, k, v, bias)
    assert all(jnp.isfinite(x).all() for x in grads)


@pytest.mark.parametrize("options", [{}, {"bias": (B, N), "is_causal": True}, {"mask": (B, N), "t": 9}])
def test_the_residual_is_that_of_jax_and_has_no_gradient(options, rng):
    arrays, keywords = inputs_of(rng, lengths="both", **options)
    out, got = lgj.dot_product_attention(*arrays, **keywords, return_residual=True)
    _, want = jax.nn.dot_product_attention(*arrays, **keywords, return_residual=True)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    assert jnp.array_equal(out, lgj.dot_product_attention(*arrays, **keywords))

    def loss(q):
        return lgj.dot_product_attention(q, *arrays[1:], **keywords, return_residual=True)[1].sum()

    assert not jax.grad(loss)(arrays[0]).any()


def test_nan_that_comes_in_from_behind_goes_through(rng):
    """Loss scaling looks for it."""
    (q, k, v, _), _ = inputs_of(rng)
    _, pullback = jax.vjp(lgj.dot_product_attention, q, k, v)
    grads = pullback(jnp.full(q.shape, jnp.nan, q.dtype))
    assert all(jnp.isnan(x).all() for x in grads)


def test_jit_is_the_same(rng):
    arrays, options = inputs_of(rng, bias=(B, N), mask=(B, 1), lengths="both")
    plain = results_of(lgj.dot_product_attention, arrays, options)
    compiled = results_of(jax.jit(lgj.dot_product_attention), arrays, options)
    assert all(jnp.array_equal(compiled[name], x) for name, x in plain.items())


@pytest.mark.parametrize("mapped", list(itertools.product([0, None], repeat=3))[:-1])
@pytest.mark.parametrize("bias", [0, None, "absent"])
def test_vmap_is_a_loop_whatever_it_maps(mapped, bias, rng):
    """Gradients of what is not mapped are each call's own."""
    arrays, options = inputs_of(rng, bias=None if bias == "absent" else (1, N), lengths="both", is_causal=True)
    axes = (*mapped, *([] if bias == "absent" else [bias]))
    arrays = [x for x in arrays if x is not None]
    many = [x if axis is None else jnp.stack([x, 2 * x, -x]) for x, axis in zip(arrays, axes, strict=True)]

    def gradients(*parts):
        def loss(*parts):
            return (lgj.dot_product_attention(*parts, **options) ** 2).sum()

        return jax.grad(loss, argnums=tuple(range(len(parts))))(*parts)

    got = jax.vmap(gradients, in_axes=axes)(*many)
    for i in range(3):
        want = gradients(*(x if axis is None else x[i] for x, axis in zip(many, axes, strict=True)))
        for x, y in zip(got, want, strict=True):
            np.testing.assert_allclose(x[i], y, rtol=1e-5, atol=1e-6)


def test_vmap_over_masks_and_lengths_alone_and_twice(rng):
    (q, k, v, _), _ = inputs_of(rng)
    masks = jnp.asarray(rng.random((3, B, N, 7, S)) < 0.7)
    lengths = jnp.asarray(rng.integers(0, S + 1, (2, B)), "int32")

    def attend(mask, length):
        return lgj.dot_product_attention(q, k, v, mask=mask, key_value_seq_lengths=length)

    got = jax.vmap(jax.vmap(attend, (None, 0)), (0, None))(masks, lengths)
    for i, j in np.ndindex(3, 2):
        np.testing.assert_allclose(got[i, j], attend(masks[i], lengths[j]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.checkpoint], ids=["plain", "checkpoint"])
def test_layers_in_a_scan_have_the_gradients_of_jax(wrap, rng):
    weights = jnp.asarray(rng.standard_normal((3, H, H)) / 3, "float32")
    x = jnp.asarray(rng.standard_normal((B, S, N, H)), "float32")

    def loss(attend, weights):
        def layer(x, w):
            return x + attend(x @ w, x, x, is_causal=True), None

        return (jax.lax.scan(wrap(layer), x, weights)[0] ** 2).sum()

    got, want = (
        jax.jit(jax.grad(partial(loss, attend)))(weights)
        for attend in (lgj.dot_product_attention, jax.nn.dot_product_attention)
    )
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-3)


def test_forward_mode_is_refused(rng):
    (q, k, v, _), _ = inputs_of(rng)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda q: lgj.dot_product_attention(q, k, v), (q,), (q,))


def test_an_engine_and_a_tolerance_reach_the_library(rng, monkeypatch):
    (q, k, v, _), _ = inputs_of(rng)
    seen, attention = [], lg.attention

    def spy(*arrays, engine, tol, **options):
        seen.append((engine, tol))
        return attention(*arrays, engine=lg.Exact(), **options)

    monkeypatch.setattr(lg, "attention", spy)
    engine = lg.Polynomial(degree=3)
    for options in ({}, {"engine": engine}, {"tol": 0.1}):
        lgj.dot_product_attention(q, k, v, **options).block_until_ready()
    # Twice each: once while tracing, of one token.
    assert seen == [(lg.Exact(), None), (engine, None), (engine, None), (None, 0.1), (None, 0.1)]


def test_padding_of_keys_is_for_every_engine(rng):
    (q, k, v, _), _ = inputs_of(rng)
    mask = jnp.asarray(rng.random((B, 1, 1, S)) < 0.7).at[:, :, :, 0].set(True)
    lgj.dot_product_attention(q / 8, k / 8, v, mask=mask, engine=lg.Polynomial()).block_until_ready()


def test_what_an_engine_does_not_serve_is_told_while_tracing(rng):
    (q, k, v, bias), _ = inputs_of(rng, bias=(1, N))
    with pytest.raises(lg.ArgumentError, match="bias"):
        jax.eval_shape(lambda *x: lgj.dot_product_attention(*x, engine=lg.Polynomial()), q, k, v, bias)
    with pytest.raises(lg.ArgumentError, match="tol is"):
        lgj.dot_product_attention(q, k, v, engine=lg.Exact(), tol=0.1)


def ones(*shape, dtype=np.float32):
    return np.ones(shape, dtype)


BAD = {
    "integers": (lg.DtypeError, "query has dtype int32; expected one of", {"query": ones(2, 7, 4, 8, dtype=np.int32)}),
    "another dtype": (
        lg.DtypeError,
        "key has dtype float16; expected float32 to match query",
        {"key": ones(2, 7, 2, 8, dtype=np.float16)},
    ),
    "no array": (lg.DtypeError, "value is a str; expected an array", {"value": "text"}),
    "two axes": (lg.ShapeError, "query has shape (7, 8); expected four axes", {"query": ones(7, 8)}),
    "another batch": (
        lg.ShapeError,
        "key has shape (3, 7, 2, 8); expected (2, S, K, 8) to match query",
        {"key": ones(3, 7, 2, 8)},
    ),
    "heads": (
        lg.ShapeError,
        "query has 4 heads and key has 3; expected a multiple",
        {"key": ones(2, 7, 3, 8), "value": ones(2, 7, 3, 8)},
    ),
    "bias": (lg.ShapeError, "bias has shape (5, 7); expected what broadcasts to", {"bias": ones(5, 7)}),
    "a bool bias": (lg.DtypeError, "bias has dtype bool; expected numbers", {"bias": ones(7, 7, dtype=bool)}),
    "a mask of numbers": (
        lg.DtypeError,
        "mask has dtype float32; expected bool",
        {"mask": ones(7, 7)},
    ),
    "mask": (lg.ShapeError, "mask has shape (2, 3, 7, 7); expected what", {"mask": ones(2, 3, 7, 7, dtype=bool)}),
    "lengths": (
        lg.ShapeError,
        "query_seq_lengths has shape (3,); expected (2,) to match the batch",
        {"query_seq_lengths": ones(3, dtype=np.int32)},
    ),
    "lengths of floats": (
        lg.DtypeError,
        "key_value_seq_lengths has dtype float32; expected integers",
        {"key_value_seq_lengths": ones(2)},
    ),
    "a window": (lg.ArgumentError, "local_window_size is -1; expected an integer >= 0", {"local_window_size": -1}),
    "three sides": (lg.ArgumentError, "local_window_size is (1, 2, 3)", {"local_window_size": (1, 2, 3)}),
    "scale": (lg.ArgumentError, "scale is inf; expected a finite number", {"scale": float("inf")}),
    "causal": (lg.ArgumentError, "is_causal is 1; expected True or False", {"is_causal": 1}),
    "engine": (lg.ArgumentError, "engine is 'exact'; expected Exact()", {"engine": "exact"}),
}


@pytest.mark.parametrize(("kind", "message", "change"), BAD.values(), ids=BAD.keys())
def test_a_bad_argument_is_named(kind, message, change, rng):
    (q, k, v, _), _ = inputs_of(rng)
    with pytest.raises(kind, match=re.escape(message)):
        lgj.dot_product_attention(**({"query": q, "key": k, "value": v} | change))


def test_a_traced_scale_is_told(rng):
    (q, k, v, _), _ = inputs_of(rng)
    with pytest.raises(lg.ArgumentError, match="scale is traced"):
        jax.jit(lambda scale: lgj.dot_product_attention(q, k, v, scale=scale))(1.0)


def test_numbers_that_are_not_finite_are_told_when_it_runs(rng):
    (q, k, v, _), _ = inputs_of(rng)
    with pytest.raises(jax.errors.JaxRuntimeError, match="NonFiniteError: "):
        lgj.dot_product_attention(q * jnp.nan, k, v).block_until_ready()


def test_an_empty_batch_is_empty():
    x = jnp.ones((0, 7, 4, 8))
    assert lgj.dot_product_attention(x, x, x).shape == x.shape


def test_devices_compute_their_own_parts():
    """In a process of its own, as JAX counts devices once: what `sharded.py` beside this file asserts."""
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    program = Path(__file__).parent / "sharded.py"
    run = subprocess.run([sys.executable, program], env=os.environ | flags, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]


def test_the_library_does_not_import_jax():
    code = "import sys, lingrad_rs; assert 'jax' not in sys.modules and 'lingrad_rs.jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
