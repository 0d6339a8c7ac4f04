"""`Polynomial.from_bound`: the smallest degree with a proven error, and the error proven."""

import decimal
import math
import re
from decimal import Decimal

import numpy as np
import pytest
from limits import BOUND, ROUNDING

import lingrad_rs as lg
from lingrad_rs import Polynomial
from lingrad_rs.spec.engines import taylor_error

BOUNDS = [1e-6, 1e-3, 0.05, 0.3, 1.1, 2.5, 6.0]


def on_a_grid(degree, bound, points=201):
    """``max |p(s) exp(-s) - 1|`` over evenly spaced s, with 120 digits."""
    with decimal.localcontext() as context:
        context.prec = 120
        largest = Decimal(0)
        for i in range(points):
            s = Decimal(bound) * (2 * i - points + 1) / (points - 1)
            p = sum((s**j / math.factorial(j) for j in range(1, degree + 1)), Decimal(1))
            largest = max(largest, abs(p * (-s).exp() - 1))
        return float(largest)


def factor(degree, bound):
    eps = on_a_grid(degree, bound)
    return 2 * eps / (1 - eps) if eps < 1 else math.inf


@pytest.mark.parametrize("degree", [1, 2, 3, 6, 9])
def test_the_error_of_the_series_is_the_greatest_on_a_grid(degree):
    for bound in BOUNDS:
        want = on_a_grid(degree, bound)
        got = taylor_error(degree, bound)
        if want >= 1:
            assert got == math.inf, bound
        else:
            assert got == pytest.approx(want, rel=BOUND, abs=0), bound


@pytest.mark.parametrize("error", [0.9, 1e-2, 1e-5, 1e-12])
def test_the_degree_is_the_smallest_that_meets_the_error(error):
    for bound in BOUNDS:
        degree = Polynomial.from_bound(error, bound).degree
        assert factor(degree, bound) <= error, bound
        assert degree == 1 or factor(degree - 1, bound) > error, bound


@pytest.mark.parametrize(("bound", "degree"), [(1e-3, 1), (0.05, 2), (0.5, 3), (2.0, 8)])
def test_a_little_less_than_a_degree_gives_takes_the_next(bound, degree):
    error = factor(degree, bound)
    assert Polynomial.from_bound(error * (1 + BOUND), bound).degree == degree
    assert Polynomial.from_bound(error * (1 - BOUND), bound).degree == degree + 1


def test_scores_that_are_almost_nothing_take_degree_1():
    assert Polynomial.from_bound(1e-300, 1e-200).degree == 1
    assert Polynomial.from_bound(1e-12, 5e-324).degree == 1


def test_options_are_those_of_the_engine():
    options = {"gradient": "consistent", "shift": "mean", "diagonal": "polynomial", "window": 7}
    assert Polynomial.from_bound(1e-3, 0.5, **options) == Polynomial(degree=4, coefficients="taylor", **options)


def exact(q, k, v, scale, causal, key_bias=0.0):
    s = scale * q @ k.T + key_bias
    if causal:
        s[np.triu_indices(len(q), 1)] = -np.inf
    weights = np.exp(s - s.max(axis=1, keepdims=True))
    return weights @ v / weights.sum(axis=1, keepdims=True)


def bounded(rng, n, d, bound, scale):
    """Queries and keys of equal norms whose scores reach ``bound``: every other one is on one line, either way."""
    q, k = rng.standard_normal((2, n, d))
    line = rng.standard_normal(d)
    for x in (q, k):
        x[::2] = line * rng.choice([-1.0, 1.0], (len(x[::2]), 1))
        x *= np.sqrt(bound / scale) / np.linalg.norm(x, axis=1, keepdims=True)
    return q, k


@pytest.mark.parametrize(
    ("causal", "diagonal"),
    [(False, "exact"), (True, "exact"), (True, "polynomial")],
    ids=["full", "exact", "polynomial"],
)
@pytest.mark.parametrize("bound", [0.05, 0.4, 1.5])
def test_no_entry_errs_by_more_than_the_bound(rng, bound, causal, diagonal):
    n, d, scale = 1500, 4, 0.25
    q, k = bounded(rng, n, d, bound, scale)
    v = rng.choice([-3.0, 3.0], (n, 5)) * rng.random((n, 5)) ** 0.2
    want = exact(q, k, v, scale, causal)
    for error in (0.5, 1e-2, 1e-5):
        engine = Polynomial.from_bound(error, bound, diagonal=diagonal, window=16)
        out = lg.attention(q, k, v, engine=engine, causal=causal, scale=scale)
        assert ROUNDING < abs(out - want).max() / abs(v).max() <= error, error


@pytest.mark.parametrize("degree", [1, 2, 5])
def test_two_keys_at_the_ends_come_near_the_bound(degree):
    """With scores -R and R, and values for and against: nothing much smaller could be promised."""
    bound = 0.05
    error = factor(degree, bound) * (1 + BOUND)
    engine = Polynomial.from_bound(error, bound)
    assert engine.degree == degree
    q, k, v = np.array([[1.0]]), np.array([[-bound], [bound]]), np.array([[1.0], [-1.0]])
    worst = abs(lg.attention(q, k, v, engine=engine, scale=1.0) - exact(q, k, v, 1.0, False)).max()
    # Of (1 + delta) at either end the odd degrees have equal signs, of which the difference is of one order more.
    assert worst <= error
    if degree % 2 == 0:
        assert worst >= error / 4


def test_biases_and_what_is_subtracted_do_not_count(rng):
    n, d, scale, error = 400, 3, 0.5, 1e-4
    q, k = bounded(rng, n, d, 0.3, scale)
    v, bias = rng.standard_normal((n, 2)), 5 * rng.standard_normal(n)
    bias[::7] = -np.inf
    q += [3.0, -2.0, 1.0]
    k += [1.0, 4.0, -3.0]
    scores = scale * (q - q.mean(axis=0)) @ (k - k.mean(axis=0)).T
    assert abs(scores).max() < abs(scale * q @ k.T).max() / 10
    # A mean may be that of all keys or of those that are not removed.
    engine = Polynomial.from_bound(error, abs(scores).max() * 1.2, shift="mean")
    out = lg.attention(q, k, v, engine=engine, scale=scale, key_bias=bias)
    assert abs(out - exact(q, k, v, scale, False, bias)).max() <= error * abs(v).max()


@pytest.mark.parametrize("error", [0, 1, -1e-3, 2.0])
def test_an_error_outside_of_0_to_1_is_refused(error):
    with pytest.raises(lg.ToleranceError, match=r"error is .*; expected a number in \(0, 1\)"):
        Polynomial.from_bound(error, 0.1)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("1e-3", 0.1), {}, "error is '1e-3'; expected a finite number"),
        ((math.nan, 0.1), {}, "error is nan; expected a finite number"),
        ((1e-3, 0), {}, "score_bound is 0.0; expected a number above 0"),
        ((1e-3, -1.0), {}, "score_bound is -1.0; expected a number above 0"),
        ((1e-3, math.inf), {}, "score_bound is inf; expected a finite number"),
        ((1e-3, True), {}, "score_bound is True; expected a finite number"),
        ((1e-3, 100), {}, "score_bound is 100.0 and error is 0.001; expected what a degree of at most 64 meets"),
        ((1e-3, 1e300), {}, "score_bound is 1e+300 and error is 0.001; expected what a degree of at most 64 meets"),
        ((1e-300, 1.0), {}, "score_bound is 1.0 and error is 1e-300; expected what a degree of at most 64 meets"),
        ((1e-3, 0.1), {"degree": 2}, "degree is 2; expected none, as from_bound chooses it"),
        ((1e-3, 0.1), {"coefficients": "fitted"}, "coefficients is 'fitted'; expected none, as from_bound chooses it"),
        ((1e-3, 0.1), {"window": -1}, "window is -1; expected an integer >= 0"),
    ],
)
def test_bad_input(arguments, options, message):
    with pytest.raises(lg.ArgumentError, match=re.escape(message)):
        Polynomial.from_bound(*arguments, **options)
