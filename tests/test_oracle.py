"""``out`` and every gradient against the float64 oracle: both dtypes, all engines, sizes around those of tiles.

Numbers of keys, heads that share them, biases, scales and narrow heads: see test_properties, which draws them.
"""

import numpy as np
import pytest
from helpers import assert_close, cast, draw, oracle_attention, relative_error, run_attention
from limits import FITTED, ONE_HOT, ORACLE, WINDOWED_POLYNOMIAL
from oracle import taylor

import lingrad_rs as lg
from lingrad_rs import Exact, Polynomial

SIZES = (1, 2, 63, 64, 65, 1000)  # n < r where n is 1 or 2: degree 2 with d = 5 has r = 21


def polynomial(degree=2, **options):
    """The polynomial everywhere, near the diagonal too."""
    return Polynomial(degree=degree, diagonal="polynomial", **options)


ENGINES = {
    "exact": Exact(),
    "closed form": polynomial(),
    "consistent": polynomial(gradient="consistent"),
    "degree 1": polynomial(1),
    "degree 3, consistent": polynomial(3, gradient="consistent"),
    "degree 4": polynomial(4),
    "given coefficients": polynomial(coefficients=(1.5, 0.7, 0.6)),
    "given coefficients, consistent": polynomial(coefficients=(1.5, 0.7, 0.6), gradient="consistent"),
}
SHIFTED = {
    "shift, closed form": Polynomial(shift="mean"),
    "shift, consistent": Polynomial(shift="mean", gradient="consistent"),
    "shift, degree 4, consistent": Polynomial(degree=4, shift="mean", gradient="consistent"),
}
SOME = {"exact": Exact(), "closed form": polynomial(), "shift": Polynomial(shift="mean", gradient="consistent")}
FITTED_ENGINES = {
    "fitted": Polynomial(coefficients="fitted"),
    "fitted, degree 4": Polynomial(degree=4, coefficients="fitted"),
    "fitted, shift, consistent": Polynomial(coefficients="fitted", shift="mean", gradient="consistent"),
}


def assert_matches_oracle(backend, dtype, inputs, engine, *, limits=ORACLE, **options):
    inputs = cast(inputs, dtype)
    got = run_attention(backend, inputs, engine=engine, **options)
    assert all(x.dtype == dtype for x in got.values())
    assert_close(got, oracle_attention(inputs, engine, **options), limits[dtype])


def engines(table):
    return pytest.mark.parametrize("engine", table.values(), ids=table.keys())


def small_enough(engine):
    """The standard deviation of queries and keys where the engine's denominators are safely positive."""
    return 0.8 if isinstance(engine, Exact) or engine.degree % 2 == 0 else 0.4


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("causal", [False, True])
@engines(ENGINES)
def test_every_engine_matches_the_oracle(engine, causal, n, backend, dtype, rng):
    inputs = draw(rng, n=n, size=small_enough(engine))
    assert_matches_oracle(backend, dtype, inputs, engine, causal=causal)


@pytest.mark.parametrize("causal", [False, True])
@engines({name: ENGINES[name] for name in ("exact", "closed form", "consistent")})
def test_long_sequences_match_the_oracle(engine, causal, backend, dtype, rng):
    assert_matches_oracle(backend, dtype, draw(rng, n=2500), engine, causal=causal)


@pytest.mark.parametrize("n", SIZES)
@engines(SHIFTED)
def test_shifted_engine_matches_the_oracle(engine, n, backend, dtype, rng):
    inputs = draw(rng, n=n)
    inputs["q"] += 0.5
    inputs["k"] -= 1.0
    assert_matches_oracle(backend, dtype, inputs, engine)


@pytest.mark.parametrize("bias", [False, True])
@engines(FITTED_ENGINES)
def test_fitted_engine_matches_a_fit_of_one_s_own(engine, bias, backend, dtype, rng):
    # Up to 256 tokens the engine's sample is all of them.
    inputs = draw(rng, n=200, m=250, bias=bias, size=0.6)
    assert_matches_oracle(backend, dtype, inputs, engine, limits=FITTED)


# With d = 12, degree 4 has 1820 features: other tiles and blocks than below 1024.
@pytest.mark.parametrize(("d", "dv"), [(12, 3), (16, 40)])
@pytest.mark.parametrize("causal", [False, True])
@engines(ENGINES)
def test_wide_heads_match_the_oracle(engine, causal, d, dv, backend, dtype, rng):
    inputs = draw(rng, n=300, d=d, dv=dv, size=small_enough(engine) * min(1, (5 / d) ** 0.25))
    assert_matches_oracle(backend, dtype, inputs, engine, causal=causal)


def test_exact_engine_takes_scores_in_the_thousands(backend, dtype, rng):
    inputs = draw(rng, n=80, size=1.0)
    inputs["q"] *= 300
    got = run_attention(backend, cast(inputs, dtype), engine=Exact(), scale=8.0)
    want = oracle_attention(cast(inputs, dtype), Exact(), scale=8.0)
    assert relative_error(got["out"], want["out"]) <= ONE_HOT[dtype]
    assert all(np.isfinite(x).all() for x in got.values())


@pytest.mark.parametrize("causal", [False, True])
@engines(
    {"exact": Exact(), "closed form": polynomial()} | {"fitted, exact diagonal": Polynomial(coefficients="fitted")}
)
def test_no_queries_and_no_keys_give_empty_results(engine, causal, backend, dtype, rng):
    inputs = cast(draw(rng, n=0, heads=(2,)), dtype)
    got = run_attention(backend, inputs, engine=engine, causal=causal)
    shapes = {name: x.shape for name, x in got.items()}
    assert shapes == {"out": (2, 0, 3), "dq": (2, 0, 5), "dk": (2, 0, 5), "dv": (2, 0, 3)}


@pytest.mark.parametrize("heads", [((0,), (0,)), ((0, 4), (0, 2))], ids=["no heads", "no batch entries"])
@engines(SOME)
def test_no_heads_give_empty_results(engine, heads, backend, dtype, rng):
    inputs = cast(draw(rng, n=7, heads=heads[0], key_heads=heads[1], bias=True), dtype)
    got = run_attention(backend, inputs, engine=engine)
    assert got["out"].shape == inputs["dout"].shape
    assert all(got[f"d{name}"].shape == inputs[name].shape for name in ("q", "k", "v", "key_bias"))


@engines(SOME)
def test_no_queries_leave_keys_without_gradient(engine, backend, dtype, rng):
    got = run_attention(backend, cast(draw(rng, n=0, m=9), dtype), engine=engine)
    assert got["out"].shape == (0, 3)
    assert got["dk"].shape == (9, 5)
    assert not got["dk"].any()
    assert not got["dv"].any()


@pytest.mark.parametrize("options", [{}, {"degree": 1}, {"gradient": "consistent"}, {"coefficients": "fitted"}])
def test_a_window_over_all_tokens_is_exact_attention(options, backend, dtype, rng):
    inputs = cast(draw(rng, n=300, bias=True, size=1.5), dtype)
    got = run_attention(backend, inputs, engine=Polynomial(window=300, **options), causal=True)
    assert_close(got, oracle_attention(inputs, Exact(), causal=True), ORACLE[dtype])


def near_tokens(backend, engine, n, d):
    """Which keys (n, n) each query meets by exp: seen from outside, with unit values and all scores 1."""
    ones = np.ones((n, d))
    inputs = {"q": ones, "k": ones, "v": np.eye(n), "dout": np.zeros((n, n))}
    weights = run_attention(backend, inputs, engine=engine, causal=True, scale=1 / d)["out"]
    # A query meets itself by exp, so by exp all weights are equal; the polynomial's, sum 1/j!, are smaller.
    middle = (1 + sum(taylor(engine.degree)) / np.e) / 2
    return weights > middle * np.diag(weights)[:, None]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("gradient", ["closed_form", "consistent"])
@pytest.mark.parametrize(("degree", "d", "window"), [(2, 5, 64), (2, 5, 0), (2, 5, 100), (1, 5, 64), (4, 12, 64)])
def test_exact_window_and_polynomial_beyond_match_the_oracle(degree, d, window, gradient, bias, backend, dtype, rng):
    engine = Polynomial(degree=degree, gradient=gradient, window=window)
    inputs = cast(draw(rng, n=400, d=d, bias=bias, size=0.5), dtype)
    near = near_tokens(backend, engine, 400, d)
    assert near[np.tri(400, dtype=bool) & ~np.tri(400, k=-window - 1, dtype=bool)].all()
    assert not near[-1, :200].any()
    got = run_attention(backend, inputs, engine=engine, causal=True)
    assert_close(got, oracle_attention(inputs, engine, causal=True, near=near), ORACLE[dtype])


@pytest.mark.parametrize("gradient", ["closed_form", "consistent"])
@pytest.mark.parametrize("coefficients", ["taylor", "fitted"])
def test_an_exact_window_comes_close_to_exact_attention(coefficients, gradient, backend, dtype, rng):
    inputs = cast(draw(rng, n=2000, size=0.5), dtype)  # fitted: the first 1024 tokens are exact
    engine = Polynomial(coefficients=coefficients, gradient=gradient)
    got = run_attention(backend, inputs, engine=engine, causal=True)
    assert_close(got, oracle_attention(inputs, Exact(), causal=True), WINDOWED_POLYNOMIAL)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("degree", [1, 2, 4])
def test_output_keeps_within_the_a_priori_bound(degree, causal, backend, dtype, rng):
    inputs = cast(draw(rng, n=500, size=0.3), dtype)
    got = run_attention(backend, inputs, engine=Polynomial(degree=degree), causal=causal)["out"]
    want = oracle_attention(inputs, Exact(), causal=causal)["out"]
    reach = max(np.linalg.norm(inputs[name], axis=1).max() for name in "qk") ** 2 / np.sqrt(inputs["q"].shape[1])
    s = np.linspace(-reach, reach, 1000)
    eps = np.abs(np.polynomial.polynomial.polyval(s, taylor(degree)) / np.exp(s) - 1).max()
    assert eps < 1
    assert np.abs(got - want).max() <= 2 * eps / (1 - eps) * np.abs(inputs["v"]).max()


def test_a_wider_window_is_closer_to_exact_attention(backend, rng):
    inputs = draw(rng, n=1000)
    want = oracle_attention(inputs, Exact(), causal=True)
    errors = [
        [relative_error(got[name], want[name]) for name in want]
        for window in (0, 128, 512)
        for got in [run_attention(backend, inputs, engine=Polynomial(window=window), causal=True)]
    ]
    assert np.all(np.diff(errors, axis=0) < 0)


def test_attention_is_the_output_of_attention_vjp(backend, dtype, rng):
    inputs = {name: backend.array(x) for name, x in cast(draw(rng, n=90, bias=True), dtype).items()}
    dout = inputs.pop("dout")
    out, vjp = lg.attention_vjp(**inputs)
    assert np.array_equal(backend.numpy(lg.attention(**inputs)), backend.numpy(out))
    first, second = vjp(dout), vjp(dout)
    assert all(np.array_equal(backend.numpy(a), backend.numpy(b)) for a, b in zip(first, second, strict=True))
