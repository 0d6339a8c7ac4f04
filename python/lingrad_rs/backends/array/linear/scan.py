"""A pass of the low-rank engines under a causal mask: forward and reverse scans over blocks of tokens.

As in the compiled core (so that both compute the same), the sequence is cut in blocks of `BLOCK` tokens. A query meets
the *near* keys, those of its block and of a window before it, one by one, by ``exp`` or, without a window, by the
polynomial; in the first ``prefix`` blocks, which constants were taken from, all keys are near. Earlier keys it meets
through their state. Each row is scaled by ``e^(-M_i)``, and the state is relative to its *level* ``l``, the largest
bias of its keys:

    [N_i, D_i] = e^(l - M_i) S_c W^T phi(q_i) + sum_{near j} e^(-M_i) A_ij [v_j, 1]

With the keys ``K_c`` that are near block ``c - 1`` or its window and far from block ``c``, ``S_c`` is ``S_{c-1}`` and
``K_c``; these are met through the state by blocks ``c`` and later, whose state ``R_c`` is ``R_{c+1}`` and the queries
of block ``c``. Blocks are taken in segments: all of a segment's parts at once, then their running sums, as one product
with a triangle of ratios of levels, then all of its blocks.

Backward, with the rows' own ``M_i`` and ``D_i``, the gradient is the sum of both parts': of the near keys that of
`softmax` (with the polynomial, ``f_ij = w_j p(s_ij) e^(-M_i) / D_i``, and where the gradient is consistent
``w_j p'(s_ij) e^(-M_i) / D_i`` in its place as the factor of the score's gradient), of the far ones that of `passes`
with ``e^(l - M_i) / D_i`` for ``1 / D_i``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from .... import _lingrad_rs as core
from .. import softmax, tiles
from ..device import Space
from ..problem.heads import Grads, Heads
from .passes import (
    Floor,
    Pass,
    add_up,
    columns,
    finish,
    in_blocks,
    key_gradients,
    query_gradients,
    scaled,
    weighted_sum,
    weighted_values,
    whole_level,
    whole_state,
    with_ones,
)

__all__ = ["BLOCK", "Near", "backward", "forward", "near_start"]

Array = Any

BLOCK = 112
# Blocks of a segment at the most: their running sums cost so many times a state's numbers a block.
_SEGMENT = 64


@dataclass(frozen=True)
class Near:
    """How near keys are met.

    Attributes
    ----------
    window : int
        Tokens before a block.
    from_prefix : bool
        Whether constants were taken from the first tokens.
    coefficients : array, shape (heads, degree + 1), or None
        Of the polynomial that takes the place of ``exp``, in the arrays' dtype.
    consistent : bool
        Whether the derivative of that polynomial stands in the gradient.
    """

    window: int
    from_prefix: bool
    coefficients: Array | None = None
    consistent: bool = False

    @property
    def prefix(self) -> int:
        """Blocks at the start among which all keys are near."""
        return -(-core.PREFIX // BLOCK) if self.from_prefix else 0


def near_start(near: Near, i: int) -> int:
    """The first token near query i."""
    c = i // BLOCK
    return 0 if c < near.prefix else max(c * BLOCK - near.window, 0)


def add_rows(sp: Space, total: Array, start: int, part: Array) -> None:
    """Adds blocks ``(heads, blocks, BLOCK, ...)`` to the rows from ``start`` on that ``total (heads, n, ...)`` has."""
    part = sp.xp.reshape(part, (part.shape[0], -1, *part.shape[3:]))
    low, high = max(start, 0), min(start + part.shape[1], total.shape[1])
    if low < high:
        total[:, low:high, ...] += part[:, low - start : high - start, ...]


class _Scan:
    """Running sums over blocks of parts ``(heads, blocks, ...)``, each relative to its level."""

    def __init__(self, sp: Space, shape: tuple[int, ...], levels: int) -> None:
        self.sum = sp.zeros(shape, sp.xp.float64)
        self.level = sp.full((levels, 1), -math.inf, sp.xp.float64)

    def levels(self, sp: Space, own: Array) -> Array:
        """The largest of the blocks' own levels so far, ``(levels, blocks)``."""
        xp = sp.xp
        blocks = own.shape[1]
        before = xp.tril(xp.ones((blocks, blocks), dtype=xp.int8, device=sp.device)) == 1
        so_far = xp.max(xp.where(before, own[:, None, :], sp.full((), -math.inf, own.dtype)), axis=-1)
        return xp.maximum(so_far, self.level)

    def forward(self, sp: Space, parts: Array, levels: Array) -> Array:
        """The sums with each block, relative to its level; float64."""
        ratios = scaled(sp, levels[:, None, :], levels[:, :, None])
        carried = scaled(sp, self.level, levels)
        sums = self._sums(sp, parts, sp.xp.tril(ratios), carried)
        # A copy: a view would keep all of them.
        self.sum, self.level = sp.xp.asarray(sums[:, -1, ...], copy=True), levels[:, -1:]
        return sums

    def reverse(self, sp: Space, parts: Array, levels: Array) -> Array:
        """The sums from each block on, relative to its level; float64."""
        xp = sp.xp
        first = xp.where(self.level == -math.inf, levels[:, -1:], self.level)
        ratios = scaled(sp, levels[:, :, None], levels[:, None, :])
        carried = scaled(sp, levels, first)
        sums = self._sums(sp, parts, xp.triu(ratios), carried)
        self.sum, self.level = xp.asarray(sums[:, 0, ...], copy=True), levels[:, :1]
        return sums

    def _sums(self, sp: Space, parts: Array, ratios: Array, carried: Array) -> Array:
        xp = sp.xp
        flat = xp.reshape(parts, (*parts.shape[:2], -1))
        sums = xp.reshape(xp.matmul(sp.astype(ratios, parts.dtype), flat), parts.shape)
        axes = (...,) + (None,) * (parts.ndim - 2)
        return sp.wide(sums) + carried[axes] * self.sum[:, None, ...]


@dataclass(frozen=True)
class _Segment:
    """Blocks ``first .. end``, and where their tokens begin."""

    first: int
    end: int
    starts: tuple[int, int, int]
    """The first tokens of the queries, of the near keys and of the far keys."""


class _Cut:
    """How the sequence of a pass is cut."""

    def __init__(self, sp: Space, run: Pass, near: Near) -> None:
        n, _, d, d_v = run.heads.sizes
        self.sp, self.run, self.near, self.n = sp, run, near, n
        self.window = min(near.window, n)
        self.before = -(-self.window // BLOCK)
        """Blocks before each that its window reaches into."""
        self.prefix = min(near.prefix, -(-n // BLOCK))
        self.blocks = -(-n // BLOCK)
        self.d, self.e = d, d_v + 1

    def segments(self, potential: bool) -> list[_Segment]:
        """The blocks after the prefix, in segments that fit in temporary arrays."""
        r = self.run.features.rank(potential)
        keys = (self.before + 1) * BLOCK
        numbers = 2 * r * (BLOCK + self.e) + keys * (2 * BLOCK + self.d + self.e)
        step = max(1, min(_SEGMENT, self.sp.numbers // (self.run.heads.count * numbers)))
        return [
            _Segment(
                c,
                min(c + step, self.blocks),
                (c * BLOCK, (c - self.before) * BLOCK, (c - 1) * BLOCK - self.window),
            )
            for c in range(self.prefix, self.blocks, step)
        ]

    def queries(self, x: Array, segment: _Segment, fill: float = 0.0) -> Array:
        """Queries' rows of x, in blocks."""
        return in_blocks(self.sp, x, segment.starts[0], segment.end * BLOCK, BLOCK, fill)

    def row_factors(self, row_max: Array, row_scale: Array, segment: _Segment) -> tuple[Array, Array]:
        """Those of queries, in blocks. Where there are no more queries, no key has a weight, however large its bias."""
        return self.queries(row_max, segment, math.inf), self.queries(row_scale, segment)

    def far(self, x: Array, segment: _Segment, fill: float = 0.0) -> Array:
        """Rows of the keys ``K_c``, in blocks."""
        start = segment.starts[2]
        return in_blocks(self.sp, x, start, start + (segment.end - segment.first) * BLOCK, BLOCK, fill)

    def near_rows(self, x: Array, segment: _Segment) -> Array:
        """Rows of each block's near keys, ``(heads, blocks, keys, ...)``."""
        x = in_blocks(self.sp, x, segment.starts[1], segment.end * BLOCK, BLOCK)
        count = segment.end - segment.first
        pieces = [x[:, t : t + count, ...] for t in range(self.before + 1)]
        return pieces[0] if len(pieces) == 1 else self.sp.xp.concat(pieces, axis=2)

    def add_near_rows(self, total: Array, part: Array, segment: _Segment) -> None:
        """The reverse of `near_rows`."""
        for t in range(self.before + 1):
            add_rows(self.sp, total, segment.starts[1] + t * BLOCK, part[:, :, t * BLOCK : (t + 1) * BLOCK, ...])

    def seen(self, segment: _Segment) -> tuple[Array, Array]:
        """The first and the last near key of each query, as `tiles.exponentials` takes them."""
        sp, xp = self.sp, self.sp.xp
        c = sp.arange(segment.first, segment.end)[:, None] * BLOCK
        start = c - self.window
        start = xp.where(start < 0, xp.zeros_like(start), start)
        first = start - (c - self.before * BLOCK) + xp.zeros((1, BLOCK), dtype=c.dtype, device=sp.device)
        last = self.before * BLOCK + 1 + sp.arange(0, BLOCK)[None, :] + xp.zeros_like(c)
        return sp.astype(first, xp.int32), sp.astype(last, xp.int32)

    def any_far(self, segment: _Segment) -> bool:
        """Whether any block of a segment has far keys."""
        return (segment.end - 1) * BLOCK - self.window > 0

    @property
    def far_of_prefix(self) -> int:
        """So many tokens at the start are far from all blocks after the prefix."""
        return max(0, (self.prefix - 1) * BLOCK - self.window) if self.prefix else 0

    def prefix_heads(self, of: Pass, tokens: int) -> Heads:
        """The first tokens alone, with the biases of shifted ones."""
        heads = of.heads
        q, k, v = (x[:, :tokens, :] for x in (heads.q, heads.k, heads.v))
        bias = None
        if of.biased:
            bias = self.sp.astype(of.plain_bias[:, :tokens], q.dtype)
            bias = self.sp.xp.broadcast_to(bias, (heads.count, tokens))
        return replace(heads, q=q, k=k, v=v, key_bias=bias)

    @property
    def prefix_tokens(self) -> int:
        """Tokens of the prefix."""
        return min(self.prefix * BLOCK, self.n)


def _far_parts(cut: _Cut, segment: _Segment, scan: _Scan, potential: bool) -> tuple[Array, Array]:
    """The parts ``K_c`` of the keys' state, and the levels."""
    sp, run = cut.sp, cut.run
    bias = cut.far(run.bias, segment, -math.inf)
    levels = scan.levels(sp, sp.xp.max(bias, axis=-1))
    w = sp.astype(scaled(sp, bias, levels[..., None]), run.heads.q.dtype)
    values = with_ones(sp, cut.far(run.heads.v, segment)) * w[..., None]
    x = columns(sp, cut.far(run.heads.k, segment))
    return add_up(sp, values, run.features.of(sp, "keys", x, potential)), levels


def _start_keys(cut: _Cut, scan: _Scan, potential: bool) -> None:
    """Gives the scan the keys that are far from all blocks after the prefix."""
    tokens = cut.far_of_prefix
    if tokens == 0:
        return
    sp, run = cut.sp, cut.run
    own = _first_tokens(run, tokens)
    scan.level = sp.xp.max(own.bias, axis=-1, keepdims=True)
    scan.sum = whole_state(sp, own, "keys", weighted_values(sp, own, whole_level(sp, own.bias)), potential)[:, 0, ...]


def _first_tokens(run: Pass, tokens: int) -> Pass:
    heads = run.heads
    q, k, v = (x[:, :tokens, :] for x in (heads.q, heads.k, heads.v))
    return replace(
        run, heads=replace(heads, q=q, k=k, v=v), bias=run.bias[:, :tokens], plain_bias=run.plain_bias[:, :tokens]
    )


class _Floors:
    """Jensen's bounds over the far keys, block by block."""

    def __init__(self, cut: _Cut) -> None:
        sp, run = cut.sp, cut.run
        self.cut = cut
        self.scan = _Scan(sp, (run.heads.count, cut.d + 1), run.plain_bias.shape[0])
        tokens = cut.far_of_prefix
        if tokens:
            own = _first_tokens(run, tokens)
            self.scan.level = sp.xp.max(own.plain_bias, axis=-1, keepdims=True)
            w = scaled(sp, own.plain_bias, self.scan.level)
            sums = [
                weighted_sum(sp, w, own.heads.k),
                sp.xp.sum(w, axis=-1, keepdims=True) + sp.zeros((run.heads.count, 1), w.dtype),
            ]
            self.scan.sum = sp.xp.concat(sums, axis=-1)

    def advance(self, segment: _Segment) -> Floor:
        cut, sp, run = self.cut, self.cut.sp, self.cut.run
        bias = cut.far(run.plain_bias, segment, -math.inf)
        levels = self.scan.levels(sp, sp.xp.max(bias, axis=-1))
        w = scaled(sp, bias, levels[..., None])
        keys = with_ones(sp, sp.wide(cut.far(run.heads.k, segment)))
        sums = self.scan.forward(sp, sp.xp.matmul(w[..., None, :], keys)[..., 0, :], levels)
        weight = sums[..., -1]
        return Floor(levels + sp.xp.log(weight), run.heads.scale * sums[..., :-1] / weight[..., None])


def _near_weights(cut: _Cut, segment: _Segment, level: Array, row_max: Array | None) -> tuple[Array, Array]:
    """``w e^-M`` of a block's own keys for each query, 0 for those that it does not see, and M.

    M is the largest bias that each query sees, unless it is given.
    """
    sp, xp, run = cut.sp, cut.sp.xp, cut.run
    first, last = cut.seen(segment)
    bias = sp.astype(cut.queries(run.bias, segment), level.dtype)[..., None, :]
    bias = xp.where(tiles.keep(sp, bias.shape[-1], first, last), bias, sp.full((), -math.inf, bias.dtype))
    most: Array = row_max
    if row_max is None:
        most = xp.maximum(xp.max(bias, axis=-1), level)
        most = xp.where(most == -math.inf, xp.zeros_like(most), most)
    return scaled(sp, bias, most[..., None]), most


def _weighted(sp: Space, w: Array, coefficients: Array, s: Array) -> Array:
    """``w p(s)`` for coefficients ``(heads, degree + 1)``; 0 where the weight is, whatever the score."""
    p = sp.xp.zeros_like(s)
    for j in range(coefficients.shape[1] - 1, -1, -1):
        p = p * s + coefficients[:, j][:, None, None, None]
    return sp.xp.where(w == 0, sp.xp.zeros_like(p), w * p)


def _derivative(sp: Space, coefficients: Array) -> Array:
    """The coefficients of p'."""
    factors = sp.astype(sp.arange(1, coefficients.shape[1]), coefficients.dtype)
    return coefficients[:, 1:] * factors[None, :]


def forward(sp: Space, run: Pass, near: Near) -> tuple[Array, Array, Array, Array]:
    """``out``, the row factors ``M`` and ``1/D``, and whether each row's far part is not below Jensen's bound.

    Cost: O(n r d_v + n (window + BLOCK) (d + d_v)) time a head; memory beyond the results: states and tiles.
    """
    xp, t = sp.xp, sp.xp.matrix_transpose
    heads, features = run.heads, run.features
    n, _, _, d_v = heads.sizes
    dtype, cut = heads.q.dtype, _Cut(sp, run, near)
    out = sp.empty((heads.count, n, d_v), dtype)
    row_max, row_scale = sp.empty((heads.count, n), dtype), sp.empty((heads.count, n), dtype)
    good = xp.ones((heads.count, n), dtype=xp.bool, device=sp.device)
    if cut.prefix:
        tokens = cut.prefix_tokens
        first = softmax.forward(sp, cut.prefix_heads(run, tokens))
        out[:, :tokens, :], row_max[:, :tokens], row_scale[:, :tokens] = first
    scan = _Scan(sp, (heads.count, cut.e, features.rank(False)), run.bias.shape[0])
    _start_keys(cut, scan, False)
    floors = None if run.row_level is None else _Floors(cut)
    for segment in cut.segments(False):
        q = cut.queries(heads.q, segment)
        shape = q.shape[:3]
        log_far = sp.full(shape, -math.inf, dtype)
        level = log_far
        far, held = sp.zeros((*shape, cut.e), dtype), None
        if cut.any_far(segment):
            parts, levels = _far_parts(cut, segment, scan, False)
            state = features.weigh(sp, "keys", scan.forward(sp, parts, levels), False)
            far = t(xp.matmul(state, features.of(sp, "queries", columns(sp, _that_see(sp, q, levels)), False)))
            level = xp.broadcast_to(sp.astype(levels, dtype)[..., None], shape)
            log_far = level
            if floors is not None and run.row_level is not None:
                floor = floors.advance(segment)
                log = levels[..., None] + cut.queries(run.row_level, segment) + xp.log(sp.wide(far[..., d_v]))
                none = xp.broadcast_to((levels == -math.inf)[..., None], shape)
                held = floor.holds(sp, q, log) | none
                log_far = xp.where(none, level, sp.astype(log, dtype))
        k, v = cut.near_rows(heads.k, segment), cut.near_rows(heads.v, segment)
        s = xp.matmul(heads.scale * q, t(k))
        if (coefficients := near.coefficients) is None:
            bias = sp.astype(cut.near_rows(run.plain_bias, segment), dtype) if run.biased else None
            weights, most, sums = tiles.exponentials(sp, s, log_far, bias, *cut.seen(segment))
        else:
            w, most = _near_weights(cut, segment, level, None)
            weights = _weighted(sp, w, coefficients, s)
            sums = xp.sum(weights, axis=-1)
        by = scaled(sp, log_far, most)
        if run.row_level is not None:
            by = xp.where(by == 0, by, by / far[..., d_v])
        total = xp.matmul(weights, v) + far[..., :d_v] * by[..., None]
        scale = 1 / (sums + far[..., d_v] * by)
        for array, part in ((out, total * scale[..., None]), (row_max, most), (row_scale, scale), (good, held)):
            if part is not None:
                start, end = segment.first * BLOCK, min(segment.end * BLOCK, n)
                flat = xp.reshape(part, (heads.count, -1, *part.shape[3:]))
                array[:, start:end, ...] = flat[:, : end - start, ...]
    return out, row_max, row_scale, good


def _that_see(sp: Space, q: Array, levels: Array) -> Array:
    """Queries ``(heads, blocks, BLOCK, d)`` of blocks that see far keys, and 0 for the others.

    Nothing meets the features of those; but they might overflow, and infinity times 0 is no number.
    """
    return sp.xp.where((levels == -math.inf)[..., None, None], sp.xp.zeros_like(q), q)


def _far_factor(cut: _Cut, segment: _Segment, levels: Array, row_max: Array, row_scale: Array) -> Array:
    """What turns low-rank weights relative to the levels into entries of f: ``(heads, blocks, BLOCK)``."""
    sp, run = cut.sp, cut.run
    most, scale = cut.row_factors(row_max, row_scale, segment)
    if run.row_level is None:
        return scale * scaled(sp, sp.xp.broadcast_to(sp.astype(levels, most.dtype)[..., None], most.shape), most)
    level = levels[..., None] + cut.queries(run.row_level, segment)
    return sp.astype(sp.wide(scale) * scaled(sp, level, sp.wide(most)), scale.dtype)


def backward(sp: Space, run: Pass, near: Near, row_max: Array, row_scale: Array, dout: Array, delta: Array) -> Grads:
    """The gradients, from ``dout (heads, n, d_v)`` and ``delta (heads, n)``.

    Cost: O(n r' (d_v + d) + n (window + BLOCK) (d + d_v)) time a head, with the potential's rank; memory beyond the
    results: states and tiles.
    """
    heads, cut = run.heads, _Cut(sp, run, near)
    dq, dk, dv = (sp.zeros(x.shape, x.dtype) for x in (heads.q, heads.k, heads.v))
    db = sp.zeros((heads.count, heads.sizes[1]), heads.q.dtype)
    if cut.prefix:
        tokens = cut.prefix_tokens
        own = cut.prefix_heads(run, tokens)
        factors = (x[:, :tokens, ...] for x in (row_max, row_scale, dout, delta))
        grads = softmax.backward(sp, own, *factors)
        dq[:, :tokens, :], dk[:, :tokens, :], dv[:, :tokens, :] = grads.dq, grads.dk, grads.dv
        if grads.dkey_bias is not None:
            db[:, :tokens] = grads.dkey_bias
    total = Grads(dq, dk, dv, db)
    upstream = sp.xp.concat([dout, -delta[..., None]], axis=-1)
    levels = _forward_scan(cut, row_max, row_scale, upstream, total)
    _reverse_scan(cut, levels, row_max, row_scale, upstream, total)
    return finish(sp, run, dq, dk, dv, db)


def _forward_scan(cut: _Cut, row_max: Array, row_scale: Array, upstream: Array, total: Grads) -> list[Array | None]:
    """Adds dq, and what near keys get; returns each segment's levels, None where nothing is far."""
    sp, run, xp, t = cut.sp, cut.run, cut.sp.xp, cut.sp.xp.matrix_transpose
    heads, features, dtype = run.heads, run.features, run.heads.q.dtype
    scan = _Scan(sp, (heads.count, cut.e, features.rank(True)), run.bias.shape[0])
    _start_keys(cut, scan, True)
    kept: list[Array | None] = []
    for segment in cut.segments(True):
        q, up = cut.queries(heads.q, segment), cut.queries(upstream, segment)
        dout, minus_delta = up[..., :-1], up[..., -1]
        level, levels = sp.full(q.shape[:3], -math.inf, dtype), None
        if cut.any_far(segment):
            parts, levels = _far_parts(cut, segment, scan, True)
            state = features.weigh(sp, "keys", scan.forward(sp, parts, levels), True)
            level = sp.astype(levels, dtype)[..., None]
            by = _far_factor(cut, segment, levels, row_max, row_scale)
            far_q = _that_see(sp, q, levels)
            add_rows(sp, total.dq, segment.starts[0], query_gradients(sp, run, far_q, up, state) * by[..., None])
        kept.append(levels)
        k, v = cut.near_rows(heads.k, segment), cut.near_rows(heads.v, segment)
        scaled_q = heads.scale * q
        s, e = xp.matmul(scaled_q, t(k)), xp.matmul(dout, t(v))
        most, scale = cut.row_factors(row_max, row_scale, segment)
        if (coefficients := cut.near.coefficients) is None:
            bias = sp.astype(cut.near_rows(run.plain_bias, segment), dtype) if run.biased else None
            f, ds = tiles.score_gradients(sp, s, e, most, scale, -minus_delta, bias, *cut.seen(segment))
            of_bias = ds
        else:
            w, e = _near_weights(cut, segment, level, most)[0] * scale[..., None], e + minus_delta[..., None]
            f = _weighted(sp, w, coefficients, s)
            of_bias = ds = tiles.times(sp, f, e)
            if cut.near.consistent:
                ds = tiles.times(sp, _weighted(sp, w, _derivative(sp, coefficients), s), e)
        add_rows(sp, total.dq, segment.starts[0], heads.scale * xp.matmul(ds, k))
        cut.add_near_rows(total.dk, t(xp.matmul(t(scaled_q), ds)), segment)
        cut.add_near_rows(total.dv, t(xp.matmul(t(dout), f)), segment)
        cut.add_near_rows(total.dkey_bias, xp.sum(of_bias, axis=-2), segment)
    return kept


def _reverse_scan(
    cut: _Cut, levels: list[Array | None], row_max: Array, row_scale: Array, upstream: Array, total: Grads
) -> None:
    """Adds what far keys get."""
    sp, run = cut.sp, cut.run
    heads, features = run.heads, run.features
    scan = _Scan(sp, (heads.count, cut.e, features.rank(True)), run.bias.shape[0])

    def add(start: int, k: Array, v: Array, w: Array, state: Array) -> None:
        potential, own = (features.weigh(sp, "queries", state, which) for which in (True, False))
        grads = key_gradients(sp, run, k, v, w, potential, own)
        add_rows(sp, total.dk, start, grads.dk)
        add_rows(sp, total.dv, start, grads.dv)
        add_rows(sp, total.dkey_bias, start, grads.db)

    def weights(bias: Array, level: Array) -> Array:
        w = sp.astype(scaled(sp, bias, level[..., None]), heads.q.dtype)
        return sp.xp.broadcast_to(w, (heads.count, *w.shape[1:]))

    for segment, own_levels in reversed(list(zip(cut.segments(True), levels, strict=True))):
        if own_levels is None:
            break  # nothing is far from these blocks, nor from those before
        by = _far_factor(cut, segment, own_levels, row_max, row_scale)
        q, up = cut.queries(heads.q, segment), cut.queries(upstream, segment) * by[..., None]
        q = _that_see(sp, q, own_levels)
        parts = add_up(sp, up, features.of(sp, "queries", columns(sp, q), True))
        state = scan.reverse(sp, parts, own_levels)
        w = weights(cut.far(run.bias, segment, -math.inf), own_levels)
        add(segment.starts[2], cut.far(heads.k, segment), cut.far(heads.v, segment), w, state)
    tokens = cut.far_of_prefix
    if tokens and levels and levels[0] is not None:
        step = (cut.segments(True)[0].end - cut.prefix) * BLOCK
        for start in range(0, tokens, step):
            k, v = (in_blocks(sp, x[:, :tokens, :], start, start + step, BLOCK) for x in (heads.k, heads.v))
            bias = in_blocks(sp, run.bias[:, :tokens], start, start + step, BLOCK, -math.inf)
            add(start, k, v, weights(bias, scan.level), scan.sum[:, None, ...])
