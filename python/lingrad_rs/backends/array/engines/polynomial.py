"""The polynomial engine: ``exp(s)`` replaced by ``p(s) = sum_{j <= g} a_j s^j``.

``p(scale q.k) = phi(q)^T diag(omega_p) phi(k)`` with the monomials up to degree g; `passes` and `scan` make
attention of that. *Closed form*: with ``P' = p``, ``scale p(scale q.k) k`` is the gradient of ``P(scale q.k)`` in q, so
the exact gradient's formula is the derivative through ``P`` and monomials up to degree ``g + 1``. *Consistent*: the
derivative of the forward pass, through ``p`` itself. The one that is differentiated is called the potential.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .... import _lingrad_rs as core
from ....errors import ArgumentError, ShapeError
from ....spec.engines import Polynomial
from ..device import Space
from ..linear import passes, scan
from ..linear.features import Polynomials
from ..linear.monomials import monomials, rank
from ..problem.heads import Grads, Heads, live_keys
from . import sample

__all__ = [
    "Constants",
    "backward",
    "constants",
    "forward",
    "left_out",
    "name",
    "near",
    "numbers",
    "why_not",
    "without_numbers",
]

Array = Any


@dataclass(frozen=True)
class Constants:
    """What heads' data decide before their pass: ``a (heads, g + 1)`` on the host, shifts ``(heads, d)`` or None."""

    coefficients: np.ndarray[Any, Any]
    query_shift: Array | None
    key_shift: Array | None


def name(engine: Polynomial) -> str:
    """What it is called in reports."""
    return f"degree {engine.degree}"


def without_numbers(engine: Polynomial) -> tuple[Polynomial, bool]:
    """What engines of heads that run together have in common: all but coefficients and shifts that are given."""
    coefficients = "fitted" if engine.coefficients == "fitted" else "taylor"
    return replace(engine, coefficients=coefficients, shift="mean" if engine.shift == "mean" else "none"), False


def _potential_degree(engine: Polynomial) -> int:
    return engine.degree + (engine.gradient == "closed_form")


def numbers(engine: Polynomial, d: int, d_v: int) -> int:
    """Numbers of temporary arrays for a block of one head; `ArgumentError` where states are out of reach."""
    degree = _potential_degree(engine)
    r = rank(d, degree)
    if r * (d_v + 1) > core.LARGEST_STATE:
        raise ArgumentError(
            f"degree = {engine.degree} with d = {d} and dv = {d_v} needs more monomials (up to degree {degree}) than "
            'memory holds; use a lower degree, gradient="consistent", or Exact()'
        )
    return 8 * r * (d_v + 1 + scan.BLOCK)


def near(sp: Space, engine: Polynomial, constants: Constants, dtype: Any) -> scan.Near:
    """How keys near the diagonal are met under a mask."""
    fitted = engine.coefficients == "fitted"
    if engine.diagonal == "exact":
        return scan.Near(engine.window, fitted)
    coefficients = sp.asarray(constants.coefficients, dtype)
    return scan.Near(0, fitted, coefficients, engine.gradient == "consistent")


def constants(sp: Space, own: Sequence[Polynomial], heads: Heads) -> Constants:
    """Those of one engine a head, which differ in coefficients and shifts that are given, if in anything."""
    query, key = _shifts(sp, own, heads)
    if own[0].coefficients == "fitted":
        return Constants(_fitted(sp, own[0], heads, query, key), query, key)
    taylor = [1 / math.factorial(j) for j in range(own[0].degree + 1)]
    a = [taylor if engine.coefficients == "taylor" else engine.coefficients for engine in own]
    return Constants(np.array(a, np.float64), query, key)


def _shifts(sp: Space, own: Sequence[Polynomial], heads: Heads) -> tuple[Array | None, Array | None]:
    """``alpha`` and ``beta``, ``(heads, d)`` in the arrays' dtype."""
    dtype = heads.q.dtype
    if own[0].shift == "mean":
        query, key = _mean(sp, heads.q, None), _mean(sp, heads.k, live_keys(sp, heads))
        return sp.astype(query, dtype), sp.astype(key, dtype)
    if all(engine.shift == "none" for engine in own):
        return None, None
    by = np.zeros((2, heads.count, heads.sizes[2]))
    for i, engine in enumerate(own):
        if engine.shift == "none":
            continue
        for side, (name, given) in enumerate(zip(("query", "key"), engine.shift, strict=True)):
            if len(given) != by.shape[2]:
                raise ShapeError(f"shift has {len(given)} numbers for the {name}; expected d = {by.shape[2]}")
            by[side, i] = given
    return sp.asarray(by[0], dtype), sp.asarray(by[1], dtype)


def _mean(sp: Space, x: Array, live: Array | None) -> Array:
    """That of each head's rows ``(heads, rows, d)``, or of its live ones ``(heads, rows)``; float64."""
    xp = sp.xp
    if live is None:
        return xp.sum(x, axis=1, dtype=xp.float64) / x.shape[1]
    total = xp.sum(xp.where(live[..., None], x, xp.zeros_like(x)), axis=1, dtype=xp.float64)
    number = xp.sum(sp.wide(live), axis=1, keepdims=True)
    return total / xp.where(number == 0, xp.ones_like(number), number)


def _fitted(
    sp: Space, engine: Polynomial, heads: Heads, query: Array | None, key: Array | None
) -> np.ndarray[Any, Any]:
    """Coefficients fitted to a sample of each head's scores, by the compiled core."""
    tokens = sample.first(sp, heads) if heads.causal else sample.spread(sp, heads, sample.FIT, 0)
    by = [np.empty((heads.count, 0)) if x is None else sp.host(x) for x in (query, key)]
    return np.stack(
        [
            core.fitted_coefficients(
                own.q,
                own.k,
                own.key_bias,
                degree=engine.degree,
                query_shift=by[0][i].tolist(),
                key_shift=by[1][i].tolist(),
                causal=heads.causal,
                scale=heads.scale,
                head=heads.first + i,
            )
            for i, own in enumerate(tokens)
        ]
    )


def _pass(sp: Space, engine: Polynomial, heads: Heads, constants: Constants) -> passes.Pass:
    a, consistent = constants.coefficients, engine.gradient == "consistent"
    # The constant of P is free: with that of p, Taylor's P continues p.
    potential = a if consistent else np.concatenate([a[:, :1], a / np.arange(1, a.shape[1] + 1)], axis=1)
    degree = _potential_degree(engine)
    tree = monomials(heads.sizes[2], degree)
    weights = [sp.asarray(tree.weights(x, heads.scale), sp.xp.float64) for x in (a, potential)]
    features = Polynomials(tree, engine.degree, weights[0], degree, weights[1], heads.q.dtype)
    through_means = engine.shift == "mean" and consistent
    return passes.make_pass(
        sp, heads, features, constants.query_shift, constants.key_shift, through_means=through_means
    )


def forward(
    sp: Space, engine: Polynomial, heads: Heads, constants: Constants
) -> tuple[Array, Array, Array, Array | None]:
    """``out``, the row factors, and None."""
    run = _pass(sp, engine, heads, constants)
    if heads.causal:
        result = scan.forward(sp, run, near(sp, engine, constants, heads.q.dtype))
    else:
        result = passes.forward(sp, run)
    return *result[:3], None


def backward(
    sp: Space,
    engine: Polynomial,
    heads: Heads,
    constants: Constants,
    row_max: Array,
    row_scale: Array,
    dout: Array,
    delta: Array,
) -> Grads:
    """The gradients, from what the forward pass has left."""
    run = _pass(sp, engine, heads, constants)
    if heads.causal:
        return scan.backward(sp, run, near(sp, engine, constants, heads.q.dtype), row_max, row_scale, dout, delta)
    return passes.backward(sp, run, row_scale, dout, delta)


def left_out(sp: Space, engine: Polynomial, heads: Heads, constants: Constants) -> Array:
    """What the logarithms of row sums in the original scores are more than those of the pass, ``(heads, n)``."""
    return passes.left_out(sp, _pass(sp, engine, heads, constants), heads, constants.key_shift)


def why_not(engine: Polynomial, scale: float, biased: bool) -> str:
    """Why a row whose ``row_scale`` is no use has no answer, and what to do."""
    remedy = (
        f"its scores lie outside the region where this polynomial of degree {engine.degree} resembles exp; use an "
        'even degree with coefficients="taylor", a smaller scale, or Exact()'
    )
    return passes.why_not(scale, biased, remedy)
