"""How accurate the engines are: the table of the specification, long float32 sums, and the measured error."""

import numpy as np
import pytest
from conftest import NUMERIC_BACKENDS
from helpers import cast, draw, relative_error, run_attention
from limits import GROSSLY_WRONG, INTERVALS_THAT_HOLD, LONG_FLOAT32, LONG_GROWTH, SAME_MODEL, TABLE

import lingrad_rs as lg
from lingrad_rs import Exact, Polynomial

# Relative errors of out, dq, dk, dv at n = 2048, d = 12, against exact attention.
PUBLISHED = {
    Polynomial(degree=2, gradient="consistent"): (1.8e-2, 8.7e-2, 8.8e-2, 1.7e-2),
    Polynomial(degree=2): (1.8e-2, 2.3e-2, 2.2e-2, 1.7e-2),
    Polynomial(degree=2, coefficients="fitted"): (1.3e-2, 1.7e-2, 1.6e-2, 1.2e-2),
    Polynomial(degree=4, coefficients="fitted"): (4.7e-4, 7.5e-4, 7.6e-4, 4.2e-4),
}
DRAWS = 12


@pytest.mark.sweep
@pytest.mark.parametrize("backend", NUMERIC_BACKENDS, indirect=True, ids=lambda backend: backend.name)
def test_errors_are_those_of_the_published_table(backend):
    # Entries of q and k are N(0, 1)/sqrt(d) and the scale is 1: scores have standard deviation 1/sqrt(d) = 0.29.
    def errors(seed):
        inputs = draw(np.random.default_rng(seed), n=2048, d=12, dv=12, size=12**-0.5)
        exact = run_attention(backend, inputs, engine=Exact(), scale=1.0)
        runs = (run_attention(backend, inputs, engine=engine, scale=1.0) for engine in PUBLISHED)
        return [[relative_error(got[name], exact[name]) for name in exact] for got in runs]

    measured = np.mean([errors(seed) for seed in range(DRAWS)], axis=0)
    published = np.array(list(PUBLISHED.values()))
    assert np.all(np.abs(measured / published - 1) <= TABLE), measured


def float32_errors(backend, rng, engine, *, n, m):
    """Of out, dq, dk and dv. Values follow keys and dout queries, so that no gradient averages out to nothing."""
    inputs = draw(rng, n=n, m=m, d=8, dv=4, size=0.5)
    inputs["v"] += 1 + inputs["k"][:, :4]
    inputs["dout"] += 1 + inputs["q"][:, :4]
    inputs = cast(inputs, np.float32)
    got = run_attention(backend, inputs, engine=engine)
    want = run_attention(backend, cast(inputs, np.float64), engine=engine)
    return np.array([relative_error(got[name], want[name]) for name in want])


@pytest.mark.parametrize(
    "engine",
    [Exact(), Polynomial(), Polynomial(gradient="consistent")],
    ids=["exact", "degree 2", "degree 2, consistent"],
)
@pytest.mark.parametrize("backend", NUMERIC_BACKENDS, indirect=True, ids=lambda backend: backend.name)
def test_float32_error_does_not_grow_with_the_number_of_keys(engine, backend, rng):
    few, many = (float32_errors(backend, rng, engine, n=16, m=m) for m in (1000, 200_000))
    assert np.all(many <= LONG_FLOAT32), many
    assert np.all(many <= LONG_GROWTH * few), many / few


@pytest.mark.parametrize("engine", [Exact(), Polynomial()], ids=["exact", "degree 2"])
@pytest.mark.parametrize("backend", NUMERIC_BACKENDS, indirect=True, ids=lambda backend: backend.name)
def test_float32_error_does_not_grow_with_the_number_of_queries(engine, backend, rng):
    few, many = (float32_errors(backend, rng, engine, n=n, m=16) for n in (1000, 200_000))
    assert np.all(many <= LONG_FLOAT32), many
    assert np.all(many <= LONG_GROWTH * few), many / few


def test_float32_error_of_a_linear_gradient_does_not_grow_with_the_number_of_tokens(rng):
    def error(n):
        x, dy = (1 + rng.standard_normal((2, n, 8))).astype(np.float32)
        w = rng.standard_normal((8, 8)).astype(np.float32)
        _, pullback = lg.Linear(w=w, b=w[0]).vjp(x)
        grads = pullback(dy)[1]
        want = {"w": x.T.astype(np.float64) @ dy.astype(np.float64), "b": dy.sum(axis=0, dtype=np.float64)}
        return max(relative_error(grads[name], want[name]) for name in want)

    assert error(200_000) <= min(LONG_FLOAT32, LONG_GROWTH * error(1000))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads", [((), ()), ((4,), (2,))], ids=["one head", "grouped heads"])
def test_measured_error_of_all_rows_is_the_error(heads, causal, backend, rng):
    arrays, out, error = output_with_error(backend, rng, heads, causal)
    rows = out.size // out.shape[-1]
    estimate = lg.measure_error(**arrays, out=out, samples=rows, causal=causal)
    assert estimate.rows == rows
    assert lg.measure_error(**arrays, out=out, samples=10 * rows, causal=causal) == estimate
    assert relative_error(estimate.relative, error) <= SAME_MODEL
    assert relative_error(estimate.low, error) <= SAME_MODEL
    assert relative_error(estimate.high, error) <= SAME_MODEL


@pytest.mark.parametrize("causal", [False, True])
def test_measured_error_of_sampled_rows_has_the_error_in_its_interval(causal, backend, rng):
    arrays, out, error = output_with_error(backend, rng, ((4,), (2,)), causal)
    estimates = [lg.measure_error(**arrays, out=out, samples=60, causal=causal, seed=seed) for seed in range(40)]
    # A row may be drawn twice.
    assert all(50 <= e.rows <= 60 and e.low <= e.relative <= e.high for e in estimates)
    inside = sum(e.low <= error <= e.high for e in estimates)
    assert inside >= INTERVALS_THAT_HOLD * len(estimates)
    assert len(set(estimates)) > 1
    assert estimates[3] == lg.measure_error(**arrays, out=out, samples=60, causal=causal, seed=3)


def output_with_error(backend, rng, heads, causal):
    """The arguments of a call, its polynomial output, and that output's error."""
    heads, key_heads = heads
    inputs = draw(rng, n=300, heads=heads, key_heads=key_heads, bias=True)
    exact = run_attention(backend, inputs, engine=Exact(), causal=causal)["out"]
    arrays = {name: backend.array(x) for name, x in inputs.items() if name != "dout"}
    out = lg.attention(**arrays, causal=causal)
    return arrays, out, relative_error(backend.numpy(out), exact)


def test_measured_error_sees_a_wrong_row(backend, rng):
    q, k, v = (backend.array(draw(rng, n=100)[name]) for name in "qkv")
    out = backend.numpy(lg.attention(q, k, v, engine=Exact())).copy()
    assert lg.measure_error(q, k, v, backend.array(out), samples=100).relative <= SAME_MODEL
    out[57] += 1
    assert lg.measure_error(q, k, v, backend.array(out), samples=100).relative >= GROSSLY_WRONG
