"""The GPU path draws, fits and measures what the compiled core does, and takes what is known as it is."""

import gc
import itertools
import weakref

import numpy as np
import pytest
from conftest import GPU_NUMPY, GPU_STRICT, RUST
from helpers import draw, relative_error
from limits import REORDERED, SAME_MODEL

import lingrad_rs as lg
from lingrad_rs import _lingrad_rs as core
from lingrad_rs.backends import cpu
from lingrad_rs.backends.array import device, engines, measure, tolerance
from lingrad_rs.backends.array.linear import scan
from lingrad_rs.backends.array.plan import rates
from lingrad_rs.backends.array.problem.heads import Grads, Heads, chosen, dots, heads_at
from lingrad_rs.spec.plan import head_plans, unplanned
from lingrad_rs.spec.scores import Scores

ARRAY_CODE = pytest.mark.parametrize(
    "backend", [GPU_NUMPY, GPU_STRICT], indirect=True, ids=lambda backend: backend.name
)


def some_heads(backend, rng, *, causal, n=2048, count=2, size=0.5, bias=True):
    """``(space, heads, dout)``; the first head's scores are small, the second's are not."""
    inputs = draw(rng, n=n, heads=(count,), d=4, bias=bias, size=size)
    inputs["q"][1:] *= 12
    arrays = {name: backend.array(x) for name, x in inputs.items()}
    dout = arrays.pop("dout")
    heads = Heads(*(arrays.get(x) for x in ("q", "k", "v", "key_bias")), causal, 0.5)
    return device.space_of(dout), heads, dout


@ARRAY_CODE
@pytest.mark.parametrize("causal", [False, True])
def test_equal_seeds_measure_the_same_as_the_core(causal, backend, rng):
    inputs = draw(rng, n=300, heads=(2, 4), key_heads=(2, 2), bias=True)
    del inputs["dout"]
    out = rng.standard_normal((2, 4, 300, 3))
    options = {"causal": causal, "scale": 0.4, "samples": 50, "seed": 3}
    scores = Scores(scale=options["scale"], causal=causal, key_bias=inputs["key_bias"])
    want = cpu.measure_error(*(inputs[x] for x in "qkv"), scores, out, samples=50, seed=3)
    arrays = {name: backend.array(x) for name, x in inputs.items()}
    got = lg.measure_error(**arrays, out=backend.array(out), **options)
    assert got.rows == want[3]
    assert relative_error((got.relative, got.low, got.high), want[:3]) <= SAME_MODEL


@ARRAY_CODE
@pytest.mark.parametrize("causal", [False, True])
def test_rows_and_keys_are_exact_in_chunks_of_any_size(causal, backend, rng):
    sp, heads, dout = some_heads(backend, rng, causal=causal, n=200)
    out, saved = engines.forward(sp, [lg.Exact()] * heads.count, heads)
    grads = engines.backward(sp, heads, saved, out, dout)
    logs, delta = engines.log_sums(sp, heads, saved), dots(sp, out, dout)
    rows = np.array([[0, 7, 150, 199], [3, 3, 4, 90]])
    for numbers in (1, 1000, sp.numbers):
        small = device.Space(sp.xp, sp.device, numbers)
        exact = measure.exact_rows(small, heads, rows, measure.take_rows(sp, dout, rows))
        keys = measure.key_gradients(small, heads, rows, dout, delta, logs)
        for got, want in (
            (exact.out, out),
            (exact.dq, grads.dq),
            (keys.dk, grads.dk),
            (keys.dv, grads.dv),
            (keys.db, grads.dkey_bias[..., None]),
        ):
            want = sp.host(measure.take_rows(sp, want, rows))
            assert relative_error(sp.host(got), want) <= 10 * REORDERED[np.dtype(np.float64)]


@ARRAY_CODE
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # as where the library calls
@pytest.mark.parametrize("causal", [False, True])
def test_what_is_known_is_not_verified_again(causal, backend, rng, monkeypatch):
    sp, heads, dout = some_heads(backend, rng, causal=causal)
    auto = lg.Auto(1e-1)
    out, _, reports = tolerance.forward_within(sp, heads, auto)
    assert [report["engine"]["kind"] for report in reports] == ["Polynomial", "Exact"]
    monkeypatch.setattr(measure, "exact_rows", None)
    again, parts, known = tolerance.forward_within(sp, heads, auto, known=reports)
    assert known == reports
    assert np.array_equal(sp.host(out), sp.host(again))
    monkeypatch.undo()
    grads, reports = tolerance.backward_within(sp, heads, 1, auto, parts, known, again, dout)
    assert set(reports[0]["errors"]) == {"out", "dq", "dk", "dv", "dkey_bias"}
    assert reports[1]["errors"] == {}
    assert grads.dq.shape == heads.q.shape


@ARRAY_CODE
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # as where the library calls
@pytest.mark.parametrize("engine", [lg.Polynomial(degree=1, coefficients="fitted"), lg.Landmark(rank=8)])
@pytest.mark.parametrize("causal", [False, True])
def test_heads_of_one_engine_run_together_and_miss_one_by_one(causal, engine, backend, rng, monkeypatch):
    # Of the first five heads of one engine, the second errs too much, and the fourth has no answer.
    inputs = draw(rng, n=1500, heads=(6,), d=4, bias=True, size=0.1)
    inputs["q"][1] *= 55
    inputs["q"][3] *= 1e4
    arrays = {name: backend.array(x) for name, x in inputs.items()}
    dout = arrays.pop("dout")
    sp, heads = device.space_of(dout), Heads(*(arrays.get(x) for x in ("q", "k", "v", "key_bias")), causal, 0.5)
    given = [unplanned(engine)] * 5 + [unplanned(lg.Exact())]
    calls, forward = [], engines.forward

    def counted(sp, own, heads):
        calls.append((type(own[0]), heads.first, heads.count))
        return forward(sp, own, heads)

    monkeypatch.setattr(engines, "forward", counted)
    auto = lg.Auto(5e-2)
    out, parts, reports = tolerance.forward_within(sp, heads, auto, given)
    one_by_one = [(type(engine), i, 1) for i in range(5)]
    exactly = [(lg.Exact, 1, 1), (lg.Exact, 3, 1), (lg.Exact, 5, 1)]
    assert calls == [(type(engine), 0, 5), *one_by_one, *exactly]
    assert [report["missed"] is not None for report in reports] == [False, True, False, True, False, False]
    assert "errs by" not in reports[3]["missed"]
    assert "errs by" in reports[1]["missed"]

    # The same without the head that has no answer: they ran together, and what is left of that is taken apart.
    some = heads_at(sp, heads, [0, 1, 2, 4, 5])
    up = chosen(sp, dout, [0, 1, 2, 4, 5])
    calls.clear()
    out, parts, reports = tolerance.forward_within(sp, some, auto, [*given[:4], given[5]])
    assert calls == [(type(engine), 0, 4), (lg.Exact, 1, 1), (lg.Exact, 4, 1)]
    assert sorted((part.start, part.end) for part in parts) == [(0, 1), (1, 2), (2, 4), (4, 5)]
    grads, known = tolerance.backward_within(sp, some, 1, auto, parts, reports, out, up)
    assert [len(dict(report["errors"])) for report in known] == [5, 0, 5, 5, 0]
    for i in (0, 2, 3):
        want, saved = forward(sp, [engine], some.part(i, i + 1))
        wanted = engines.backward(sp, some.part(i, i + 1), saved, want, up[i : i + 1, ...])
        assert relative_error(sp.host(out[i, ...]), sp.host(want[0, ...])) <= REORDERED[np.dtype(np.float64)]
        for name in ("dq", "dk", "dv", "dkey_bias"):
            got, own = sp.host(getattr(grads, name)[i, ...]), sp.host(getattr(wanted, name)[0, ...])
            assert relative_error(got, own) <= 10 * REORDERED[np.dtype(np.float64)]


@pytest.mark.parametrize("cuts", [(0, 9), (0, 3, 9), (0, 4, 5, 9), (0, 1, 8, 9)])
def test_gradients_of_heads_in_any_parts_add_up_to_those_of_key_heads(cuts, rng):
    inputs = draw(rng, n=5, heads=(9,), bias=True)
    sp, heads = device.space_of(inputs["q"]), Heads(*(inputs[x] for x in ("q", "k", "v", "key_bias")), False, 0.5)
    grads = Grads(*(rng.standard_normal(inputs[x].shape) for x in ("q", "k", "v", "key_bias")))
    sums = tolerance._Sums(sp, heads, 3)
    for start, end in itertools.pairwise(cuts):
        sums.add(sp, start, Grads(*(getattr(grads, x)[start:end] for x in ("dq", "dk", "dv", "dkey_bias"))))
    want = engines.add_groups(sp, grads, 3)
    for name in ("dq", "dk", "dv", "dkey_bias"):
        assert relative_error(getattr(sums.grads, name), getattr(want, name)) <= REORDERED[np.dtype(np.float64)]


@pytest.mark.filterwarnings("ignore:(invalid value|overflow):RuntimeWarning")  # as where the library calls
def test_heads_without_an_answer_keep_nothing_alive(rng):
    def run():
        inputs = draw(rng, n=300, heads=(2,), d=4, size=0.1)
        inputs["q"] *= 1e4
        heads = Heads(inputs["q"], inputs["k"], inputs["v"], None, False, 0.5)
        given = [unplanned(lg.Polynomial(degree=1))] * 2
        out, _, reports = tolerance.forward_within(device.space_of(heads.q), heads, lg.Auto(5e-2), given)
        assert all("denominator" in report["missed"] for report in reports)
        return [weakref.ref(x) for x in (heads.q, heads.k, heads.v, out)]

    # Not until somebody looks for cycles: a GPU's memory makes nobody look.
    gc.disable()
    try:
        assert all(x() is None for x in run())
    finally:
        gc.enable()


def with_numbers(heads, kind):
    """An engine for each of three heads, which are the same but for numbers."""
    if kind == "polynomials":
        return [
            lg.Polynomial(coefficients=(1.01, 0.98, 0.5), shift=([0.1, 0, 0, 0], [0, 0.2, 0, 0])),
            lg.Polynomial(coefficients=(0.99, 1.02, 0.51)),
            lg.Polynomial(),
        ]
    options = {"rank": 8, "causal": False, "scale": heads.scale}
    return [
        lg.Landmark(
            seed=i,
            constants=lg.LandmarkConstants(
                **core.landmark_constants(
                    *(np.asarray(x[i]) for x in (heads.q, heads.k, heads.v)), None, seed=i, head=i, **options
                )
            ),
        )
        for i in range(3)
    ]


@pytest.mark.filterwarnings("ignore:(invalid value|divide by zero):RuntimeWarning")  # as where the library calls
@pytest.mark.parametrize("kind", ["polynomials", "landmarks"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("numbers", [1, 1 << 22])
def test_heads_whose_engines_differ_in_numbers_run_together(numbers, causal, kind, rng, monkeypatch):
    inputs = draw(rng, n=1500, heads=(3,), d=4, size=0.2)
    sp = device.Space(device.space_of(inputs["q"]).xp, "cpu", numbers)
    heads = Heads(inputs["q"], inputs["k"], inputs["v"], None, causal, 0.5)
    own = with_numbers(heads, kind)
    calls, forward = [], engines.forward
    monkeypatch.setattr(engines, "forward", lambda sp, own, heads: calls.append(own) or forward(sp, own, heads))
    given = [unplanned(engine) for engine in own]
    auto = lg.Auto(0.5)
    out, parts, reports = tolerance.forward_within(sp, heads, auto, given)
    assert calls == [own]
    assert [plan.engine for plan in head_plans(reports)] == own
    grads, _ = tolerance.backward_within(sp, heads, 1, auto, parts, reports, out, inputs["dout"])
    assert calls == [own]
    for i, engine in enumerate(own):
        alone = heads.part(i, i + 1)
        want, saved = forward(sp, [engine], alone)
        wanted = engines.backward(sp, alone, saved, want, inputs["dout"][i : i + 1])
        assert relative_error(out[i], want[0]) <= REORDERED[np.dtype(np.float64)]
        for name in ("dq", "dk", "dv"):
            got = getattr(grads, name)[i]
            assert relative_error(got, getattr(wanted, name)[0]) <= 10 * REORDERED[np.dtype(np.float64)]


def test_rates_from_small_arrays_are_not_kept_for_calls_with_more_room(monkeypatch):
    sides = []

    def on_device(sp, work, side, dtype):
        sides.append(side)
        return taken

    rates.set_rates(None)
    monkeypatch.setattr(rates, "_measured", {})
    monkeypatch.setattr(rates, "_on_device", on_device)
    usual = device.space_of(np.ones(1))

    def largest(numbers):
        sides.clear()
        rates.rates_of(device.Space(usual.xp, usual.device, numbers), np.float32)
        return max(sides, default=None)

    taken = 1e-6
    # In a second try after memory ran out, in one like it, as usual, again, and with all the room that there may be.
    assert [largest(1 << e) for e in (12, 12, 22, 22, 12, 26, 26)] == [256, None, 2048, None, None, 4096, None]
    rates._measured.clear()
    taken = 1e-2
    assert [largest(1 << e) for e in (12, 26)] == [256, None]


@pytest.mark.parametrize("causal", [False, True])
def test_coefficients_fitted_to_a_sample_are_those_of_the_engine(causal, rng):
    inputs = draw(rng, n=3000, d=4, size=0.7)
    q, k, v = (inputs[x] for x in "qkv")
    every = np.arange(1024), np.arange(1024)
    rows = every if causal else (core.stratified(3000, 256, 0), core.stratified(3000, 256, 1))
    options = {"degree": 3, "query_shift": [], "key_shift": [], "causal": causal, "scale": 0.5}
    a = core.fitted_coefficients(q[rows[0]], k[rows[1]], None, **options)
    engine = lg.Polynomial(degree=3, coefficients="fitted")
    want = lg.attention(q, k, v, engine=engine, causal=causal, scale=0.5)
    got = lg.attention(q, k, v, engine=lg.Polynomial(degree=3, coefficients=a), causal=causal, scale=0.5)
    assert relative_error(got[-1000:], want[-1000:]) <= SAME_MODEL


def test_samples_that_do_not_fit_together_are_errors():
    x = np.ones((3, 2))
    options = {"degree": 1, "causal": False, "scale": 1.0}
    with pytest.raises(lg.ArgumentError, match="expected at least 1"):
        core.draw_rows(np.empty((1, 0)), 3, 0)
    with pytest.raises(lg.ShapeError, match="expected 1"):
        core.estimate_error(np.ones((1, 4)), np.ones(2), 3)
    with pytest.raises(lg.ShapeError, match="q, k and v have shapes"):
        core.fitted_coefficients(x, x[:, :1], None, **options, query_shift=[], key_shift=[])
    with pytest.raises(lg.ShapeError, match="shift has 1 numbers"):
        core.fitted_coefficients(x, x, None, **options, query_shift=[1.0], key_shift=[1.0])
    with pytest.raises(lg.DenominatorError, match="head 5 has no key"):
        core.landmark_constants(x, x, x, np.full(3, -np.inf), rank=2, seed=0, causal=False, scale=1.0, head=5)


# Keys of sixteen, first and last, that are looked at, of scores with a residue under any polynomial of degree 1.
LOOKED_AT = np.flatnonzero(np.isin(np.arange(4096) % 16, (0, 15)))
SCORES = np.resize([-1.0, 0.5, 1.0, 0.5, -1.0], 4096)


def weights_of(backend, engine, causal):
    """What 4096 queries, all equal, make of the keys that are looked at, relative to those of ``exp``."""
    q, k, v = np.ones((4096, 1)), SCORES[:, None], np.eye(4096)[:, LOOKED_AT]
    weights = lg.attention(*map(backend.array, (q, k, v)), engine=engine, causal=causal, scale=1.0)
    return backend.numpy(weights) / np.exp(SCORES[LOOKED_AT])


@pytest.mark.parametrize("backend", [GPU_NUMPY], indirect=True, ids=lambda backend: backend.name)
@pytest.mark.parametrize("causal", [False, True])
def test_both_paths_meet_the_same_keys_one_by_one(causal, backend, monkeypatch):
    polynomials = [lg.Polynomial(1, x, window=64) for x in ("taylor", "fitted", (1.0, 0.9))]
    own = [weights_of(backend, engine, causal) for engine in polynomials]
    monkeypatch.undo()
    core_s = [weights_of(RUST, engine, causal) for engine in polynomials]
    queries = np.arange(4096)[:, None]
    for engine, got, want in zip(polynomials, own, core_s, strict=True):
        assert relative_error(got, want) <= SAME_MODEL
        if not causal:
            continue
        # A query meets the last key that it sees by exp, and far ones by more or less than that.
        last = np.searchsorted(LOOKED_AT, queries, side="right") - 1
        near = [np.abs(x / np.take_along_axis(x, last, axis=1) - 1) < 1e-3 for x in (got, want)]
        assert np.array_equal(near[0], near[1])
        # What a plan's model takes for near.
        expected = scan.Near(core.WINDOW, from_prefix=engine.coefficients == "fitted")
        starts = [scan.near_start(expected, i) for i in range(4096)]
        assert np.array_equal(near[1], (np.array(starts)[:, None] <= LOOKED_AT) & (queries >= LOOKED_AT))
