"""Keys that a bias removes: whatever they hold, nothing takes from them and nothing goes to them."""

import numpy as np
import pytest
from conftest import FAST_BACKENDS, GPU_NUMPY, NUMERIC_BACKENDS
from helpers import assert_close, cast, difference_error, draw, relative_error, run_attention
from limits import DIFFERENCE, ORACLE

import lingrad_rs as lg
from lingrad_rs import Auto, Exact, Landmark, Polynomial

SHIFTED = {
    "closed form": Polynomial(shift="mean"),
    "consistent": Polynomial(shift="mean", gradient="consistent"),
    "consistent, fitted": Polynomial(shift="mean", gradient="consistent", coefficients="fitted"),
}


ENGINES = {
    "exact": Exact(),
    "closed form": Polynomial(),
    "consistent": Polynomial(gradient="consistent"),
    "degree 4": Polynomial(degree=4),
    "fitted": Polynomial(coefficients="fitted"),
    "no window": Polynomial(window=0),
    "polynomial diagonal": Polynomial(diagonal="polynomial"),
    "polynomial diagonal, consistent": Polynomial(diagonal="polynomial", gradient="consistent"),
    "given shift": Polynomial(shift=((0.1,) * 5, (-0.2,) * 5)),
    "landmarks": Landmark(rank=40),
    "tolerance": Auto(tol=1e-2),
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


def filled(inputs, gone, value):
    """Removed keys and their values hold the value, with signs by turns."""
    signs = {x: np.resize([1, -1, -1], inputs[x].shape[-1] * inputs[x].shape[-2]) for x in "kv"}
    of_gone = {x: value * signs[x].reshape(inputs[x].shape[-2:]) for x in "kv"}
    return inputs | {x: np.where(gone[..., None], of_gone[x], inputs[x]).astype(inputs[x].dtype) for x in "kv"}


def huge(dtype):
    return float(np.finfo(dtype).max)


@pytest.mark.parametrize("n", [5, 150, 700])
@pytest.mark.parametrize("causal", [False, True])
@engines(ENGINES | SHIFTED)
def test_removed_keys_may_hold_the_largest_numbers_there_are(engine, causal, n, backend, dtype, rng):
    if causal and isinstance(engine, Polynomial) and engine.shift == "mean":
        return  # refused
    inputs, gone = padded(rng, n=n, m=n, size=0.4)
    inputs = cast(inputs, dtype)
    far = filled(inputs, gone, huge(dtype))
    want, got = (run_attention(backend, x, engine=engine, causal=causal) for x in (inputs, far))
    assert_close(got, want, ORACLE[dtype])
    assert_nothing_for(gone, got)


@pytest.mark.parametrize("causal", [False, True])
@engines({name: ENGINES[name] for name in ("exact", "closed form", "landmarks")})
def test_errors_are_measured_beside_removed_keys_that_hold_anything(engine, causal, backend, dtype, rng):
    inputs, gone = padded(rng, n=150, m=150, size=0.3)
    arrays = filled(cast(inputs, dtype), gone, huge(dtype))
    q, k, v, bias, dout = (backend.array(arrays[x]) for x in ("q", "k", "v", "key_bias", "dout"))
    options = {"causal": causal, "key_bias": bias}
    out, vjp = lg.attention_vjp(q, k, v, engine=engine, **options)
    for samples in (20, 1000):
        vjp(dout, samples=samples)
        assert all(error.high <= 0.5 for head in vjp.heads for error in head.errors.values())
        assert lg.measure_error(q, k, v, out, samples=samples, **options).high <= 0.5


@pytest.mark.parametrize("n", [3, 150, 1200])
@engines({name: engine for name, engine in ENGINES.items() if name != "tolerance"})  # which looks at all tokens
def test_later_keys_may_hold_the_largest_numbers_there_are(engine, n, backend, dtype, rng):
    if n < 1024 and isinstance(engine, Landmark):
        return  # landmarks are taken from the first 1024 tokens, of which that one would be
    # The last token's value and key are far out of the range of products with the others; its own gradient is 0.
    inputs = draw(rng, n=n, heads=(4,), key_heads=(2,), size=0.3)
    inputs["dout"][:, -1] = 0.0
    inputs["q"][:, -1] = 0.0
    inputs = cast(inputs, dtype)
    last = np.zeros((2, n), bool)
    last[:, -1] = True
    far = filled(inputs, last, huge(dtype))
    want, got = (run_attention(backend, x, engine=engine, causal=True) for x in (inputs, far))
    for name in ("out", "dq", "dk", "dv"):
        assert_close({name: got[name][:, :-1]}, {name: want[name][:, :-1]}, ORACLE[dtype])


# What other libraries use in place of minus infinity.
PADDING = {"the least number": lambda dtype: float(np.finfo(dtype).min), "-1e9": lambda dtype: -1e9}
PADDED = SHIFTED | {name: ENGINES[name] for name in ("exact", "closed form", "consistent", "fitted", "landmarks")}


@pytest.mark.parametrize("padding", PADDING.values(), ids=PADDING.keys())
@pytest.mark.parametrize(
    ("engine", "causal"),
    [
        pytest.param(engine, causal, id=f"{name}, {'causal' if causal else 'full'}")
        for name, engine in PADDED.items()
        for causal in (False, True)
        if not (causal and getattr(engine, "shift", None) == "mean")
    ],
)
def test_a_bias_that_stands_for_minus_infinity_removes_keys_as_that_does(engine, causal, padding, backend, dtype, rng):
    inputs, gone = padded(rng, n=600, m=600, size=0.4)
    gone[:, 0] = False
    inputs["key_bias"] = np.where(gone, -np.inf, 0.3)
    by_number = inputs | {"key_bias": np.where(gone, padding(dtype), 0.3)}
    want, got = (run_attention(backend, cast(x, dtype), engine=engine, causal=causal) for x in (inputs, by_number))
    assert_close(got, want, ORACLE[dtype])
    assert_nothing_for(gone, got)


@pytest.mark.parametrize("padding", PADDING.values(), ids=PADDING.keys())
@engines({"landmarks": Landmark(rank=40)} | SHIFTED)
def test_the_same_bias_for_all_keys_changes_nothing(engine, padding, backend, dtype, rng):
    inputs = draw(rng, n=200, heads=(4,), key_heads=(2,), size=0.5)
    inputs["k"] += 0.7
    none, same = (inputs | {"key_bias": np.full((2, 200), x)} for x in (0.0, padding(dtype)))
    want, got = (run_attention(backend, cast(x, dtype), engine=engine) for x in (none, same))
    assert_close(got, want, ORACLE[dtype])


def test_landmarks_refuse_rows_that_see_nothing_but_padding(backend, dtype, rng):
    # Causal, padded on the left: what the norms of keys add to such biases is lost.
    inputs = cast(draw(rng, n=1500, size=0.5), dtype)
    q, k, v = (backend.array(inputs[x]) for x in "qkv")
    bias = np.zeros(1500, dtype)
    bias[:1100] = np.finfo(dtype).min
    bias = backend.array(bias)
    with pytest.raises(lg.DenominatorError, match="remove keys by -inf"):
        lg.attention(q, k, v, key_bias=bias, causal=True, engine=Landmark(rank=40))
    out = lg.attention(q, k, v, key_bias=bias, causal=True, tol=1e-2)
    want = lg.attention(q, k, v, key_bias=bias, causal=True, engine=Exact())
    assert np.linalg.norm(backend.numpy(out) - backend.numpy(want)) <= 1e-2 * np.linalg.norm(backend.numpy(want))


@pytest.mark.parametrize("where", ["left", "right", "scattered"])
@pytest.mark.parametrize("padding", PADDING.values(), ids=PADDING.keys())
@pytest.mark.parametrize("backend", [*FAST_BACKENDS, GPU_NUMPY], indirect=True, ids=lambda backend: backend.name)
def test_a_tolerance_serves_padded_sequences(padding, where, backend, rng):
    """Causal, keys with a mean: plans look at shifted polynomials, which refuse rows that see such biases alone.

    Padded on the right there are no such rows, and a low-rank engine serves.
    """
    n = 8192
    inputs = draw(rng, n=n, size=0.3, d=4)
    inputs["k"] += 0.7
    gone = {"left": np.arange(n) < n // 8, "right": np.arange(n) >= 7 * n // 8, "scattered": rng.random(n) < 0.1}[where]
    inputs["key_bias"] = np.where(gone, padding(np.float32), 0.0)
    q, k, v, bias = (backend.array(np.float32(inputs[x])) for x in ("q", "k", "v", "key_bias"))
    plan = lg.plan_attention(q, k, v, key_bias=bias, causal=True, tol=1e-1)
    out = lg.attention(q, k, v, key_bias=bias, causal=True, tol=1e-1)
    want = lg.attention(q, k, v, key_bias=bias, causal=True, engine=Exact())
    assert relative_error(backend.numpy(out), backend.numpy(want)) <= 1e-1
    if where == "right":
        assert plan.heads[0].engine != Exact()
