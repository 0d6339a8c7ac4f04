"""Arrays as NumPy lays them out: any strides, read-only, and left as they were; results are new."""

import numpy as np
import pytest
from conftest import memory_of
from helpers import assert_close, cast, draw, random_params, run_attention, small_config
from limits import REORDERED

import lingrad_rs as lg
from lingrad_rs import Exact, Polynomial


def transposed(x):
    return np.ascontiguousarray(x.swapaxes(-1, -2)).swapaxes(-1, -2)


def sliced(x):
    wide = np.full((*x.shape[:-2], 2 * x.shape[-2] + 1, 3 * x.shape[-1] + 2), np.nan, x.dtype)
    view = wide[..., 1::2, 2::3]
    view[:] = x
    return view


def reversed_axes(x):
    return np.ascontiguousarray(x[..., ::-1, ::-1])[..., ::-1, ::-1]


def heads_last(x):
    """As from ``x.reshape(n, h, d).transpose(1, 0, 2)``."""
    return np.ascontiguousarray(np.moveaxis(x, -3, -2)).swapaxes(-3, -2)


def read_only(x):
    x = x.copy()
    x.setflags(write=False)
    return x


LAYOUTS = {
    "transposed": transposed,
    "sliced": sliced,
    "negative strides": reversed_axes,
    "heads last": heads_last,
    "Fortran order": np.asfortranarray,
    "read-only": read_only,
}
ENGINES = {"exact": Exact(), "polynomial": Polynomial(), "consistent": Polynomial(gradient="consistent")}


def layouts(names=LAYOUTS):
    return pytest.mark.parametrize("layout", [LAYOUTS[name] for name in names], ids=names)


@layouts()
def test_a_layout_is_kept_where_its_memory_is_copied(layout, rng):
    # As arrays of a GPU are made, in these tests.
    x = layout(rng.standard_normal((2, 3, 4, 5)))
    memory, offset = memory_of(x)
    copy = np.ndarray(x.shape, x.dtype, memory.copy(), offset, x.strides)
    assert np.array_equal(copy, x)


@layouts()
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("engine", ENGINES.values(), ids=ENGINES.keys())
def test_attention_reads_any_layout(engine, causal, layout, backend, dtype, rng):
    inputs = cast(draw(rng, n=100, heads=(2, 4), key_heads=(2, 2)), dtype)
    want = run_attention(backend, inputs, engine=engine, causal=causal)
    laid_out = {name: layout(x) for name, x in inputs.items()}
    assert all(np.array_equal(laid_out[name], inputs[name]) for name in inputs)
    got = run_attention(backend, laid_out, engine=engine, causal=causal)
    assert_close(got, want, REORDERED[dtype])


@pytest.mark.parametrize("engine", ENGINES.values(), ids=ENGINES.keys())
def test_attention_reads_strides_of_zero(engine, backend, dtype, rng):
    inputs = cast(draw(rng, n=100, heads=(4,)), dtype)
    broadcast = {name: np.broadcast_to(x[:1, :1], x.shape) for name, x in inputs.items()}
    broadcast["k"] = np.broadcast_to(inputs["k"][:1], inputs["k"].shape)
    broadcast["key_bias"] = np.broadcast_to(dtype.type(0.5), (4, 100))
    copies = {name: x.copy() for name, x in broadcast.items()}
    assert 0 in broadcast["q"].strides
    want = run_attention(backend, copies, engine=engine)
    assert_close(run_attention(backend, broadcast, engine=engine), want, REORDERED[dtype])


@layouts(["transposed", "sliced", "negative strides", "Fortran order", "read-only"])
def test_modules_read_any_layout(layout, dtype, rng):
    x, dy = rng.standard_normal((2, 2, 70, 6)).astype(dtype)
    w, w_v = rng.standard_normal((2, 6, 6)).astype(dtype) / 3

    def compute(layout):
        modules = [
            lg.SelfAttention(w=layout(w), w_v=layout(w_v)),
            lg.Linear(w=layout(w), b=layout(w_v)[1]),
            lg.RMSNorm(gain=layout(w)[:, 2]),
            lg.LayerNorm(gain=layout(w)[:, 3], bias=layout(w)[3]),
            lg.FeedForward(w_in=layout(w), w_out=layout(w_v), activation="silu"),
            lg.Activation("gelu_tanh"),
        ]
        results = {}
        for i, module in enumerate(modules):
            y, pullback = module.vjp(layout(x))
            dx, grads = pullback(layout(dy))
            results |= {f"{i}.{name}": g for name, g in {"y": y, "dx": dx, **grads}.items()}
        return results

    assert_close(compute(layout), compute(np.array), REORDERED[dtype])


@layouts(["transposed", "sliced", "negative strides", "Fortran order", "read-only"])
def test_transformer_reads_parameters_of_any_layout(layout, backend, dtype, rng):
    config = small_config(norm="layer", engine=Polynomial())
    params = random_params(config, rng, dtype)
    tokens, targets = rng.integers(0, config.vocab_size, (2, 2, 60))

    def compute(layout):
        laid_out = {name: layout(x) if x.ndim == 2 else layout(x[:, None])[:, 0] for name, x in params.items()}
        return lg.Transformer(config, laid_out).value_and_grad(tokens, targets)[1]

    assert_close(compute(layout), compute(np.array), REORDERED[dtype])


def test_inputs_are_left_as_they_were(backend, dtype, rng):
    inputs = cast(draw(rng, n=100, bias=True), dtype)
    before = {name: x.copy() for name, x in inputs.items()}
    for engine in ENGINES.values():
        run_attention(backend, inputs, engine=engine)
    assert all(np.array_equal(inputs[name], before[name]) for name in inputs)


def test_parameters_and_tokens_are_left_as_they_were(backend, rng):
    config = small_config()
    params = random_params(config, rng)
    tokens = rng.integers(0, config.vocab_size, 60)
    before = {name: x.copy() for name, x in params.items()} | {"tokens": tokens.copy()}
    lg.Transformer(config, params).value_and_grad(tokens, tokens)
    assert all(np.array_equal(x, before[name]) for name, x in (params | {"tokens": tokens}).items())


def test_results_are_new_contiguous_arrays_of_the_same_dtype(backend, dtype, rng):
    inputs = cast(draw(rng, n=100, heads=(2,), bias=True), dtype)
    got = run_attention(backend, {name: np.asfortranarray(x) for name, x in inputs.items()}, engine=Polynomial())
    for result in got.values():
        assert result.flags.c_contiguous
        assert result.flags.writeable
        assert result.dtype == dtype
        assert not any(
            np.shares_memory(result, x) for x in (*inputs.values(), *(y for y in got.values() if y is not result))
        )


@pytest.mark.parametrize("module", [lg.Residual(lg.Chain([])), lg.Chain([]), lg.Activation("relu")])
def test_results_of_modules_share_no_memory_with_their_inputs(module, rng):
    x, dy = np.asfortranarray(rng.standard_normal((5, 6))), np.asfortranarray(rng.standard_normal((5, 6)))
    y, pullback = module.vjp(x)
    dx, _ = pullback(dy)
    assert not np.shares_memory(y, x)
    assert not np.shares_memory(dx, dy)
    assert y.flags.c_contiguous
    assert dx.flags.c_contiguous


@pytest.mark.parametrize("engine", ENGINES.values(), ids=ENGINES.keys())
def test_results_hold_nothing_of_freed_memory(engine, backend, dtype, rng):
    inputs = cast(draw(rng, n=300), dtype)
    for causal in (False, True):
        for name in ("q", "v"):
            # Freed at once, so that an allocator gives the same memory out again.
            assert np.isnan(np.full(inputs[name].shape, np.nan, dtype)).all()
        got = run_attention(backend, inputs, engine=engine, causal=causal)
        assert all(np.isfinite(x).all() for x in got.values())


def test_subclasses_of_arrays_are_read_as_arrays(rng):
    class Tagged(np.ndarray):
        pass

    q = rng.standard_normal((9, 5)).view(Tagged)
    out = lg.attention(q, q, q)
    assert type(out) is np.ndarray
    assert np.array_equal(out, lg.attention(*3 * [np.asarray(q)]))
