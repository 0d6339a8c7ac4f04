"""Sums over the keys of some queries, from which the core tells the errors of polynomials of every degree.

With the moments

    U_l = sum_j w_j s'_ij^l [1, v_j, k'_j]        V_l = sum_j w_j s'_ij^l (dout_i.v_j) k'_j

every polynomial's output and dq are linear combinations of them.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .. import measure, tiles
from ..device import Space
from ..measure import Floats, Rows
from ..problem.heads import Heads, live_keys
from .cost import Size

__all__ = ["bounds", "column_sums", "longest", "moments", "rounded", "split"]

Array = Any


def split(sums: Floats) -> tuple[Floats, float, float]:
    """Column sums, the sum of squares, and how many rows."""
    return sums[:-2], float(sums[-2]), float(max(sums[-1], 1))


def column_sums(sp: Space, x: Array, live: Array | None = None) -> Array:
    """Of live rows ``(heads, rows, width)``: column sums, the sum of squares, and how many; ``(heads, width + 2)``."""
    xp = sp.xp
    count, rows, width = x.shape
    sums, squares = sp.zeros((count, width), xp.float64), sp.zeros((count, 1), xp.float64)
    for a, b in sp.tiles(rows, 2 * count * width):
        part = sp.wide(x[:, a:b, :])
        if live is not None:
            part = xp.where(live[:, a:b, None], part, xp.zeros_like(part))
        sums = sums + xp.sum(part, axis=1)
        squares = squares + xp.sum(part * part, axis=(1, 2))[:, None]
    number = sp.full((count, 1), rows, xp.float64)
    if live is not None:
        number = xp.sum(sp.wide(live), axis=1, keepdims=True)
    return xp.concat([sums, squares, number], axis=1)


def rounded(sp: Space, heads: Heads, x: Floats) -> Floats:
    """As the pass will have it."""
    single = sp.xp.finfo(heads.q.dtype).bits == 32
    return x.astype(np.float32 if single else np.float64).astype(np.float64)


def longest(sp: Space, x: Array, by: Array | None = None, live: Array | None = None) -> Array:
    """The length of each head's longest live row of ``x (heads, rows, width)`` less ``by (heads, width)``, float64."""
    xp = sp.xp
    count, rows, width = x.shape
    most = sp.zeros((count,), xp.float64)
    for a, b in sp.tiles(rows, 3 * count * width):
        part = sp.wide(x[:, a:b, :])
        squares = xp.sum((part if by is None else part - by[:, None, :]) ** 2, axis=-1)
        if live is not None:
            squares = xp.where(live[:, a:b], squares, xp.zeros_like(squares))
        most = xp.maximum(most, xp.max(squares, axis=1))
    return xp.sqrt(most)


def bounds(sp: Space, heads: Heads, rows: Rows, by: Floats) -> tuple[Floats, Floats]:
    """Of each head: what no score of these rows exceeds, and how large a gradient of a query may be for a dout of 1."""
    xp, live = sp.xp, live_keys(sp, heads)
    alpha, beta = (sp.asarray(by[:, side], xp.float64) for side in (0, 1))
    queries = measure.take_rows(sp, heads.q, rows) - alpha[:, None, :]
    sizes = [
        xp.sqrt(xp.max(xp.sum(queries**2, axis=-1), axis=1)),
        longest(sp, heads.k, beta, live),
        longest(sp, heads.k, live=live),
        longest(sp, heads.v, live=live),
    ]
    q, shifted, k, v = sp.host(xp.stack(sizes))
    return abs(heads.scale) * q * shifted, abs(heads.scale) * k * v


def _biases(sp: Space, heads: Heads, by: Floats) -> Array:
    """``b_j + scale alpha.k'_j`` of every key, ``(heads, m)`` in float64."""
    xp = sp.xp
    count, m, d = heads.k.shape
    result = sp.empty((count, m), xp.float64)
    alpha, beta = (sp.asarray(by[:, side], xp.float64) for side in (0, 1))
    for a, b in sp.tiles(m, 2 * count * d):
        k = sp.wide(heads.k[:, a:b, :]) - beta[:, None, :]
        along = heads.scale * xp.matmul(k, alpha[..., None])[..., 0]
        if heads.key_bias is not None:
            own = sp.wide(heads.key_bias[:, a:b])
            along = xp.where(own == -math.inf, own, along + own)
        result[:, a:b] = along
    return result


def moments(
    sp: Space, heads: Heads, size: Size, rows: Rows, by: Floats, bounds: Floats, dout: Floats | None, degree: int
) -> Floats:
    """Sums over the keys of some queries.

    Returns
    -------
    ndarray, shape (3 + degree, heads, rows, width)
        Under the exact weights of near keys, those of far ones, and the powers of the scores from 0 on. Columns are
        ``1, v, k', (dout.v) k'``, the last two where there is ``dout (1, rows, d_v)``.

    Notes
    -----
    Cost: O(rows m (d + (degree + 3) (d_v + d))) time a head in float64; memory: tiles, and two numbers a key.
    """
    xp, t = sp.xp, sp.xp.matrix_transpose
    count, width = rows.shape
    d, d_v = size.d, size.d_v
    biases, live = _biases(sp, heads, by), live_keys(sp, heads)
    level = xp.max(biases, axis=1, keepdims=True)
    level = xp.where(level == -math.inf, xp.zeros_like(level), level)
    alpha, beta = (sp.asarray(by[:, side], xp.float64)[:, None, :] for side in (0, 1))
    q, bound = measure.take_rows(sp, heads.q, rows) - alpha, sp.asarray(bounds, xp.float64)[:, None, None]
    up = None if dout is None else sp.asarray(dout, xp.float64)
    place = sp.asarray(rows, xp.int64)[..., None]
    starts = [[size.near_start(int(i)) if heads.causal else size.m for i in head] for head in rows]
    far_end = sp.asarray(starts, xp.int64)[..., None]
    columns = 1 + d_v + (0 if up is None else 2 * d)
    sums = [sp.zeros((count, width, columns), xp.float64) for _ in range(degree + 3)]
    end = int(rows.max()) + 1 if heads.causal else size.m
    for a, b in sp.tiles(end, count * (8 * width + 3 * (d + d_v))):
        k, v = sp.wide(heads.k[:, a:b, :]) - beta, sp.wide(heads.v[:, a:b, :])
        if live is not None:
            k, v = (xp.where(live[:, a:b, None], x, xp.zeros_like(x)) for x in (k, v))
        w = xp.exp(biases[:, a:b] - level)[:, None, :]
        s = heads.scale * xp.matmul(q, t(k))
        s = xp.where(w == 0, xp.zeros_like(s), s)  # whatever a removed key holds
        exact, power = w * xp.exp(s - bound), w * xp.ones_like(s)
        ones = xp.ones((count, b - a, 1), dtype=xp.float64, device=sp.device)
        values = xp.concat([ones, v] if up is None else [ones, v, k], axis=-1)
        upstream = None if up is None else xp.matmul(up, t(v))
        kinds = [exact, power]
        if heads.causal:
            index, zero = sp.arange(a, b), xp.zeros_like(s)
            far = index < far_end
            near = xp.where((index <= place) & (index >= far_end), exact, zero)
            sums[0] = sums[0] + _weighted(sp, near, values, upstream, k)
            kinds = [xp.where(far, x, zero) for x in kinds]
        sums[1] = sums[1] + _weighted(sp, kinds[0], values, upstream, k)
        power = kinds[1]
        for kind in range(2, degree + 3):
            sums[kind] = sums[kind] + _weighted(sp, power, values, upstream, k)
            power = power * s
    result = sp.host(xp.stack(sums))
    result[:2] *= np.exp(bounds)[:, None, None]
    return result


def _weighted(sp: Space, weights: Array, values: Array, upstream: Array | None, k: Array) -> Array:
    sums = sp.xp.matmul(weights, values)
    if upstream is None:
        return sums
    return sp.xp.concat([sums, sp.xp.matmul(tiles.times(sp, weights, upstream), k)], axis=-1)
