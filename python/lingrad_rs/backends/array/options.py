"""Exact attention with every option of scores, in tiles of plain array code.

``s_ij = cap(scale q_i.k_j) + key_bias_j + bias_ij`` of the pairs that count, ``lse_i = log(sum_j e^s_ij + e^sink)``,
``f_ij = e^(s_ij - lse_i)``, ``out = f v``. Backward, with ``delta_i = dout_i.out_i``:
``dS = f (dout v^T - delta 1^T)``, ``dq = scale dS' k`` and ``dk = scale dS'^T q`` with ``dS'`` times the derivative of
the cap, ``dv = f^T dout``, ``db = dS`` summed over what the bias broadcasts along, and
``dsink = -sum_i e^(sink - lse_i) delta_i``.

Query heads that share keys have an axis of their own, ``(..., h_kv, group, n, d)``, so that products broadcast.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from ... import _lingrad_rs as core
from ...errors import DenominatorError, NonFiniteError
from ...spec.scores import Scores
from .device import Space
from .problem.finite import check_heads, check_results
from .tiles import times

__all__ = ["backward", "forward"]

Array = Any
_Range = tuple[int, int]


@dataclass(frozen=True)
class _Call:
    """The arrays of a call, lined up: heads as ``(h_kv, group)``, or ``(h_kv, 1)`` where a group shares them."""

    sp: Space
    scores: Scores
    q: Array
    k: Array
    v: Array
    key_bias: Array | None
    mask: Array | None
    bias: Array | None
    sinks: Array | None
    segments: Array | None

    @classmethod
    def of(cls, sp: Space, q: Array, k: Array, v: Array, scores: Scores) -> _Call:
        h_kv = k.shape[-3] if k.ndim > 2 else 1
        group = q.shape[-3] // h_kv if q.ndim > 2 and h_kv else 1
        lined = lambda x, inner: _grouped(sp, x, inner, h_kv, group)  # noqa: E731
        shared = lambda x, inner: None if x is None else lined(x, inner)  # noqa: E731
        key_bias = None if scores.key_bias is None else lined(scores.key_bias, 1)[..., None, :]
        return cls(
            sp,
            scores,
            lined(q, 2),
            lined(k, 2),
            lined(v, 2),
            key_bias,
            shared(scores.mask, 2),
            shared(scores.bias, 2),
            None if scores.sinks is None else _grouped(sp, scores.sinks, 0, h_kv, group)[..., None],
            _segments(sp, scores, q, h_kv, group),
        )

    @property
    def sizes(self) -> tuple[int, int]:
        return self.q.shape[-2], self.k.shape[-2]

    def tiles(self) -> Iterator[tuple[_Range, list[_Range]]]:
        """Ranges of queries, each with the ranges of keys that any of them sees."""
        n, m = self.sizes
        side = max(32, math.isqrt(self.sp.numbers // max(math.prod(self.q.shape[:-2]), 1)))
        lower, upper = self.band
        for start in range(0, n, side):
            end = min(start + side, n)
            first = 0 if lower is None else min(max(start + lower, 0), m)
            last = m if upper is None else min(max(end + upper, first), m)
            yield (start, end), [(j, min(j + side, last)) for j in range(first, last, side)]

    @property
    def band(self) -> tuple[int | None, int | None]:
        """Row i sees ``i + lower <= j <= i + upper``."""
        scores, (left, right) = self.scores, self.scores.window
        right = 0 if scores.causal else right
        lower = None if left is None else scores.query_offset - left
        return lower, None if right is None else scores.query_offset + right

    def score(self, rows: _Range, keys: _Range) -> tuple[Array, Array | None]:
        """A tile of scores, minus infinity where a pair does not count, and the derivative of the cap."""
        sp, xp, scores = self.sp, self.sp.xp, self.scores
        q, k = self.q[..., rows[0] : rows[1], :], self.k[..., keys[0] : keys[1], :]
        s = scores.scale * xp.matmul(q, xp.matrix_transpose(k))
        slope = None
        if scores.softcap is not None:
            t = xp.tanh(s / scores.softcap)
            s, slope = scores.softcap * t, 1 - t * t
        hidden = self._hidden_by_place(rows, keys)
        for bias in (self.key_bias, self.bias):
            if bias is not None:
                part = _tile(bias, rows, keys)
                s = xp.where(part == -math.inf, part, s + part)
        if self.mask is not None:
            seen = _tile(self.mask, rows, keys)
            hidden = ~seen if hidden is None else hidden | ~seen
        if hidden is not None:
            s = xp.where(hidden, sp.full((), -math.inf, s.dtype), s)
        return s, slope

    def _hidden_by_place(self, rows: _Range, keys: _Range) -> Array | None:
        sp, hidden = self.sp, None
        i, j = sp.arange(*rows)[:, None], sp.arange(*keys)[None, :]
        lower, upper = self.band
        if lower is not None:
            hidden = j < i + lower
        if upper is not None:
            later = j > i + upper
            hidden = later if hidden is None else hidden | later
        if self.segments is not None:
            of = self.segments
            other = of[..., rows[0] : rows[1], None] != of[..., None, keys[0] : keys[1]]
            hidden = other if hidden is None else hidden | other
        return hidden


def _grouped(sp: Space, x: Array, inner: int, h_kv: int, group: int) -> Array:
    """The axis of heads before the last ``inner`` ones as two."""
    lead, last = x.shape[: x.ndim - inner], x.shape[x.ndim - inner :]
    heads = lead[-1] if lead else 1
    of = (h_kv, group) if heads == h_kv * group and group > 1 else (heads, 1)
    return sp.xp.reshape(x, (*lead[:-1], *of, *last))


def _segments(sp: Space, scores: Scores, q: Array, h_kv: int, group: int) -> Array | None:
    """The number of each token's segment, ``(..., h_kv, group, n)`` with axes of 1 where they are shared."""
    if scores.starts is None:
        return None
    n, heads = q.shape[-2], math.prod(q.shape[:-2])
    ids = np.stack([np.searchsorted(starts, np.arange(n), side="right") for starts in scores.starts])
    if len(ids) == 1:
        lead: tuple[int, ...] = (1, 1)
    elif len(ids) == heads:
        lead = (*q.shape[:-3], h_kv, group)
    else:
        lead = (*q.shape[:-3], 1, 1)
    return sp.asarray(ids.reshape(*lead, n), sp.xp.int64)


def _tile(x: Array, rows: _Range, keys: _Range) -> Array:
    x = x if x.shape[-2] == 1 else x[..., rows[0] : rows[1], :]
    return x if x.shape[-1] == 1 else x[..., keys[0] : keys[1]]


def _check(sp: Space, q: Array, k: Array, v: Array, scores: Scores) -> None:
    check_heads(sp, scores.key_bias, q=q, k=k, v=v)
    for name in ("bias", "sinks"):
        x = getattr(scores, name)
        if x is not None and not bool(sp.xp.all(sp.xp.isfinite(x) | (x == -math.inf))):
            raise NonFiniteError(f"{name} holds NaN or inf; expected finite numbers or -inf")


def forward(sp: Space, q: Array, k: Array, v: Array, scores: Scores) -> tuple[Array, Array]:
    """``out (..., h, n, d_v)`` and ``lse (..., h, n)``, float64.

    Raises
    ------
    NonFiniteError, DenominatorError
        As from `lingrad_rs.attention`.

    Notes
    -----
    Cost: O(d + d_v) time a pair of the tiles that the band leaves; memory beyond the results: tiles.
    """
    _check(sp, q, k, v, scores)
    xp, call = sp.xp, _Call.of(sp, q, k, v, scores)
    lead, (n, _) = call.q.shape[:-2], call.sizes
    out = sp.empty((*lead, n, v.shape[-1]), q.dtype)
    lse = sp.empty((*lead, n), xp.float64)
    for rows, ranges in call.tiles():
        count = rows[1] - rows[0]
        most = sp.full((*lead, count), -math.inf, q.dtype)
        sums, total = sp.zeros(most.shape, q.dtype), sp.zeros((*lead, count, v.shape[-1]), q.dtype)
        for keys in ranges:
            s, _ = call.score(rows, keys)
            before, most = most, xp.maximum(most, xp.max(s, axis=-1))
            level = xp.where(most == -math.inf, xp.zeros_like(most), most)
            weights = xp.exp(s - level[..., None])
            kept = xp.exp(before - level)
            sums = sums * kept + xp.sum(weights, axis=-1)
            total = total * kept[..., None] + xp.matmul(weights, call.v[..., keys[0] : keys[1], :])
        unseen = sums == 0
        wide = sp.wide(most) + xp.log(sp.wide(xp.where(unseen, xp.ones_like(sums), sums)))
        share = xp.where(unseen, xp.zeros_like(sums), 1 / xp.where(unseen, xp.ones_like(sums), sums))
        if call.sinks is not None:
            sink = sp.wide(call.sinks) + xp.zeros_like(wide)
            joined = xp.where(unseen, sink, xp.logaddexp(wide, sink))
            share = share * sp.astype(xp.where(unseen, xp.zeros_like(wide), xp.exp(wide - joined)), q.dtype)
            wide = joined
        elif not scores.empty_rows_are_zero and bool(xp.any(unseen)):
            _raise_for_row(sp, unseen, rows[0])
        out[..., rows[0] : rows[1], :] = total * share[..., None]
        lse[..., rows[0] : rows[1]] = wide
    shape = (*q.shape[:-1], v.shape[-1])
    out = xp.reshape(out, shape)
    check_results(sp, out=out)
    return sp.contiguous(out), sp.contiguous(xp.reshape(lse, shape[:-1]))


def _raise_for_row(sp: Space, unseen: Array, first: int) -> None:
    flags = sp.host(unseen).reshape(-1, unseen.shape[-1])
    head, row = (int(x[0]) for x in np.nonzero(flags))
    raise DenominatorError(f"row {first + row} of head {head} has no key to attend to; {core.NO_KEY_REMEDY}")


def backward(
    sp: Space, q: Array, k: Array, v: Array, scores: Scores, out: Array, lse: Array, dout: Array, *, check_finite: bool
) -> list[Array | None]:
    """``dq, dk, dv, dkey_bias, dbias, dsinks``, None of what was not given, those of what broadcasts in its own shape.

    Cost: as `forward`, 2.5 times.
    """
    if check_finite:
        check_heads(sp, dout=dout)
    xp, t, call = sp.xp, sp.xp.matrix_transpose, _Call.of(sp, q, k, v, scores)
    h_kv = k.shape[-3] if k.ndim > 2 else 1
    group = q.shape[-3] // h_kv if q.ndim > 2 and h_kv else 1
    up, made = (_grouped(sp, x, 2, h_kv, group) for x in (dout, out))
    lse = _grouped(sp, lse, 1, h_kv, group)
    delta = xp.sum(sp.wide(up) * sp.wide(made), axis=-1)
    dq, dk, dv = (sp.zeros(x.shape, q.dtype) for x in (call.q, call.k, call.v))
    biases = [(x, None if x is None else sp.zeros(x.shape, q.dtype)) for x in (call.key_bias, call.bias)]
    for rows, ranges in call.tiles():
        part = (..., slice(*rows))
        level, own_up, own_delta = lse[part], up[(*part, slice(None))], sp.astype(delta[part], q.dtype)
        empty = level == -math.inf
        level = sp.astype(xp.where(empty, xp.zeros_like(level), level), q.dtype)
        for keys in ranges:
            s, slope = call.score(rows, keys)
            f = xp.where(empty[..., None], xp.zeros_like(s), xp.exp(s - level[..., None]))
            of_keys = (..., slice(*keys), slice(None))
            e = xp.matmul(own_up, t(call.v[of_keys]))
            ds = xp.where(f >= 1, xp.zeros_like(f), times(sp, f, e - own_delta[..., None]))
            for bias, total in biases:
                if bias is not None and total is not None:
                    at = tuple(
                        slice(None) if size == 1 else slice(*r)
                        for size, r in zip(bias.shape[-2:], (rows, keys), strict=True)
                    )
                    total[(..., *at)] += _summed(
                        sp,
                        ds,
                        (
                            *bias.shape[:-2],
                            *(1 if x == 1 else y for x, y in zip(bias.shape[-2:], ds.shape[-2:], strict=True)),
                        ),
                    )
            ds = ds if slope is None else ds * slope
            of_rows = (..., slice(*rows), slice(None))
            dq[of_rows] += scores.scale * xp.matmul(ds, call.k[of_keys])
            own_dk = scores.scale * xp.matmul(t(ds), call.q[of_rows])
            dk[of_keys] += _summed(sp, own_dk, dk[of_keys].shape)
            dv[of_keys] += _summed(sp, xp.matmul(t(f), own_up), dv[of_keys].shape)
    dsinks = None
    if call.sinks is not None:
        share = xp.exp(sp.wide(call.sinks) - lse)
        dsinks = sp.astype(-xp.sum(share * delta, axis=-1), q.dtype)
        dsinks = xp.reshape(dsinks, q.shape[:-2] or (1,))
    grads = {"dq": xp.reshape(dq, q.shape), "dk": xp.reshape(dk, k.shape), "dv": xp.reshape(dv, v.shape)}
    kinds = (scores.key_bias, scores.bias)
    of_biases = [None if x is None else xp.reshape(total, x.shape) for x, (_, total) in zip(kinds, biases, strict=True)]
    if check_finite:
        vectors = {"dkey_bias": of_biases[0], "dsinks": dsinks}
        lined = {name: x[..., None] if x.ndim > 1 else x[None, :] for name, x in vectors.items() if x is not None}
        check_results(sp, **grads, **lined, **({} if of_biases[1] is None else {"dbias": of_biases[1]}))
    return [*(sp.contiguous(x) for x in grads.values()), *of_biases, dsinks]


def _summed(sp: Space, x: Array, shape: tuple[int, ...]) -> Array:
    """The sums of ``x`` over the axes along which an array of this shape broadcasts to it."""
    shape = (1,) * (x.ndim - len(shape)) + tuple(shape)
    axes = tuple(i for i, (a, b) in enumerate(zip(x.shape, shape, strict=True)) if a != b)
    return sp.xp.sum(x, axis=axes, keepdims=True) if axes else x
