"""What is known of every row for nothing or nearly: guides, one number a row, that say where errors may sit.

With ``C_y`` the covariance of the other side's rows, weighted by ``e^b`` where they are keys::

    spread_i   = scale^2 x_i^T C_y x_i               the variance of row i's scores over the other side
    leverage_i = (x_i - mean)^T C_x^-1 (x_i - mean)  how unlike the others of its own side the row is

both to the third power: what a polynomial of degree 2 leaves out. The compiled core has the same, and draws by them.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .device import Space
from .heads import Heads, dots

__all__ = ["of_keys", "of_queries"]

Array = Any
Floats = NDArray[np.float64]

_POWER = 3
# Directions in which rows differ by less than the root of this, relative to the others, tell nothing.
_NEGLIGIBLE = 1e-9


def of_queries(sp: Space, heads: Heads) -> list[Floats]:
    """What queries are drawn by before anything is known of results; each ``(heads, n)``, on the host."""
    guides = _of_scores(sp, heads.q, None, heads.k, _key_weights(sp, heads))
    return [np.ones(heads.q.shape[:2]), *guides]


def of_keys(sp: Space, heads: Heads) -> list[Floats]:
    """The same of keys, each ``(heads, m)``; those that a bias removes have zeros."""
    weights = _key_weights(sp, heads)
    even = np.ones(heads.k.shape[:2])
    values = sp.host(dots(sp, heads.v, heads.v))
    if weights is not None:
        on_host = sp.host(weights)
        even = (on_host > 0).astype(np.float64)
        values = np.where(on_host > 0, on_host**2 * np.where(on_host > 0, values, 0.0), 0.0)
    return [even, *_of_scores(sp, heads.k, weights, heads.q, None), values]


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


def _powers(sp: Space, x: Array, weights: Array | None, mean: Array | None, roots: list[Floats | None]) -> Floats:
    """``|(x_i - mean) root|^2`` of every row ``(heads, rows)``, relative to the largest, to the power; on the host."""
    xp = sp.xp
    count, n, d = x.shape
    factors = sp.asarray(np.stack([np.zeros((d, d)) if root is None else root for root in roots]), xp.float64)
    lengths = sp.empty((count, n), xp.float64)
    for a, b in sp.tiles(n, 4 * count * d):
        rows = _rows(sp, x, weights, a, b)
        rows = rows if mean is None else rows - mean
        lengths[:, a:b] = xp.sum(xp.matmul(rows, factors) ** 2, axis=-1)
        if mean is not None and weights is not None:
            lengths[:, a:b] = xp.where(weights[:, a:b] > 0, lengths[:, a:b], xp.zeros_like(lengths[:, a:b]))
    of_rows = sp.host(lengths)
    largest = np.max(of_rows, axis=-1, keepdims=True)
    return (of_rows / np.where(largest > 0, largest, 1.0)) ** _POWER


def _of_scores(sp: Space, x: Array, x_weights: Array | None, y: Array, y_weights: Array | None) -> list[Floats]:
    """Spread and leverage of the rows ``x`` against those of the other side."""
    mean, own = _moments(sp, x, x_weights)
    _, other = _moments(sp, y, y_weights)
    inverses = [None if root is None else np.linalg.inv(root).T for root in _roots(own)]
    return [_powers(sp, x, x_weights, None, _roots(other)), _powers(sp, x, x_weights, mean, inverses)]
