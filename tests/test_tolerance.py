"""A tolerance is kept: over drawn distributions, masks, dtypes and tolerances, results are within it or exact."""

import dataclasses
import math
from collections import Counter

import numpy as np
import pytest
from conftest import FAST_BACKENDS, NUMERIC_BACKENDS
from distributions import DISTRIBUTIONS
from helpers import cast, relative_error, run_attention
from limits import AS_EXACT, OVER_AT_ALL, OVER_BY, SAME_MODEL, STALE_SCORES

import lingrad_rs as lg
from lingrad_rs import Auto, Exact, Landmark, Polynomial

TOLERANCES = {np.dtype(np.float32): (3e-1, 1e-1, 3e-2, 1e-2, 1e-3, 1e-5)}
TOLERANCES[np.dtype(np.float64)] = (*TOLERANCES[np.dtype(np.float32)][:-1], 1e-4, 1e-6)
N = 4096


def drawn(name, n=N, dtype=np.float64):
    """``q, k, v, dout`` of a distribution."""
    rng = np.random.default_rng(7)
    q, k, v = DISTRIBUTIONS[name](rng, n)
    dout = v + 0.5 * rng.standard_normal(v.shape)
    return cast({"q": q, "k": k, "v": v, "dout": dout}, dtype)


@pytest.mark.sweep
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("backend", FAST_BACKENDS, indirect=True, ids=lambda backend: backend.name)
def test_every_result_is_within_the_tolerance_and_few_are_over_it(causal, dtype, backend):
    counts = Counter()
    for name in DISTRIBUTIONS:
        counts += hold_to_tolerances(backend, drawn(name, dtype=dtype), TOLERANCES[dtype], causal, name)
    print(dict(counts))
    assert counts["approximate"] > 25, "hardly anything was served by a low-rank engine"
    assert counts["over"] <= OVER_AT_ALL * counts["tried"], counts


# Each stands for an outcome: low degrees, degrees with shifts, and the exact engine after a look and after none.
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize(
    "name",
    [
        "isotropic, d 16, score std 0.3",
        "large means, centred score std 0.1",
        "one huge query",
        "log-normal lengths, score std 1",
    ],
)
def test_every_result_is_within_the_tolerance_or_as_exact_as_can_be(name, causal, dtype, backend):
    hold_to_tolerances(backend, drawn(name, n=2048, dtype=dtype), (1e-1, 1e-2), causal, name)


def hold_to_tolerances(backend, inputs, tolerances, causal, name):
    """Every result is within each tolerance, or as exact as the exact engine's, and reported as such.

    Returns how many calls were served by a low-rank engine, their results, and those over their tolerance.
    """
    want = run_attention(backend, cast(inputs, np.float64), engine=Exact(), causal=causal)
    exact = run_attention(backend, inputs, engine=Exact(), causal=causal)
    rounding = {x: relative_error(exact[x], want[x]) for x in want}
    counts = Counter()
    for tol in tolerances:
        arrays = {x: backend.array(y) for x, y in inputs.items()}
        dout = arrays.pop("dout")
        out, vjp = lg.attention_vjp(**arrays, tol=tol, causal=causal)
        got = dict(zip(want, map(backend.numpy, (out, *vjp(dout))), strict=True))
        head = vjp.heads[0]
        for x in want:
            error = relative_error(got[x], want[x])
            case = f"{name}: {x}, tol {tol:g}: {error:.2e} by {head}"
            assert error <= max(OVER_BY * tol, AS_EXACT * rounding[x]), case
            if head.engine != Exact():
                counts["tried"] += 1
                counts["over"] += error > max(tol, AS_EXACT * rounding[x])
        if head.engine == Exact():
            assert head.errors == {}
        else:
            counts["approximate"] += 1
            assert head.errors["out"].high <= tol
            assert head.missed or all(head.errors[x].high <= tol for x in want)
    return counts


@pytest.mark.parametrize("name", ["near a curve, d 64, score std 1", "isotropic, d 16, score std 0.3"])
@pytest.mark.parametrize("backend", NUMERIC_BACKENDS, indirect=True, ids=lambda backend: backend.name)
def test_the_output_alone_is_held_to_its_tolerance(name, backend):
    inputs = drawn(name, n=16384, dtype=np.float32)
    arrays = {x: backend.array(inputs[x]) for x in "qkv"}
    exact = lg.attention(**arrays, engine=Exact())
    plan = lg.plan_attention(**arrays, tol=1e-2, gradients=False)
    assert plan.heads[0].engine != Exact()
    assert plan.heads[0].cost < plan.heads[0].exact_cost
    for out in (lg.attention(**arrays, tol=1e-2), plan.attention(**arrays)):
        assert relative_error(backend.numpy(out), backend.numpy(exact)) <= 1e-2


def test_a_plan_chooses_for_each_head(backend):
    names = ["isotropic, d 16, score std 0.05", "isotropic, d 16, score std 3"]
    heads = [drawn(name, n=8192, dtype=np.float32) for name in names]
    arrays = {x: backend.array(np.stack([head[x] for head in heads])) for x in "qkv"}
    plan = lg.plan_attention(**arrays, tol=1e-2)
    assert [type(head.engine) for head in plan.heads] == [Polynomial, Exact]
    assert "polynomial" in str(plan)
    assert "exact" in str(plan)


def curve(dtype=np.float32, n=32768):
    return {x: y for x, y in drawn("near a curve, d 64, score std 1", n, dtype).items() if x != "dout"}


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("backend", NUMERIC_BACKENDS, indirect=True, ids=lambda backend: backend.name)
def test_a_plan_survives_json_and_gives_the_same_bits(causal, backend):
    arrays = {x: backend.array(y) for x, y in curve().items()}
    plan = lg.plan_attention(**arrays, tol=3e-2, causal=causal, gradients=False)
    assert isinstance(plan.heads[0].engine, Landmark)
    again = lg.Plan.from_json(plan.to_json())
    assert again == plan
    assert np.array_equal(backend.numpy(plan.attention(**arrays)), backend.numpy(again.attention(**arrays)))


@pytest.mark.parametrize("backend", NUMERIC_BACKENDS, indirect=True, ids=lambda backend: backend.name)
def test_a_plan_says_which_constants_saw_the_whole_sequence(backend):
    arrays = {x: backend.array(y) for x, y in curve().items()}
    plan = lg.plan_attention(**arrays, tol=3e-2, causal=True, gradients=False)
    assert plan.heads[0].whole_sequence == ("landmarks",)
    assert lg.plan_attention(**arrays, tol=3e-2, causal=False, gradients=False).heads[0].whole_sequence == ()
    strict = lg.plan_attention(**arrays, tol=3e-2, causal=True, strict_causal=True, gradients=False)
    assert strict.heads[0].whole_sequence == ()


def test_a_strictly_causal_plan_lets_no_token_see_a_later_one(backend):
    inputs = drawn("isotropic, d 16, score std 0.3", n=8192, dtype=np.float64)
    q, k, v = (inputs[x] for x in "qkv")
    plan = lg.plan_attention(*map(backend.array, (q, k, v)), tol=3e-2, causal=True, strict_causal=True)
    assert isinstance(plan.heads[0].engine, Polynomial)
    out = backend.numpy(plan.attention(*map(backend.array, (q, k, v))))
    k2, v2 = k.copy(), v.copy()
    k2[5000:] *= 0.9
    v2[5000:] += 1
    changed = backend.numpy(plan.attention(*map(backend.array, (q, k2, v2))))
    assert np.array_equal(out[:5000], changed[:5000])
    assert not np.array_equal(out[5000:], changed[5000:])


def test_a_stale_plan_is_noticed_and_computed_exactly(backend):
    inputs = drawn("isotropic, d 16, score std 0.3", n=8192, dtype=np.float32)
    arrays = {x: backend.array(inputs[x]) for x in "qkv"}
    plan = lg.plan_attention(**arrays, tol=1e-2)
    arrays["q"] = backend.array(inputs["q"] * np.float32(STALE_SCORES))
    out, vjp = plan.attention_vjp(**arrays)
    assert vjp.heads[0].engine == Exact()
    assert "stale" in vjp.heads[0].missed
    assert np.array_equal(backend.numpy(out), backend.numpy(lg.attention(**arrays, engine=Exact())))


def test_gradients_that_miss_are_computed_exactly(backend):
    # dout is large where the polynomial is worst, so that the random dout of the plan does not tell.
    inputs = drawn("log-normal lengths, score std 0.3", n=4096, dtype=np.float64)
    arrays = {x: backend.array(inputs[x] * (0.2 if x == "q" else 1)) for x in "qkv"}
    rng = np.random.default_rng(3)
    sizes = np.linalg.norm(inputs["q"], axis=1, keepdims=True)
    dout = rng.standard_normal(inputs["dout"].shape) * sizes**8
    exact = lg.attention_vjp(**arrays, engine=Exact())[1](backend.array(dout))
    _, vjp = lg.attention_vjp(**arrays, tol=3e-2)
    got = vjp(backend.array(dout))
    for name, x, y in zip(("dq", "dk", "dv"), got, exact, strict=True):
        assert relative_error(backend.numpy(x), backend.numpy(y)) <= 3e-2, (name, vjp.heads)


@pytest.mark.parametrize("causal", [False, True])
def test_grouped_heads_with_a_bias_are_within_the_tolerance(causal, backend, rng):
    n, d = 4096, 8
    inputs = {
        "q": 0.5 * rng.standard_normal((4, n, d)) + 0.3,
        "k": 0.5 * rng.standard_normal((2, n, d)) - 0.2,
        "v": rng.standard_normal((2, n, 5)),
        "key_bias": 0.5 * rng.standard_normal((2, n)),
        "dout": rng.standard_normal((4, n, 5)),
    }
    inputs["key_bias"][:, 1::7] = -np.inf
    want = run_attention(backend, inputs, engine=Exact(), causal=causal)
    got = run_attention(backend, inputs, tol=5e-2, causal=causal)
    for name in want:
        assert relative_error(got[name], want[name]) <= 5e-2, name
    arrays = {x: backend.array(y) for x, y in inputs.items() if x != "dout"}
    _, vjp = lg.attention_vjp(**arrays, tol=5e-2, causal=causal)
    vjp(backend.array(inputs["dout"]))
    assert any(head.engine != Exact() for head in vjp.heads)
    assert all(head.errors["dkey_bias"].high <= 5e-2 for head in vjp.heads if "dkey_bias" in head.errors)
    assert any("dkey_bias" in head.errors for head in vjp.heads)


def test_the_bound_of_a_polynomial_holds(backend):
    # Values that do not average out to nothing: the bound is one of their size.
    inputs = drawn("isotropic, d 16, score std 0.05", n=8192)
    inputs["v"] = 1 + 0.1 * inputs["v"]
    arrays = {x: backend.array(inputs[x]) for x in "qkv"}
    head = lg.plan_attention(**arrays, tol=1e-1).heads[0]
    exact = backend.numpy(lg.attention(**arrays, engine=Exact()))
    error = relative_error(backend.numpy(lg.attention(**arrays, engine=head.engine)), exact)
    assert head.error_bound is not None
    assert error <= head.error_bound


@pytest.mark.parametrize("causal", [False, True])
def test_measured_gradient_errors_are_the_true_ones_on_all_rows(causal, backend, rng):
    n = 300
    q, k, v, dout = (rng.standard_normal((n, 6)) * s for s in (0.7, 0.7, 1, 1))
    engine = Polynomial(degree=2, gradient="consistent")
    exact, exact_vjp = lg.attention_vjp(*map(backend.array, (q, k, v)), engine=Exact(), causal=causal)
    want = (exact, *exact_vjp(backend.array(dout)))
    out, vjp = lg.attention_vjp(*map(backend.array, (q, k, v)), engine=engine, causal=causal)
    assert vjp.heads == ()
    got = (out, *vjp(backend.array(dout), samples=n))
    errors = vjp.heads[0].errors
    for name in ("out", "dq"):
        i = ("out", "dq").index(name)
        true = relative_error(backend.numpy(got[i]), backend.numpy(want[i]))
        assert relative_error(errors[name].relative, true) <= SAME_MODEL
    for i, name in ((2, "dk"), (3, "dv")):
        # Given the engine's row sums, which err too.
        true = relative_error(backend.numpy(got[i]), backend.numpy(want[i]))
        assert 0.5 <= errors[name].relative / true <= 2
    assert vjp.heads[0].engine == engine


def test_a_transformer_within_a_tolerance_reports_every_head(rng):
    config = lg.TransformerConfig(n_layers=2, d_model=32, n_heads=4, d_ff=64, vocab_size=64, engine=Auto(tol=5e-2))
    model = lg.Transformer(config, seed=1)
    tokens = rng.integers(0, 64, 8192)
    report = model.gradient_report(tokens, np.roll(tokens, -1), samples=0)
    reference = lg.Transformer(dataclasses.replace(config, engine=Exact()), model.params)
    loss, grads = reference.value_and_grad(tokens, np.roll(tokens, -1))
    assert abs(report.loss - loss) <= 5e-2 * abs(loss)
    assert max(relative_error(report.grads[name], grads[name]) for name in grads) <= 2 * 5e-2
    heads = [head for layer in report.layers for head in layer.heads]
    assert len(heads) == 8
    assert any(head.engine != Exact() for head in heads)
    assert all(e.high <= 5e-2 for head in heads for e in head.errors.values())


@pytest.mark.parametrize(("dtype_name", "floor"), [("float32", 1e-5), ("float64", 1e-12)])
def test_a_tolerance_below_the_floor_names_it(dtype_name, floor, backend):
    x = backend.array(np.ones((4, 2), dtype_name))
    with pytest.raises(lg.ToleranceError, match="expected at least 1e-"):
        lg.attention(x, x, x, tol=floor / 2)
    assert lg.attention(x, x, x, tol=floor).shape == (4, 2)


@pytest.mark.parametrize("tol", [0, 1, -0.5, 2, 1.0])
def test_a_tolerance_out_of_range_is_an_error(tol, backend):
    x = backend.array(np.ones((4, 2)))
    with pytest.raises(lg.ToleranceError, match=r"expected a number in \(0, 1\)"):
        lg.attention_vjp(x, x, x, tol=tol)


def test_a_tolerance_that_is_no_number_is_an_error(backend):
    x = backend.array(np.ones((4, 2)))
    for tol in ("1e-2", True, float("nan")):
        with pytest.raises(lg.ArgumentError, match="tol is"):
            lg.attention(x, x, x, tol=tol)


def test_a_tolerance_beside_an_engine_is_an_error(backend):
    x = backend.array(np.ones((4, 2)))
    with pytest.raises(lg.ArgumentError, match="expected one of them"):
        lg.attention(x, x, x, tol=1e-2, engine=Exact())


def test_a_plan_refuses_data_of_another_shape_or_dtype(backend):
    x = backend.array(np.ones((2, 6, 4)))
    plan = lg.plan_attention(x, x, x)
    with pytest.raises(lg.ShapeError, match="as the plan"):
        plan.attention(x[:, :5, :], x, x)
    with pytest.raises(lg.ShapeError, match="as the plan"):
        plan.attention(*[backend.array(np.ones((2, 6, 3)))] * 3)
    with pytest.raises(lg.DtypeError, match="as the plan"):
        plan.attention_vjp(*[backend.array(np.ones((2, 6, 4), np.float32))] * 3)


@pytest.mark.parametrize(
    "text", ["", "{}", '{"lingrad_rs": "plan"}', '["plan"]', '{"lingrad_rs": "plan", "shapes": 3}']
)
def test_a_text_that_holds_no_plan_is_an_error(text):
    with pytest.raises(lg.ArgumentError, match="holds no plan"):
        lg.Plan.from_json(text)


@pytest.mark.parametrize("shape", [(0, 4), (3, 0, 4), (0, 2, 0, 4)])
def test_a_plan_of_nothing_is_exact(shape, backend):
    x = backend.array(np.zeros(shape))
    plan = lg.plan_attention(x, x, x, tol=0.1)
    assert [head.engine for head in plan.heads] == [lg.Exact()] * math.prod(shape[:-2])
    assert lg.Plan.from_json(plan.to_json()).shapes == plan.shapes
    out, vjp = plan.attention_vjp(x, x, x)
    assert [y.shape for y in (out, *vjp(out))] == [shape] * 4


def test_landmark_constants_are_checked(backend):
    good = {
        "scale": 0.5,
        "query_shift": np.zeros(4),
        "key_shift": np.zeros(4),
        "balance": 1.0,
        "landmarks": np.zeros((3, 4)),
        "matrix": np.eye(3),
    }
    x = backend.array(np.full((6, 4), 0.1))
    assert lg.attention(x, x, x, engine=Landmark(constants=lg.LandmarkConstants(**good))).shape == (6, 4)
    with pytest.raises(lg.ShapeError, match="matrix"):
        lg.LandmarkConstants(**(good | {"matrix": np.eye(2)}))
    with pytest.raises(lg.NonFiniteError, match="landmarks"):
        lg.LandmarkConstants(**(good | {"landmarks": np.full((3, 4), np.nan)}))
    with pytest.raises(lg.DtypeError, match="landmarks has dtype float32"):
        lg.LandmarkConstants(**(good | {"landmarks": np.zeros((3, 4), np.float32)}))
    with pytest.raises(lg.ArgumentError, match="balance"):
        lg.LandmarkConstants(**(good | {"balance": 0.0}))
    constants = lg.LandmarkConstants(**good)
    with pytest.raises(lg.ArgumentError, match="scale"):
        lg.attention(x, x, x, engine=Landmark(constants=constants), scale=2.0)
    y = backend.array(np.ones((6, 5)))
    with pytest.raises(lg.ShapeError, match="landmarks are of width 4"):
        lg.attention(y, y, y, engine=Landmark(constants=constants))


@pytest.mark.parametrize("causal", [False, True])
def test_modules_take_a_tolerance_and_landmarks(causal, rng):
    n, d = 4096, 16
    x = 0.4 * rng.standard_normal((n, d))
    weights = {name: rng.standard_normal((d, d)) / 4 for name in ("w_q", "w_k", "w_v", "w_o")}
    dy = rng.standard_normal((n, d))

    def run(engine):
        module = lg.SelfAttention(**weights, n_heads=2, causal=causal, engine=engine)
        y, pullback = module.vjp(x)
        dx, grads = pullback(dy)
        return {"y": y, "dx": dx, **grads}

    exact = run(Exact())
    for engine, limit in ((Auto(tol=2e-2), 4e-2), (Landmark(rank=512), 0.5)):
        got = run(engine)
        for name in exact:
            assert relative_error(got[name], exact[name]) <= limit, (engine, name)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.usefixtures("restore_threads")
def test_a_tolerance_gives_the_same_bits_for_any_number_of_threads(causal, backend):
    inputs = drawn("isotropic, d 16, score std 0.3", n=4096, dtype=np.float32)

    def run(threads):
        lg.set_num_threads(threads)
        return run_attention(backend, inputs, tol=5e-2, causal=causal)

    one, many = run(1), run(3)
    for name in one:
        assert np.array_equal(one[name], many[name]), name


def test_landmarks_of_values_that_are_all_zero_give_zero(backend, rng):
    q, k = (backend.array(rng.standard_normal((50, 4))) for _ in range(2))
    v = backend.array(np.zeros((50, 3)))
    assert np.array_equal(backend.numpy(lg.attention(q, k, v, engine=Landmark(rank=20))), np.zeros((50, 3)))


def test_too_many_landmarks_are_an_error():
    with pytest.raises(lg.ArgumentError, match="expected an integer of 1 to 8192"):
        Landmark(rank=8193)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("backend", NUMERIC_BACKENDS, indirect=True, ids=lambda backend: backend.name)
def test_what_removed_keys_hold_does_not_matter_to_a_plan(causal, backend):
    inputs = drawn("isotropic, d 16, score std 0.3", n=8192, dtype=np.float32)
    bias = np.zeros(8192, np.float32)
    bias[1::2] = -np.inf
    q, k, v = (inputs[x] for x in "qkv")
    outs = []
    for garbage in (0.0, 1e4):
        k = k.copy()
        k[1::2] = garbage
        out, vjp = lg.attention_vjp(
            *map(backend.array, (q, k, v)), key_bias=backend.array(bias), tol=1e-1, causal=causal
        )
        vjp(backend.array(inputs["dout"]))
        assert vjp.heads[0].engine != Exact(), vjp.heads
        outs.append(backend.numpy(out))
    assert np.array_equal(*outs)


def test_a_plan_of_no_queries_can_be_used(backend):
    q, k = backend.array(np.ones((0, 4))), backend.array(np.ones((6, 4)))
    plan = lg.plan_attention(q, k, k)
    assert plan.attention(q, k, k).shape == (0, 4)
