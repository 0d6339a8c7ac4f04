"""A pass of the low-rank engines over the tokens of some heads, without a mask; and what one under a mask shares.

With shifted tokens ``q' = q - alpha``, ``k' = k - beta``, biases ``b'_j = b_j + scale alpha.k'_j``, the features'
factors in those (`Features.norms`), and key weights ``w_j = e^(b'_j - level)``:

    S = sum_j [w_j v_j, w_j]^T chi(k'_j)^T       (e, r), e = d_v + 1
    [N_i, D_i] = S W^T phi(q'_i)        out_i = N_i / D_i

Backward, with ``delta_i = dout_i.out_i`` and ``R = sum_i [dout_i, -delta_i]^T phi(q'_i)^T / D_i``:

    dq_i = J_phi(q'_i)^T W S^T [dout_i; -delta_i] / D_i
    dk'_j = w_j J_chi(k'_j)^T W^T R^T [v_j; 1]     [dv_j, h_j] = w_j R W chi(k'_j)       db_j = dv_j.v_j + h_j

and ``dk_j = dk'_j + scale db_j alpha``. Where the shifts are the means of the call, that of keys over the ``m'`` that
no bias removes, the consistent gradient also goes through them:

    dalpha = -sum_i dq'_i + scale sum_j db_j k'_j      dq_i = dq'_i + dalpha / n
    dbeta = -sum_j dk_j                                dk_j = dk_j + dbeta / m'

the last for those ``m'`` keys alone.

Sums over tokens are products over blocks of them in the arrays' dtype, added up in float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from .... import _lingrad_rs as core
from ....errors import DenominatorError
from ..device import Space
from ..problem.heads import Grads, Heads, dots, live_keys
from ..texts import scientific
from .features import Features, Side

__all__ = [
    "Floor",
    "Pass",
    "TokenGrads",
    "add_up",
    "backward",
    "columns",
    "finish",
    "forward",
    "in_blocks",
    "key_gradients",
    "left_out",
    "make_pass",
    "query_gradients",
    "scaled",
    "weighted_sum",
    "weighted_values",
    "whole_level",
    "whole_state",
    "why_not",
    "with_ones",
]

Array = Any

# Tokens whose products are summed in the arrays' dtype.
BLOCK = 512


@dataclass(frozen=True)
class Pass:
    """Heads with shifted tokens.

    Attributes
    ----------
    heads : Heads
        Whose ``q`` and ``k`` are shifted; keys and values are 0 where a key is removed, whatever they hold.
    features : Features
    query_shift : array, shape (heads, d), or None
    base : array of float64, shape (heads or 1, 1)
        What biases are relative to: the largest that was given, without a mask; with one 0, as what earlier rows see
        must not depend on it.
    bias : array of float64, shape (heads or 1, m)
        ``b'``, with the features' factors.
    biased : bool
        Whether not all of ``b'`` is 0.
    plain_bias : array of float64, shape (heads or 1, m)
        Without those factors.
    row_level : array of float64, shape (heads, n), or None
        What the low-rank weights of a query leave out, as a logarithm.
    through_means : bool
        Whether the gradient goes through the shifts.
    """

    heads: Heads
    features: Features
    query_shift: Array | None
    base: Array
    bias: Array
    biased: bool
    plain_bias: Array
    row_level: Array | None
    through_means: bool


def make_pass(
    sp: Space,
    heads: Heads,
    features: Features,
    query_shift: Array | None,
    key_shift: Array | None,
    *,
    through_means: bool = False,
) -> Pass:
    """The pass of `Heads` as they came, for shifts ``(heads, d)`` in their dtype.

    Raises
    ------
    DenominatorError
        Under a mask, a bias stands for minus infinity in all that some rows see, so that what is added to it is lost.
    """
    xp = sp.xp
    q = heads.q if query_shift is None else heads.q - query_shift[:, None, :]
    k, v = heads.k if key_shift is None else heads.k - key_shift[:, None, :], heads.v
    plain, base = (sp.zeros((1, size), xp.float64) for size in (heads.sizes[1], 1))
    if heads.key_bias is not None:
        plain = sp.wide(heads.key_bias)
        k, v = (xp.where((plain == -math.inf)[..., None], xp.zeros_like(x), x) for x in (k, v))
        if not heads.causal:
            base = whole_level(sp, plain)
            plain = plain - base
    norms = features.norms(sp, "keys", k)
    if heads.causal and heads.key_bias is not None and not (query_shift is None and norms is None):
        _check_biases(sp, heads)
    if query_shift is not None:
        plain = plain + heads.scale * dots(sp, k, xp.broadcast_to(query_shift[:, None, :], k.shape))
    return Pass(
        heads=Heads(q, k, v, heads.key_bias, heads.causal, heads.scale, heads.first),
        features=features,
        query_shift=query_shift,
        base=base,
        bias=plain if norms is None else plain + norms,
        biased=heads.key_bias is not None or query_shift is not None or norms is not None,
        plain_bias=plain,
        row_level=features.norms(sp, "queries", q),
        through_means=through_means,
    )


def _check_biases(sp: Space, heads: Heads) -> None:
    xp, bias = sp.xp, sp.wide(heads.key_bias)
    is_live = bias > -math.inf
    # Whether a key is the first live one of its head.
    is_first = is_live & (xp.cumulative_sum(xp.astype(is_live, xp.int64), axis=-1) == 1)
    first = xp.max(xp.where(is_first, bias, xp.full_like(bias, -math.inf)), axis=-1)
    for i, of_head in enumerate(sp.host(xp.stack([first, xp.max(bias, axis=-1)], axis=-1)).tolist()):
        # The largest bias that a row sees lies between these two; both are -inf where none is live.
        for largest in of_head:
            if math.isfinite(largest) and abs(largest) > core.LARGEST_BIAS:
                raise DenominatorError(
                    f"head {heads.first + i}: the largest key_bias that some row sees is {largest:e}, beside which "
                    "this engine loses what keys add to scores; remove keys by -inf, add a number to all of key_bias "
                    "that brings it near 0, or use engine=Exact()"
                )


def scaled(sp: Space, exponent: Array, level: Array) -> Array:
    """``e^(exponent - level)`` for exponents that are at most their level; 0 where the exponent is minus infinity."""
    zero = sp.full((), 0.0, exponent.dtype)
    gone = exponent == -math.inf
    return sp.xp.where(gone, zero, sp.xp.exp(sp.xp.where(gone, zero, exponent - level)))


def with_ones(sp: Space, x: Array) -> Array:
    """``[x, 1]``, one column more."""
    ones = sp.xp.ones((*x.shape[:-1], 1), dtype=x.dtype, device=sp.device)
    return sp.xp.concat([x, ones], axis=-1)


def columns(sp: Space, x: Array) -> Array:
    """Tokens along the last axis, contiguous."""
    return sp.contiguous(sp.xp.matrix_transpose(x))


@dataclass(frozen=True)
class Floor:
    """Jensen's lower bound of rows' denominators: ``ln D_i >= weight + q'_i.mean``, both float64.

    ``weight (heads, ...)`` is the logarithm of the keys' weights, ``mean (heads, ..., d)`` their mean key, times scale.
    """

    weight: Array
    mean: Array

    def holds(self, sp: Space, q: Array, log: Array) -> Array:
        """Whether ``ln D`` of queries ``(heads, ..., tokens, d)`` is not below it."""
        bound = self.weight[..., None] + sp.xp.matmul(sp.wide(q), self.mean[..., None])[..., 0]
        return log >= bound + math.log(core.LEAST_OF_FLOOR)


def in_blocks(sp: Space, x: Array, start: int, end: int, block: int, fill: float = 0.0) -> Array:
    """Rows ``start .. end`` of ``x (heads, n, ...)`` in blocks ``(heads, blocks, block, ...)``.

    Beyond the ends of ``x``, and where the last block is not full, there is `fill`.
    """
    n = x.shape[1]
    low, high = min(max(start, 0), n), min(max(end, 0), n)
    parts = [x[:, low:high, ...]]
    before = min(low - start, end - start) if start < 0 else 0
    for missing, at in ((before, 0), (end - max(high, start) + -(end - start) % block, 1)):
        if missing > 0:
            parts.insert(at and len(parts), sp.full((x.shape[0], missing, *x.shape[2:]), fill, x.dtype))
    x = parts[0] if len(parts) == 1 else sp.xp.concat(parts, axis=1)
    return sp.xp.reshape(x, (x.shape[0], -1, block, *x.shape[2:]))


def _ranges(sp: Space, run: Pass, tokens: int, potential: bool) -> Iterator[tuple[int, int, int]]:
    """Ranges of tokens whose features fit in temporary arrays, and the length of their blocks."""
    _, _, d, d_v = run.heads.sizes
    width = run.heads.count * (run.features.rank(potential) * 2 + d + d_v + 1)
    block = max(16, min(BLOCK, sp.numbers // width, tokens))
    states = 2 * run.heads.count * run.features.rank(potential) * (d_v + 1)
    most = block * max(1, min(sp.numbers // (width * block), sp.numbers // states))
    return ((start, min(start + most, tokens), block) for start in range(0, tokens, most))


def add_up(sp: Space, values: Array, features: Array) -> Array:
    """``sum over tokens of values^T features^T``, block by block: ``(heads, blocks, e, r)``.

    ``values (heads, blocks, tokens, e)``, ``features (heads, blocks, r, tokens)``.
    """
    # The features, the larger array by far, stay as they lie.
    return sp.xp.matrix_transpose(sp.xp.matmul(features, values))


def whole_state(sp: Space, run: Pass, side: Side, values: Array, potential: bool) -> Array:
    """The state of all tokens, ``(heads, 1, e, r)``, float64, for their values ``(heads, tokens, e)``."""
    x = run.heads.q if side == "queries" else run.heads.k
    total = sp.zeros((x.shape[0], 1, values.shape[-1], run.features.rank(potential)), sp.xp.float64)
    for start, end, block in _ranges(sp, run, x.shape[1], potential):
        of_x = run.features.of(sp, side, columns(sp, in_blocks(sp, x, start, end, block)), potential)
        parts = add_up(sp, in_blocks(sp, values, start, end, block), of_x)
        total += sp.xp.sum(parts, axis=1, keepdims=True, dtype=sp.xp.float64)
    return total


def key_weights(sp: Space, run: Pass, level: Array) -> Array:
    """``w (heads or 1, m)`` for a level ``(heads or 1, 1)``, in the arrays' dtype."""
    return sp.astype(scaled(sp, run.bias, level), run.heads.q.dtype)


def weighted_values(sp: Space, run: Pass, level: Array) -> Array:
    """``[w v, w] (heads, m, e)``."""
    return with_ones(sp, run.heads.v) * key_weights(sp, run, level)[..., None]


def whole_level(sp: Space, bias: Array) -> Array:
    """The largest bias of each head, ``(heads or 1, 1)``; 0 where every key is removed."""
    level = sp.xp.max(bias, axis=-1, keepdims=True)
    return sp.xp.where(level == -math.inf, sp.xp.zeros_like(level), level)


def forward(sp: Space, run: Pass) -> tuple[Array, Array, Array, Array]:
    """``out``, row factors ``M = 0`` and ``1/D``, and whether each row is not below Jensen's bound.

    The weights are relative to the level, and without the row's own factors.

    Cost: O((n + m) r d_v) time a head; memory beyond the results: states and tiles.
    """
    xp = sp.xp
    heads = run.heads
    n, _, _, d_v = heads.sizes
    level = whole_level(sp, run.bias)
    state = whole_state(sp, run, "keys", weighted_values(sp, run, level), False)
    state = run.features.weigh(sp, "keys", state, False)
    out, row_scale = sp.empty((heads.count, n, d_v), heads.q.dtype), sp.empty((heads.count, n), heads.q.dtype)
    good = xp.ones((heads.count, n), dtype=xp.bool, device=sp.device)
    floor = None if run.row_level is None else whole_floor(sp, run)
    for start, end, block in _ranges(sp, run, n, False):
        q = columns(sp, in_blocks(sp, heads.q, start, end, block))
        rows = xp.matrix_transpose(xp.matmul(state, run.features.of(sp, "queries", q, False)))
        rows = xp.reshape(rows, (heads.count, -1, d_v + 1))[:, : end - start, :]
        out[:, start:end, :] = rows[..., :d_v] / rows[..., d_v:]
        row_scale[:, start:end] = 1 / rows[..., d_v]
        if floor is not None and run.row_level is not None:
            log = level + run.row_level[:, start:end] + xp.log(sp.wide(rows[..., d_v]))
            good[:, start:end] = floor.holds(sp, heads.q[:, start:end, :], log)
    return out, xp.zeros_like(row_scale), row_scale, good


def weighted_sum(sp: Space, w: Array, x: Array) -> Array:
    """``sum_j w_j x_j`` in float64, ``(heads, d)``: weights ``(heads or 1, tokens)``, tokens ``(heads, tokens, d)``."""
    count, tokens, d = x.shape
    total = sp.zeros((count, 1, d), sp.xp.float64)
    for start, end in sp.tiles(tokens, 2 * count * d):
        total += sp.xp.matmul(sp.wide(w[:, None, start:end]), sp.wide(x[:, start:end, :]))
    return total[:, 0, :]


def whole_floor(sp: Space, run: Pass) -> Floor:
    """Jensen's bound over all keys."""
    xp = sp.xp
    level = whole_level(sp, run.plain_bias)
    w = scaled(sp, run.plain_bias, level)
    total = xp.sum(w, axis=-1)
    mean = weighted_sum(sp, w, run.heads.k) / total[..., None]
    return Floor(level[..., 0] + xp.log(total), run.heads.scale * mean)


@dataclass(frozen=True)
class TokenGrads:
    """Gradients of keys: ``dk`` of shifted ones, ``dv`` and ``db``."""

    dk: Array
    dv: Array
    db: Array


def query_gradients(sp: Space, run: Pass, q: Array, upstream: Array, state: Array) -> Array:
    """``J_phi(q')^T state^T upstream``, ``(heads, blocks, tokens, d)``, to be divided by D.

    ``q (heads, blocks, tokens, d)``, ``upstream (heads, blocks, tokens, e)`` and weighted states
    ``(heads, blocks, e, r)``.
    """
    t = sp.xp.matrix_transpose
    u = sp.xp.matmul(t(state), t(upstream))
    return t(run.features.pullback(sp, "queries", columns(sp, q), u))


def key_gradients(sp: Space, run: Pass, k: Array, v: Array, w: Array, potential: Array, own: Array) -> TokenGrads:
    """Those of keys ``(heads, blocks, tokens, d)`` with values ``v`` and weights ``w (heads, blocks, tokens)``.

    From the query states ``(heads, blocks, e, r)``, weighted by the potential's and by the features' own weights.
    """
    xp, t = sp.xp, sp.xp.matrix_transpose
    x, values = columns(sp, k), with_ones(sp, v)
    rows = t(xp.matmul(own, run.features.of(sp, "keys", x, False))) * w[..., None]
    u = xp.matmul(t(potential), t(values))
    dk = t(run.features.pullback(sp, "keys", x, u)) * w[..., None]
    return TokenGrads(dk, rows[..., :-1], xp.sum(rows * values, axis=-1))


def backward(sp: Space, run: Pass, row_scale: Array, dout: Array, delta: Array) -> Grads:
    """The gradients, from ``dout (heads, n, d_v)`` and ``delta (heads, n)``.

    Cost: O((n + m) r' (d_v + d)) time a head, with the potential's rank; memory beyond the results: states and tiles.
    """
    xp = sp.xp
    heads, features = run.heads, run.features
    n, m, d, d_v = heads.sizes
    dtype = heads.q.dtype
    level = whole_level(sp, run.bias)
    state = features.weigh(sp, "keys", whole_state(sp, run, "keys", weighted_values(sp, run, level), True), True)
    upstream = xp.concat([dout, -delta[..., None]], axis=-1)
    dq = sp.empty((heads.count, n, d), dtype)
    for start, end, block in _ranges(sp, run, n, True):
        q, up = (in_blocks(sp, x, start, end, block) for x in (heads.q, upstream))
        rows = xp.reshape(query_gradients(sp, run, q, up, state), (heads.count, -1, d))[:, : end - start, :]
        dq[:, start:end, :] = rows * row_scale[:, start:end, None]
    state = whole_state(sp, run, "queries", upstream * row_scale[..., None], True)
    potential, own = (features.weigh(sp, "queries", state, which) for which in (True, False))
    w = xp.broadcast_to(key_weights(sp, run, level), (heads.count, m))
    dk, dv, db = (sp.empty((heads.count, m, *rest), dtype) for rest in ((d,), (d_v,), ()))
    for start, end, block in _ranges(sp, run, m, True):
        k, v, weights = (in_blocks(sp, x, start, end, block) for x in (heads.k, heads.v, w))
        own_grads = key_gradients(sp, run, k, v, weights, potential, own)
        for total, part in ((dk, own_grads.dk), (dv, own_grads.dv), (db, own_grads.db)):
            flat = xp.reshape(part, (heads.count, -1, *part.shape[3:]))
            total[:, start:end, ...] = flat[:, : end - start, ...]
    return finish(sp, run, dq, dk, dv, db)


def finish(sp: Space, run: Pass, dq: Array, dk: Array, dv: Array, db: Array) -> Grads:
    """The gradients of unshifted tokens."""
    xp = sp.xp
    heads, alpha = run.heads, run.query_shift
    if alpha is not None:
        dk = dk + heads.scale * db[..., None] * alpha[:, None, :]
    if run.through_means:
        sums = [xp.sum(x, axis=1, keepdims=True, dtype=xp.float64) for x in (dq, dk)]
        through_bias = weighted_sum(sp, db, heads.k)[:, None, :]
        dalpha = (heads.scale * through_bias - sums[0]) / heads.q.shape[1]
        dq = dq + sp.astype(dalpha, dq.dtype)
        live = live_keys(sp, heads)
        if live is None:
            dk = dk - sp.astype(sums[1] / heads.k.shape[1], dk.dtype)
        else:
            number = xp.sum(sp.wide(live), axis=1)[:, None, None]
            dk = xp.where(live[..., None], dk - sp.astype(sums[1] / number, dk.dtype), dk)
    return Grads(dq, dk, dv, None if heads.key_bias is None else db)


def left_out(sp: Space, run: Pass, heads: Heads, key_shift: Array | None) -> Array:
    """What the logarithms of row sums in the original scores are more than those of a pass, ``(heads, n)``, float64.

    That is the row's constant that the key shift takes from its scores; and without a mask the level of the keys and
    what the features leave out, which rows under a mask hold.
    """
    total = sp.zeros(heads.q.shape[:2], sp.xp.float64)
    if key_shift is not None:
        total += heads.scale * dots(sp, heads.q, sp.xp.broadcast_to(key_shift[:, None, :], heads.q.shape))
    if not heads.causal:
        total += run.base + whole_level(sp, run.bias)
        if run.row_level is not None:
            total += run.row_level
    return total


def why_not(scale: float, biased: bool, remedy: str) -> str:
    """Why a row whose ``row_scale`` is no use has no answer, and what to do."""
    if np.isposinf(scale) and biased:
        return (
            "has no key to attend to: key_bias is -inf, or far below its maximum, for every key that it may see; "
            f"{core.NO_KEY_REMEDY}"
        )
    if np.isposinf(scale) or scale < 0:
        return f"has the denominator {scientific(1 / scale, 3)}, which is not positive: {remedy}"
    return f"has a denominator that overflows or underflows: {remedy}"
