"""Every option of scores, alone and in pairs: against the dense float64 oracle, and against what it means."""

import math

import ml_dtypes
import numpy as np
import pytest
from conftest import GPU_NUMPY
from helpers import assert_close, assert_same_bits, difference_error, on_backend, on_host, relative_error
from limits import DIFFERENCE, HALF, ORACLE

import lingrad_rs as lg
from lingrad_rs.backends import select

EXACT = lg.Exact()
FLOAT16, BFLOAT16 = np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)


def dense(
    q,
    k,
    v,
    dout,
    *,
    scale=None,
    causal=False,
    query_offset=0,
    window=None,
    segment_ids=None,
    mask=None,
    bias=0.0,
    key_bias=None,
    softcap=None,
    sinks=None,
):
    """``out, lse`` and all gradients by definition; arrays are lined up, ``(batch, h, n, d)``."""
    group = q.shape[1] // k.shape[1]
    k, v = (np.repeat(x, group, axis=1) for x in (k, v))
    n, m = q.shape[2], k.shape[2]
    scale = 1 / math.sqrt(q.shape[3]) if scale is None else scale
    i, j = np.arange(n)[:, None] + query_offset, np.arange(m)
    left, right = (math.inf if x is None else x for x in (window or (None, None)))
    seen = (j >= i - left) & (j <= i + min(right, 0 if causal else math.inf))
    seen = np.broadcast_to(seen, (*q.shape[:3], m))
    if segment_ids is not None:
        seen = seen & (segment_ids[..., :, None] == segment_ids[..., None, :])
    if mask is not None:
        seen = seen & mask
    s = scale * q @ k.swapaxes(-1, -2)
    t = np.tanh(s / softcap) if softcap else None
    s = (softcap * t if softcap else s) + bias
    if key_bias is not None:
        s = s + np.repeat(np.broadcast_to(key_bias, (q.shape[0], q.shape[1] // group, m)), group, axis=1)[:, :, None, :]
    s = np.where(seen, s, -np.inf)
    sink = (
        np.full((*q.shape[:3], 1), -np.inf)
        if sinks is None
        else np.broadcast_to(sinks[:, None, None], (*q.shape[:3], 1))
    )
    most = np.maximum(s.max(-1, keepdims=True), sink)
    most = np.where(most == -np.inf, 0, most)
    a, joined = np.exp(s - most), np.exp(sink - most)
    total = a.sum(-1, keepdims=True) + joined
    f, p = (x / np.where(total == 0, 1, total) for x in (a, joined))
    with np.errstate(divide="ignore"):
        lse = (most + np.log(total))[..., 0]
    out = f @ v
    delta = (dout * out).sum(-1, keepdims=True)
    ds = f * (dout @ v.swapaxes(-1, -2) - delta)
    raw = ds * (1 - t * t) if softcap else ds
    shared = lambda x: x.reshape(x.shape[0], -1, group, *x.shape[2:]).sum(axis=2)  # noqa: E731
    grads = {
        "dq": scale * raw @ k,
        "dk": shared(scale * raw.swapaxes(-1, -2) @ q),
        "dv": shared(f.swapaxes(-1, -2) @ dout),
        "dkey_bias": shared(ds.sum(axis=2)),
        "dbias": ds,
        "dsinks": -(p * delta).sum(axis=(0, 2, 3)),
    }
    return {"out": out, "lse": lse} | grads


def summed_to(x, shape):
    """The sums over the axes along which an array of this shape broadcasts to ``x``."""
    padded = (1,) * (x.ndim - len(shape)) + tuple(shape)
    return x.sum(axis=tuple(i for i, (a, b) in enumerate(zip(x.shape, padded, strict=True)) if a != b)).reshape(shape)


B, H, KV, D, DV = 2, 4, 2, 5, 3


def arrays(rng, n, m):
    shapes = {"q": (B, H, n, D), "k": (B, KV, m, D), "v": (B, KV, m, DV), "dout": (B, H, n, DV)}
    return {name: rng.standard_normal(shape) for name, shape in shapes.items()}


def options_of(rng, n, m, chosen):
    """Options by name, as they are given, and as `dense` has them."""
    make = {
        "mask": lambda: rng.random((B, 1, n, m)) < 0.7,
        "key mask": lambda: rng.random((1, 1, 1, m)) < 0.7,
        "bias": lambda: np.where(rng.random((H, n, m)) < 0.1, -np.inf, rng.standard_normal((H, n, m))),
        "row bias": lambda: rng.standard_normal((n, 1)),
        "column bias": lambda: rng.standard_normal((B, H, 1, m)),
        "one bias": lambda: rng.standard_normal((1, 1)),
        "key_bias": lambda: np.where(rng.random((B, m)) < 0.2, -np.inf, rng.standard_normal((B, m))),
        "sinks": lambda: 2 * rng.standard_normal(H),
        "segment_ids": lambda: np.sort(rng.integers(0, 5, (B, n)), axis=1),
    }
    options = {}
    for name in chosen:
        if name in make:
            options[{"key mask": "mask"}.get(name, "bias" if "bias" in name and name != "key_bias" else name)] = make[
                name
            ]()
        else:
            options |= NUMBERS[name]
    return options


NUMBERS = {
    "causal": {"causal": True},
    "window": {"window": (20, 7)},
    "left window": {"window": (9, None)},
    "softcap": {"softcap": 0.7},
    "scale": {"scale": 0.9},
}
ONE = ["causal", "window", "left window", "softcap", "scale", "mask", "key mask", "bias", "row bias", "column bias",
       "one bias", "key_bias", "sinks", "segment_ids"]  # fmt: skip
SETS = [(a,) for a in ONE] + [(a, b) for i, a in enumerate(ONE) for b in ONE[i + 1 :] if a.split()[-1] != b.split()[-1]]


def given_gradients(given, results):
    """The gradients that a call returns, in the shapes that arrays were given in."""
    names = ["dq", "dk", "dv"]
    for name in ("key_bias", "bias", "sinks"):
        if name in given:
            names.append(f"d{name}")
            shape = given[name].shape
            results[f"d{name}"] = (
                summed_to(results[f"d{name}"].reshape(-1, *results[f"d{name}"].shape[1:]), shape)
                if name != "key_bias"
                else results["dkey_bias"].sum(axis=1).reshape(shape)
            )
    return {name: results[name] for name in ("out", "lse", *names)}


def run(backend, inputs, given, **options):
    """What the library makes of it: out, lse and gradients, once by the pullback and once without a state."""
    own = on_backend(backend, inputs)
    dout = own.pop("dout")
    given = {name: backend.array(x) if isinstance(x, np.ndarray) else x for name, x in given.items()}
    options = {"engine": EXACT, "empty_rows": "zero"} | given | options
    out, lse = lg.attention(**own, **options, return_lse=True)
    names = ["dq", "dk", "dv", *(f"d{name}" for name in ("key_bias", "bias", "sinks") if name in given)]
    again = lg.attention_backward(dout, own["q"], own["k"], own["v"], out, lse, **options)
    pulled, vjp = lg.attention_vjp(**own, **options)
    first = {"out": pulled, "lse": lse} | dict(zip(names, vjp(dout), strict=True))
    second = {"out": out, "lse": lse} | dict(zip(names, again, strict=True))
    return on_host(backend, first), on_host(backend, second)


def expected(inputs, given):
    lined = dict(given)
    if "key_bias" in lined:
        lined["key_bias"] = lined["key_bias"][:, None, :]
    if "segment_ids" in lined:
        lined["segment_ids"] = lined["segment_ids"][:, None, :]
    return given_gradients(given, dense(**inputs, **lined))


def assert_all_close(got, want, limit):
    """Rows without keys have no logarithm: they are the same, and left out of the error."""
    assert np.array_equal(got["lse"] == -np.inf, want["lse"] == -np.inf)
    got, want = ({name: np.where(x == -np.inf, 0, x) for name, x in results.items()} for results in (got, want))
    assert_close(got, want, limit)


@pytest.mark.parametrize("sizes", [(37, 37, None), (130, 241, 111), (41, 17, -3), (9, 60, 51)], ids=str)
@pytest.mark.parametrize("chosen", SETS, ids=" and ".join)
def test_every_pair_of_options_is_what_it_is_by_definition(chosen, sizes, backend, dtype, rng):
    n, m, offset = sizes
    if "segment_ids" in chosen:
        m, offset = n, None
    banded = {"causal", "window", "left window"} & set(chosen)
    inputs = arrays(rng, n, m)
    given = options_of(rng, n, m, chosen) | ({"query_offset": offset} if banded and offset is not None else {})
    want = expected(inputs, given)
    cast = lambda x: x.astype(dtype) if isinstance(x, np.ndarray) and x.dtype == np.float64 else x  # noqa: E731
    given = {name: cast(x) for name, x in given.items()}
    for got in run(backend, {name: cast(x) for name, x in inputs.items()}, given):
        # The logarithm is in float64, of scores in the arrays' dtype.
        assert_all_close(got, want, ORACLE[dtype])


@pytest.mark.parametrize("half", [FLOAT16, BFLOAT16], ids=str)
# (The gradient of one bias for all pairs is 0 but for rounding.)
@pytest.mark.parametrize("chosen", [(), *(x for x in SETS if "one bias" not in x)], ids=" and ".join)
def test_half_precision_is_rounded_once(chosen, half, rng):
    inputs = {name: x.astype(half).astype(float) for name, x in arrays(rng, 150, 150).items()}
    given = options_of(rng, 150, 150, chosen)
    given = {name: x.astype(half) if getattr(x, "dtype", None) == np.float64 else x for name, x in given.items()}
    wide = {name: x.astype(float) if getattr(x, "dtype", None) == half else x for name, x in given.items()}
    want = expected(inputs, wide)
    for got in run(RUST_BACKEND, {name: x.astype(half) for name, x in inputs.items()}, given):
        assert {x.dtype for name, x in got.items() if name != "lse"} == {half}
        got = {name: x.astype(float) for name, x in got.items()}
        # Of a few sums over all rows, whose terms cancel, and whose delta comes of a rounded out.
        few = {name: got.pop(name) for name in ("dsinks", "dbias") if name in got and got[name].size < 1000}
        assert_all_close(got, {name: want[name] for name in got}, HALF[half])
        assert_close(few, {name: want[name] for name in few}, 8 * HALF[half])


class RUST_BACKEND:
    """NumPy arrays as they are."""

    array = staticmethod(np.asarray)
    numpy = staticmethod(np.asarray)


def test_gradients_of_every_option_pass_central_differences(rng):
    inputs = arrays(rng, 12, 20)
    given = options_of(rng, 12, 20, ["mask", "key_bias", "sinks", "softcap"]) | {
        "bias": rng.standard_normal((H, 12, 1))
    }
    given["key_bias"] = rng.standard_normal((B, 20))
    got, _ = run(RUST_BACKEND, inputs, given)
    values = inputs | given

    def loss(name, x):
        changed = values | {name: x}
        dout = changed.pop("dout")
        return np.sum(dout * lg.attention(**changed, engine=EXACT, empty_rows="zero"))

    for name in ("q", "k", "v", "key_bias", "bias", "sinks"):
        error = difference_error(lambda x, name=name: loss(name, x), values[name], got[f"d{name}"], rng)
        assert error <= DIFFERENCE, f"d{name}: {error:.1e}"


@pytest.mark.parametrize("engine", [lg.Polynomial(2), lg.Polynomial(3, gradient="consistent"), lg.Landmark(12), EXACT],
                         ids=str)  # fmt: skip
@pytest.mark.parametrize("causal", [False, True])
def test_packed_sequences_are_those_sequences_one_by_one(engine, causal, rng):
    lengths = [70, 1, 200, 129]
    n = sum(lengths)
    inputs = {name: 0.3 * x for name, x in arrays(rng, n, n).items()}
    ids = np.repeat([2, 3, 7, 9], lengths)
    dout = inputs.pop("dout")
    out, vjp = lg.attention_vjp(**inputs, engine=engine, causal=causal, segment_ids=ids)
    packed = (out, *vjp(dout))
    ends = np.cumsum(lengths)
    parts = []
    for start, end in zip(ends - lengths, ends, strict=True):
        rows = np.s_[..., start:end, :]
        out, vjp = lg.attention_vjp(**{name: x[rows] for name, x in inputs.items()}, engine=engine, causal=causal)
        parts.append((out, *vjp(dout[rows])))
    for name, got, want in zip(("out", "dq", "dk", "dv"), packed, map(list, zip(*parts, strict=True)), strict=True):
        assert relative_error(got, np.concatenate(want, axis=-2)) <= 1e-12, name


@pytest.mark.parametrize("engine", [lg.Polynomial(2), lg.Polynomial(3, gradient="consistent"), EXACT], ids=str)
@pytest.mark.parametrize("n", [1, 30, 300])
def test_rows_after_a_cache_are_the_last_ones_of_the_whole_sequence(engine, n, rng):
    m = 400
    inputs = {name: 0.3 * x for name, x in arrays(rng, m, m).items()}
    last = np.s_[..., m - n :, :]
    dout = np.zeros_like(inputs.pop("dout"))
    dout[last] = rng.standard_normal(dout[last].shape)
    out, vjp = lg.attention_vjp(**inputs, engine=engine, causal=True)
    dq, dk, dv = vjp(dout)
    cached = inputs | {"q": inputs["q"][last]}
    got, vjp = lg.attention_vjp(**cached, engine=engine, causal=True, query_offset=m - n)
    results = dict(zip(("dq", "dk", "dv"), vjp(dout[last]), strict=True)) | {"out": got}
    assert_close(results, {"dq": dq[last], "dk": dk, "dv": dv, "out": out[last]}, 1e-11)


@pytest.mark.parametrize("engine", [lg.Polynomial(2), lg.Landmark(16), EXACT], ids=str)
def test_a_sink_takes_its_share_of_every_row(engine, rng):
    inputs = {name: 0.3 * x for name, x in arrays(rng, 150, 150).items()}
    dout, sinks = inputs.pop("dout"), np.array([-3.0, 0.0, 4.0, 200.0])
    for causal in (False, True):
        options = {"engine": engine, "causal": causal}
        out, lse = lg.attention(**inputs, **options, return_lse=True)
        got, joined = lg.attention(**inputs, **options, sinks=sinks, return_lse=True)
        share = 1 / (1 + np.exp(sinks[:, None] - lse))
        assert relative_error(got, share[..., None] * out) <= 1e-12
        assert relative_error(joined, np.logaddexp(lse, sinks[:, None])) <= 1e-12
        _, vjp = lg.attention_vjp(**inputs, **options, sinks=sinks)
        dsinks = vjp(dout)[-1]
        want = -((1 - share) * np.sum(got * dout, axis=-1)).sum(axis=(0, 2))
        assert relative_error(dsinks, want) <= 1e-12


@pytest.mark.parametrize("engine", [lg.Polynomial(2), lg.Landmark(8), EXACT], ids=str)
def test_rows_whose_keys_are_all_removed_are_zero_where_that_is_asked_for(engine, rng):
    n = 140
    inputs = {name: 0.3 * x for name, x in arrays(rng, n, n).items()}
    left = np.arange(n) >= 30  # padding on the left
    dout = inputs.pop("dout")
    kept = {name: x[..., 30:, :] for name, x in inputs.items()}
    out, vjp = lg.attention_vjp(**inputs, engine=engine, causal=True, key_bias=left, empty_rows="zero")
    want, pull = lg.attention_vjp(**kept, engine=engine, causal=True)
    for got, want in zip((out, *vjp(dout)), (want, *pull(dout[..., 30:, :])), strict=True):  # noqa: B020
        assert not got[..., :30, :].any()
        assert relative_error(got[..., 30:, :], want) <= 1e-12
    with pytest.raises(lg.DenominatorError, match="row 0 of head"):
        lg.attention(**inputs, engine=engine, causal=True, key_bias=left)


def test_one_key_gives_no_gradient_of_queries_and_keys_at_all(backend, dtype, rng):
    inputs = {name: x.astype(dtype) for name, x in arrays(rng, 40, 40).items()}
    for options in ({"window": (0, 0)}, {"segment_ids": np.arange(40)}):
        got, again = run(backend, inputs, options)
        for results in (got, again):
            assert not results["dq"].any()
            assert not results["dk"].any()


def test_key_biases_broadcast_and_of_bool_stand_for_minus_infinity(backend, rng):
    inputs = {name: x for name, x in arrays(rng, 20, 33).items() if name != "dout"}
    own = on_backend(backend, inputs)
    allowed = rng.random((B, 33)) < 0.6
    bias = np.where(allowed, 0, -np.inf)
    attend = lambda x: backend.numpy(lg.attention(**own, engine=EXACT, key_bias=backend.array(x)))  # noqa: E731
    want = attend(np.broadcast_to(bias[:, None], (B, KV, 33)).copy())
    for x in (bias, bias[:, None], allowed, allowed[:, None]):
        assert_same_bits({"out": attend(x)}, {"out": want})
    one = attend(np.broadcast_to(bias[0], (B, KV, 33)).copy())
    assert_same_bits({"out": attend(bias[0])}, {"out": one})


def test_arrays_of_pairs_are_read_in_place_however_large_they_would_be(rng):
    # 2^20 x 2^20 pairs: a copy of either would not fit into memory. Few pairs are within the window.
    n = 1 << 15
    q, k, v = (rng.standard_normal((n, 4)).astype(np.float32) for _ in range(3))
    mask = np.broadcast_to(rng.random(n) < 0.5, (n, n))
    bias = np.broadcast_to(rng.standard_normal((n, 1)).astype(np.float32), (n, n))
    out = lg.attention(q, k, v, engine=EXACT, mask=mask, bias=bias, window=(8, 8), empty_rows="zero")
    want = lg.attention(q, k, v, engine=EXACT, key_bias=mask[0], window=(8, 8), empty_rows="zero")
    assert relative_error(out, want) <= 1e-6


def test_infinite_gradients_pass_where_they_may(rng):
    inputs = arrays(rng, 10, 10)
    dout = inputs.pop("dout")
    dout[0, 0, 3] = np.inf
    out, lse = lg.attention(**inputs, engine=EXACT, return_lse=True)
    with pytest.raises(lg.NonFiniteError, match="dout holds NaN or infinity"):
        lg.attention_backward(dout, *inputs.values(), out, lse, engine=EXACT)
    dq, dk, dv = lg.attention_backward(dout, *inputs.values(), out, lse, engine=EXACT, check_finite=False)
    assert not np.isfinite(dq[0, 0, 3]).any()
    assert not np.isfinite(dv[0, 0]).any()
    assert np.isfinite(dq[1]).all() and np.isfinite(dk[1]).all() and np.isfinite(dv[1]).all()  # noqa: PT018


Q, K, V = np.ones((2, 6, 4)), np.ones((2, 6, 4)), np.ones((2, 6, 3))
SHORT = {"k": K[:, :5], "v": V[:, :5]}
SHAPE, DTYPE, ARGUMENT = lg.ShapeError, lg.DtypeError, lg.ArgumentError
BAD = {
    "mask of another shape": (
        {"mask": np.ones((5, 6), bool)},
        SHAPE,
        "mask has shape (5, 6); expected (2, 6, 6)",
    ),
    "mask of floats": ({"mask": np.ones((6, 6))}, DTYPE, "mask has dtype float64; expected bool"),
    "bias of integers": ({"bias": np.ones((6, 6), int)}, DTYPE, "bias has dtype int64; expected float32 or"),
    "bias of another dtype": (
        {"bias": np.ones((6, 6), np.float32)},
        DTYPE,
        "bias has dtype float32; expected float64",
    ),
    "bias of NaN": ({"bias": np.full((6, 6), np.nan)}, lg.NonFiniteError, "bias holds"),
    "window of one": ({"window": (3,)}, ARGUMENT, "window is (3,); expected a pair"),
    "window without room": ({"window": (-1, 2)}, ARGUMENT, "window[0] is -1; expected an integer >= 0"),
    "window of floats": ({"window": (1.5, None)}, ARGUMENT, "window[0] is 1.5; expected"),
    "window with n != m": (SHORT | {"window": (2, 2)}, SHAPE, "k has shape (2, 5, 4); expected (2, 6, 4)"),
    "segments that decrease": ({"segment_ids": np.array([1, 1, 0, 0, 2, 2])}, ARGUMENT, "segment_ids decrease"),
    "segments of floats": (
        {"segment_ids": np.zeros(6)},
        DTYPE,
        "segment_ids has dtype float64; expected an integer",
    ),
    "segments of another length": ({"segment_ids": np.zeros(5, int)}, SHAPE, "segment_ids has shape (5,)"),
    "segments with n != m": (
        SHORT | {"segment_ids": np.zeros(6, int)},
        SHAPE,
        "segment_ids are given with n = 6",
    ),
    "offset below": ({"causal": True, "query_offset": -7}, ARGUMENT, "query_offset is -7; expected -6 to 6"),
    "offset beyond": ({"causal": True, "query_offset": 7}, ARGUMENT, "query_offset is 7; expected -6 to 6"),
    "offset of text": ({"query_offset": "0"}, ARGUMENT, "query_offset is '0'; expected an integer"),
    "offset with segments": (
        {"query_offset": 1, "segment_ids": np.zeros(6, int)},
        ARGUMENT,
        "query_offset is 1 with segment_ids",
    ),
    "softcap of 0": ({"softcap": 0}, ARGUMENT, "softcap is 0.0; expected a number above 0"),
    "sinks of another length": ({"sinks": np.zeros(3)}, SHAPE, "sinks has shape (3,); expected (2,)"),
    "sinks of NaN": ({"sinks": np.array([0, np.nan])}, lg.NonFiniteError, "sinks holds"),
    "empty_rows": ({"empty_rows": "nan"}, ARGUMENT, "empty_rows is 'nan'; expected 'error' or 'zero'"),
    "empty rows": (
        {"causal": True, "query_offset": -2},
        lg.DenominatorError,
        "row 0 of head 0 has no key to attend to",
    ),
    "key_bias of another batch": (
        {"key_bias": np.zeros((3, 6))},
        SHAPE,
        "key_bias has shape (3, 6); expected (2, 6)",
    ),
    "polynomial with a mask": (
        {"engine": lg.Polynomial(), "mask": np.ones((6, 6), bool)},
        ARGUMENT,
        "Polynomial has no mask; use Exact()",
    ),
    "polynomial with a bias": (
        {"engine": lg.Polynomial(), "bias": np.ones((6, 6))},
        ARGUMENT,
        "Polynomial has no bias; use Exact()",
    ),
    "landmarks with a window": (
        {"engine": lg.Landmark(), "window": (1, 1)},
        ARGUMENT,
        "Landmark has no window; use Exact()",
    ),
    "landmarks with a cap": (
        {"engine": lg.Landmark(), "softcap": 2},
        ARGUMENT,
        "Landmark has no softcap; use Exact()",
    ),
}


@pytest.mark.parametrize("case", BAD.values(), ids=BAD)
def test_bad_options_are_refused_by_name(case, backend):
    options, error, text = case
    given = {"q": Q, "k": K, "v": V, "engine": EXACT} | options
    given = {name: backend.array(x) if isinstance(x, np.ndarray) else x for name, x in given.items()}
    with pytest.raises(error) as caught:
        lg.attention(**given)
    assert text in str(caught.value)


def test_a_tolerance_is_met_exactly_where_no_plan_is_made(rng):
    inputs = arrays(rng, 40, 40)
    dout = inputs.pop("dout")
    for options in ({"window": (5, 5)}, {"mask": rng.random((40, 40)) < 2}, {"softcap": 1.0}, {"sinks": np.zeros(H)}):
        out, vjp = lg.attention_vjp(**inputs, tol=1e-2, **options)
        want = lg.attention(**inputs, engine=EXACT, **options)
        vjp(dout)
        assert_same_bits({"out": out}, {"out": want})
        assert {head.engine for head in vjp.heads} == {EXACT}
        assert {head.reason for head in vjp.heads} == {f"no plan is made for {next(iter(options))}"}


def test_measured_errors_know_every_option(rng):
    inputs = arrays(rng, 60, 60)
    del inputs["dout"]
    given = options_of(rng, 60, 60, ["mask", "bias", "softcap", "sinks", "key_bias"]) | {"window": (30, 30)}
    given |= {"empty_rows": "zero"}
    out = lg.attention(**inputs, engine=EXACT, **given)
    assert lg.measure_error(**inputs, out=out, samples=10**6, **given).relative <= 1e-12
    error = lg.measure_error(**inputs, out=1.25 * out, samples=10**6, **given)
    assert error.relative == pytest.approx(0.25, rel=1e-9)
    _, vjp = lg.attention_vjp(**inputs, engine=EXACT, **given)
    vjp(rng.standard_normal(out.shape), samples=10**6)
    for head in vjp.heads:
        assert all(error.relative <= 1e-11 for error in head.errors.values())


def test_rows_that_see_no_key_are_measured_too(rng):
    inputs = arrays(rng, 30, 30)
    dout = inputs.pop("dout")
    options = {"causal": True, "query_offset": -30, "empty_rows": "zero"}
    out, vjp = lg.attention_vjp(**inputs, engine=lg.Polynomial(), **options)
    assert not out.any()
    assert not any(gradient.any() for gradient in vjp(dout, samples=8))
    assert lg.measure_error(**inputs, out=out, **options).relative == 0


@pytest.mark.parametrize("engine", [EXACT, lg.Polynomial(2), lg.Landmark(8)], ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_removed_keys_may_hold_infinities_but_not_nan(engine, causal, backend, dtype, rng):
    inputs = {name: (0.3 * x).astype(dtype) for name, x in arrays(rng, 140, 140).items()}
    allowed = rng.random((B, 140)) < 0.8
    allowed[:, 0] = True
    dout = inputs.pop("dout")
    results = []
    for value in (0, np.inf):
        for name in "kv":
            inputs[name][~np.broadcast_to(allowed[:, None], (B, KV, 140))] = value
        own = on_backend(backend, inputs | {"key_bias": allowed})
        out, vjp = lg.attention_vjp(**own, engine=engine, causal=causal)
        names = ("out", "dq", "dk", "dv")
        results.append(on_host(backend, dict(zip(names, (out, *vjp(backend.array(dout))), strict=True))))
    assert_same_bits(*results)
    inputs["v"][~np.broadcast_to(allowed[:, None], (B, KV, 140))] = np.nan
    with pytest.raises(lg.NonFiniteError, match="v holds NaN"):
        lg.attention(**on_backend(backend, inputs | {"key_bias": allowed}), engine=engine, causal=causal)


def test_batch_axes_broadcast_and_gradients_are_summed(backend, rng):
    inputs = arrays(rng, 20, 30)
    whole = inputs | {"k": np.broadcast_to(inputs["k"][:1], inputs["k"].shape).copy()}
    dout = backend.array(inputs.pop("dout"))
    del whole["dout"]
    for k in (inputs["k"][:1], inputs["k"][0]):
        out, vjp = lg.attention_vjp(**on_backend(backend, inputs | {"k": k}), engine=EXACT)
        want, pull = lg.attention_vjp(**on_backend(backend, whole), engine=EXACT)
        got = on_host(backend, dict(zip(("out", "dq", "dk", "dv"), (out, *vjp(dout)), strict=True)))
        want = on_host(backend, dict(zip(("out", "dq", "dk", "dv"), (want, *pull(dout)), strict=True)))
        want["dk"] = want["dk"].sum(axis=0).reshape(k.shape)
        assert_close(got, want, 1e-13)


@pytest.mark.parametrize("half", [FLOAT16, BFLOAT16], ids=str)
def test_half_precision_is_refused_where_it_would_be_computed_in_itself(half, monkeypatch):
    monkeypatch.setattr(select, "KINDS", [*GPU_NUMPY.kinds, *select.KINDS])
    q = np.ones((4, 3), half)
    with pytest.raises(lg.DtypeError, match="on a GPU; expected float32 or float64"):
        lg.attention(q, q, q, engine=EXACT)
    with pytest.raises(lg.DtypeError, match="on a GPU; expected float32 or float64"):
        lg.attention_backward(q, q, q, q, q, np.ones(4), engine=EXACT)


@pytest.mark.parametrize(("n", "m"), [(0, 5), (0, 0), (4, 0)])
def test_calls_without_queries_or_keys_have_results_and_gradients(n, m, backend, rng):
    inputs = arrays(rng, n, m)
    given = options_of(rng, n, m, ["mask", "bias", "key_bias", "sinks", "softcap"])
    for got in run(backend, inputs, given):
        assert {name: x.shape for name, x in got.items()} == {
            "out": (B, H, n, DV),
            "lse": (B, H, n),
            "dq": (B, H, n, D),
            "dk": (B, KV, m, D),
            "dv": (B, KV, m, DV),
            "dkey_bias": (B, m),
            "dbias": (H, n, m),
            "dsinks": (H,),
        }
        assert all(not x.any() for name, x in got.items() if name != "lse")
