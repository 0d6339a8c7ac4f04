"""Softmax attention in tiles, with a running maximum: the exact engine, and the first tokens of a scan.

``s_ij = scale q_i.k_j + b_j``, ``f_ij = e^(s_ij - M_i) / D_i``, ``out = f v``. Backward, ``delta_i = dout_i.out_i``:
``dS = f (dout v^T - delta 1^T)``, ``dq = scale dS k``, ``dk = scale dS^T q``, ``dv = f^T dout``, ``db = dS^T 1``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from . import tiles
from .device import Space
from .problem.heads import Grads, Heads

__all__ = ["backward", "forward"]

Array = Any


def _tiles(sp: Space, heads: Heads) -> Iterator[tuple[int, int, list[tuple[int, int]]]]:
    """Ranges of queries, each with the ranges of the keys that they see."""
    n, m, _, _ = heads.sizes
    side = max(32, math.isqrt(sp.numbers // max(heads.count, 1)))
    for start in range(0, n, side):
        end = min(start + side, n)
        seen = end if heads.causal else m
        yield start, end, [(j, min(j + side, seen)) for j in range(0, seen, side)]


def _limits(sp: Space, heads: Heads, rows: tuple[int, int], keys: tuple[int, int]) -> tuple[Array | None, Array | None]:
    """Which keys of a tile each of its rows sees, as `tiles.exponentials` takes it."""
    if not heads.causal or keys[1] - 1 <= rows[0]:
        return None, None
    last = sp.astype(sp.arange(rows[0] + 1 - keys[0], rows[1] + 1 - keys[0]), sp.xp.int32)[None, :]
    return sp.xp.zeros_like(last), last


def _scores(sp: Space, heads: Heads, q: Array, keys: tuple[int, int]) -> tuple[Array, Array | None]:
    """``scale q.k`` and the biases of a tile, with an axis of one block."""
    k = heads.k[:, keys[0] : keys[1], :]
    s = sp.xp.matmul(q, sp.xp.matrix_transpose(k))[:, None, ...]
    bias = None if heads.key_bias is None else heads.key_bias[:, None, keys[0] : keys[1]]
    return s, bias


def forward(sp: Space, heads: Heads) -> tuple[Array, Array, Array]:
    """``out (heads, n, d_v)``, ``M`` and ``1/D``, both ``(heads, n)``. A row that sees no key has infinity as ``1/D``.

    Cost: O(n m (d + d_v)) time a head; memory beyond the results: tiles.
    """
    xp = sp.xp
    n, _, _, d_v = heads.sizes
    dtype = heads.q.dtype
    out = sp.empty((heads.count, n, d_v), dtype)
    row_max, row_scale = sp.empty((heads.count, n), dtype), sp.empty((heads.count, n), dtype)
    for start, end, ranges in _tiles(sp, heads):
        q = heads.scale * heads.q[:, start:end, :]
        most = sp.full((heads.count, 1, end - start), -math.inf, dtype)
        sums, total = sp.zeros(most.shape, dtype), sp.zeros((heads.count, end - start, d_v), dtype)
        for keys in ranges:
            s, bias = _scores(sp, heads, q, keys)
            before = most
            weights, most, own = tiles.exponentials(sp, s, before, bias, *_limits(sp, heads, (start, end), keys))
            unseen = (before == -math.inf) & (own == 0)
            by = xp.where(before == -math.inf, xp.zeros_like(most), xp.exp(before - most))
            most = xp.where(unseen, before, most)
            sums = sums * by + own
            total = total * by[:, 0, :, None] + xp.matmul(weights[:, 0, ...], heads.v[:, keys[0] : keys[1], :])
        scale = 1 / sums[:, 0, :]
        out[:, start:end, :] = total * scale[..., None]
        row_max[:, start:end] = xp.where(most == -math.inf, xp.zeros_like(most), most)[:, 0, :]
        row_scale[:, start:end] = scale
    return out, row_max, row_scale


def backward(sp: Space, heads: Heads, row_max: Array, row_scale: Array, dout: Array, delta: Array) -> Grads:
    """The gradients, from ``dout (heads, n, d_v)`` and ``delta (heads, n)``.

    Cost: O(n m (d + d_v)) time a head; memory beyond the results: tiles.
    """
    xp, t = sp.xp, sp.xp.matrix_transpose
    dq = sp.empty(heads.q.shape, heads.q.dtype)
    dk, dv = (sp.zeros(x.shape, x.dtype) for x in (heads.k, heads.v))
    db = None if heads.key_bias is None else sp.zeros(heads.key_bias.shape, heads.q.dtype)
    for start, end, ranges in _tiles(sp, heads):
        q, up = heads.scale * heads.q[:, start:end, :], dout[:, start:end, :]
        own_dq = sp.zeros(q.shape, q.dtype)
        most, scale, own_delta = (x[:, None, start:end] for x in (row_max, row_scale, delta))
        for a, b in ranges:
            s, bias = _scores(sp, heads, q, (a, b))
            e = xp.matmul(up, t(heads.v[:, a:b, :]))[:, None, ...]
            first, last = _limits(sp, heads, (start, end), (a, b))
            f, ds = tiles.score_gradients(sp, s, e, most, scale, own_delta, bias, first, last)
            f, ds = f[:, 0, ...], ds[:, 0, ...]
            # The tiles stay as they lie: what is transposed in a product is the smaller factor. And q holds the scale.
            own_dq += xp.matmul(ds, heads.k[:, a:b, :])
            dk[:, a:b, :] += t(xp.matmul(t(q), ds))
            dv[:, a:b, :] += t(xp.matmul(t(up), f))
            if db is not None:
                db[:, a:b] += xp.sum(ds, axis=-2)
        dq[:, start:end, :] = heads.scale * own_dq
    return Grads(dq, dk, dv, db)
