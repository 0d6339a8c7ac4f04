"""What is known of every row for nothing or nearly: guides, one number a row, that say where errors may sit.

The compiled core has the same, in ``guides.rs``, where their formulas stand, and draws by them. Here they are computed
where the arrays are; numbers of rows, one a guide, are copied to the host.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..device import Space
from ..problem.heads import Heads, dots, rows_of_heads, side_by_side

__all__ = ["Known"]

Array = Any
Floats = NDArray[np.float64]
Rows = NDArray[np.int64]

_POWER = 3
# Directions in which rows differ by less than the root of this, relative to the others, tell nothing.
_NEGLIGIBLE = 1e-9
# Heavy rows of one kind.
_HEAVY = 16
# No row's denominator is taken to be more than so many times (in logarithms) Jensen's lower bound.
_ABOVE_JENSEN = 2.0


@dataclass(frozen=True)
class _Side:
    """Rows of one side: their mean ``(heads, 1, d)``; their spread and leverage ``(heads, rows)``, on the host."""

    mean: Array
    spread: Floats
    leverage: Floats


@dataclass(frozen=True)
class Known:
    """What is known of queries and keys.

    Attributes
    ----------
    heads : Heads
    queries, keys : _Side
    weights : array, shape (heads, m), or None
        ``e^b`` relative to the largest.
    values : ndarray, shape (heads, m)
        ``|w_j v_j|^2``.
    """

    heads: Heads
    queries: _Side
    keys: _Side
    weights: Array | None
    values: Floats

    @staticmethod
    def of(sp: Space, heads: Heads) -> Known:
        """Of all these heads. Cost: O((n + m) d^2) time a head."""
        weights = _key_weights(sp, heads)
        of_queries, of_keys = _moments(sp, heads.q, None), _moments(sp, heads.k, weights)
        values = sp.host(dots(sp, heads.v, heads.v))
        if weights is not None:
            w = sp.host(weights)
            values = np.where(w > 0, w * w * np.where(w > 0, values, 0.0), 0.0)
        queries = _side(sp, heads.q, None, of_queries, of_keys[1], heads.scale)
        return Known(heads, queries, _side(sp, heads.k, weights, of_keys, of_queries[1], heads.scale), weights, values)

    def of_queries(self, sp: Space, dout: Floats | None = None) -> list[Floats]:
        """What queries are drawn by, each ``(heads, n)``; ``dout (heads, n)`` holds the squared sizes of gradients."""
        side, (count, n) = self.keys, self.queries.spread.shape
        keys = _first_rows([self.values, side.spread, side.leverage])
        sizes = np.take_along_axis(_squares(sp, self.heads.v), keys, axis=1) * _listed_once(keys)
        heavy = sp.empty((count, n), sp.xp.float64)
        for a, b in sp.tiles(n, 4 * count * (keys.shape[1] + self.heads.sizes[2])):
            rows = np.broadcast_to(np.arange(a, b), (count, b - a))
            squares = self._pairs(sp, rows, keys)
            heavy[:, a:b] = sp.xp.sum(squares * sp.asarray(sizes, sp.xp.float64)[:, None, :], axis=-1)
        of_pairs, spread = sp.host(heavy), _powers(self.queries.spread)
        guides = [np.ones((count, n))]
        if dout is not None:
            guides += [dout, _times(spread, dout), _times(of_pairs, dout)]
        return [*guides, spread, _powers(self.queries.leverage), of_pairs]

    def of_keys(self, sp: Space, dout: Floats) -> list[Floats]:
        """What keys are drawn by, each ``(heads, m)``; those that a bias removes have zeros."""
        side, (count, m) = self.queries, self.keys.spread.shape
        queries = _first_rows([dout, side.spread, side.leverage])
        sizes = np.take_along_axis(dout, queries, axis=1) * _listed_once(queries)
        heavy = sp.empty((count, m), sp.xp.float64)
        for a, b in sp.tiles(m, 4 * count * (queries.shape[1] + self.heads.sizes[2])):
            rows = np.broadcast_to(np.arange(a, b), (count, b - a))
            squares = self._pairs(sp, queries, rows)
            heavy[:, a:b] = sp.xp.sum(squares * sp.asarray(sizes, sp.xp.float64)[..., None], axis=1)
        of_pairs, spread = sp.host(heavy), _powers(self.keys.spread)
        even = np.ones((count, m)) if self.weights is None else (sp.host(self.weights) > 0).astype(np.float64)
        products = [_times(spread, self.values), _times(of_pairs, self.values)]
        return [even, _powers(self.keys.leverage), *products, self.values, spread, of_pairs]

    def _pairs(self, sp: Space, queries: Rows, keys: Rows) -> Array:
        """``(f_ij e_ij)^2`` of some queries and keys of each head, ``(heads, queries, keys)``."""
        xp, heads = sp.xp, self.heads
        which = range(heads.count)
        q, k = (sp.wide(rows_of_heads(sp, x, which, rows)) for x, rows in ((heads.q, queries), (heads.k, keys)))
        above = heads.scale * xp.matmul(q, xp.matrix_transpose(k) - xp.matrix_transpose(self.keys.mean))
        log_mass = np.minimum(0.5 * np.take_along_axis(self.queries.spread, queries, axis=1), _ABOVE_JENSEN)
        log_weights = np.zeros((heads.count, keys.shape[1]))
        total = np.full((heads.count, 1), float(heads.sizes[1]))
        if self.weights is not None:
            on_host = sp.host(self.weights)
            total = np.sum(on_host, axis=1, keepdims=True)
            chosen = np.take_along_axis(on_host, keys, axis=1)
            log_weights = np.where(chosen > 0, np.log(np.where(chosen > 0, chosen, 1.0)), -np.inf)
        logs = above + sp.asarray(log_weights, xp.float64)[:, None, :]
        logs = logs - sp.asarray(np.log(total) + log_mass, xp.float64)[..., None]
        # Of removed keys, and where something is infinite, nothing is known.
        seen = sp.asarray(np.isfinite(log_weights), xp.bool)[:, None, :]
        if heads.causal:
            seen = seen & sp.asarray(keys[:, None, :] <= queries[..., None], xp.bool)
        f = xp.exp(xp.where(seen & (logs < 0), logs, xp.zeros_like(logs)))
        left_out = above**2
        left_out = xp.where(left_out < 4.0, left_out**_POWER / 36.0, sp.full((), 2.0, xp.float64))
        left_out = xp.where(left_out < 1.0, left_out, xp.ones_like(left_out))
        return xp.where(seen, f * f * left_out, xp.zeros_like(logs))


def _first_rows(guides: Sequence[Floats]) -> Rows:
    """The rows of each head that come first by any of some guides, in order; the last fills up."""
    heads = zip(*(np.argsort(-guide, axis=1, kind="stable")[:, :_HEAVY] for guide in guides), strict=True)
    positive = [
        [of[of_guide[h][of] > 0] for of, of_guide in zip(lists, guides, strict=True)] for h, lists in enumerate(heads)
    ]
    rows = [np.unique(np.concatenate(lists)) for lists in positive]
    return side_by_side([x if len(x) else np.zeros(1, np.int64) for x in rows])


def _listed_once(rows: Rows) -> Floats:
    """1 for rows that are in a list for the first time, 0 for those that fill up."""
    once = np.ones(rows.shape)
    once[:, 1:] = rows[:, 1:] != rows[:, :-1]
    return once


def _times(a: Floats, b: Floats) -> Floats:
    """Products, each factor relative to its largest."""
    return _relative(a) * _relative(b)


def _powers(guide: Floats) -> Floats:
    """Relative to the largest, so that nothing overflows, to the power that errors grow with."""
    return _relative(guide) ** _POWER


def _relative(guide: Floats) -> Floats:
    largest = np.max(guide, axis=-1, keepdims=True, initial=0.0)
    return guide / np.where(largest > 0, largest, 1.0)


def _squares(sp: Space, x: Array) -> Floats:
    """``|x_i|^2`` on the host."""
    return sp.host(dots(sp, x, x))


def _key_weights(sp: Space, heads: Heads) -> Array | None:
    """``e^b``, relative to the largest."""
    if heads.key_bias is None:
        return None
    bias = sp.wide(heads.key_bias)
    largest = sp.xp.max(bias, axis=-1, keepdims=True)
    none = largest == -math.inf
    return sp.xp.exp(sp.xp.where(none, sp.xp.zeros_like(bias), bias - sp.xp.where(none, bias[:, :1], largest)))


def _rows(sp: Space, x: Array, weights: Array | None, start: int, end: int) -> Array:
    """Rows in float64; zeros in place of those whose weight is 0."""
    rows = sp.wide(x[:, start:end, :])
    if weights is None:
        return rows
    return sp.xp.where(weights[:, start:end, None] > 0, rows, sp.xp.zeros_like(rows))


def _moments(sp: Space, x: Array, weights: Array | None) -> tuple[Array, Floats]:
    """The weighted mean ``(heads, 1, d)``, and the covariance ``(heads, d, d)`` on the host."""
    xp = sp.xp
    count, n, d = x.shape
    weighted = lambda rows, a, b: rows if weights is None else rows * weights[:, a:b, None]  # noqa: E731
    total = sp.full((count, 1, 1), float(n), xp.float64)
    if weights is not None:
        total = xp.sum(weights, axis=-1)[:, None, None]
    mean = sp.zeros((count, 1, d), xp.float64)
    steps = list(sp.tiles(n, 4 * count * d))
    for a, b in steps:
        mean = mean + xp.sum(weighted(_rows(sp, x, weights, a, b), a, b), axis=1, keepdims=True) / total
    covariance = sp.zeros((count, d, d), xp.float64)
    for a, b in steps:
        rows = _rows(sp, x, weights, a, b) - mean
        covariance = covariance + xp.matmul(xp.matrix_transpose(rows), weighted(rows, a, b) / total)
    return mean, sp.host(covariance)


def _roots(covariance: Floats) -> list[Floats | None]:
    """The lower triangular root of each covariance, which may lack directions."""
    roots: list[Floats | None] = []
    for one in covariance:
        trace = float(np.trace(one))
        if not (math.isfinite(trace) and trace > 0):
            roots.append(None)
            continue
        try:
            roots.append(np.linalg.cholesky(one + _NEGLIGIBLE * trace * np.eye(len(one))))
        except np.linalg.LinAlgError:
            roots.append(None)
    return roots


def _lengths(sp: Space, x: Array, weights: Array | None, mean: Array | None, roots: list[Floats | None]) -> Floats:
    """``|(x_i - mean) root|^2`` of every row ``(heads, rows)``, on the host; zeros where there is no root."""
    xp = sp.xp
    count, n, d = x.shape
    factors = sp.asarray(np.stack([np.zeros((d, d)) if root is None else root for root in roots]), xp.float64)
    lengths = sp.empty((count, n), xp.float64)
    for a, b in sp.tiles(n, 4 * count * d):
        rows = _rows(sp, x, weights, a, b)
        rows = rows if mean is None else rows - mean
        if weights is not None:
            rows = xp.where(weights[:, a:b, None] > 0, rows, xp.zeros_like(rows))
        lengths[:, a:b] = xp.sum(xp.matmul(rows, factors) ** 2, axis=-1)
    return sp.host(lengths)


def _side(sp: Space, x: Array, weights: Array | None, own: tuple[Array, Floats], other: Floats, scale: float) -> _Side:
    """Spread and leverage of rows, from the moments of both sides."""
    inverses = [None if root is None else np.linalg.inv(root).T for root in _roots(own[1])]
    spread = scale * scale * _lengths(sp, x, weights, None, _roots(other))
    return _Side(own[0], spread, _lengths(sp, x, weights, own[0], inverses))
