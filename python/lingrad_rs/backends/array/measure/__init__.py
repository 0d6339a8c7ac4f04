"""Measured errors: rows drawn at random, computed exactly in float64, and compared with given ones.

Which rows, and what their errors say of all, is the core's to decide, so that equal seeds draw equal rows on every
backend: it is handed guides, some numbers a row. Rows of several heads are computed together, over chunks
of keys; where heads have drawn fewer rows than others (one was drawn twice), their last row fills up.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .... import _lingrad_rs as core
from ....errors import DenominatorError
from ....spec.plan import ErrorEstimate
from .. import tiles
from ..device import Space
from ..problem.finite import check_heads
from ..problem.heads import Heads, dots, rows_of_heads, side_by_side
from .guides import Known

__all__ = [
    "Draw",
    "ExactRows",
    "KeyGradients",
    "draw_rows",
    "exact_rows",
    "key_gradients",
    "measure_error",
    "padded",
    "square_sums",
    "take_rows",
]

Array = Any
Floats = NDArray[np.float64]
Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Draw:
    """Rows drawn out of ``total``, in order, each once, and what each of them stands for; on the host."""

    rows: Rows
    weights: Floats
    total: int

    @staticmethod
    def of(guides: Sequence[Floats], samples: int, seed: int) -> Draw:
        """``samples`` draws by guides, each a number for every row, or all rows where there are no more."""
        rows, weights = core.draw_rows(np.stack(guides), samples, seed)
        return Draw(rows, weights, len(guides[0]))

    def compare(
        self, exact: Floats, got: Floats, given: float | None = None, more: Floats | None = None
    ) -> ErrorEstimate:
        """The estimate for rows ``(rows, width)`` in the order of `rows`; those that fill up may follow.

        ``given`` is what the squares of all rows got add up to, where that is known, and ``more`` the squared error
        that is expected in each besides, of unknown direction.
        """
        exact, got = (x[: len(self.rows)].astype(np.float64, copy=False) for x in (exact, got))
        own = [np.sum(x**2, axis=1) for x in (exact - got, exact, got)]
        squares = np.stack([*own, np.zeros(len(own[0])) if more is None else more[: len(own[0])]], axis=1)
        return ErrorEstimate(*core.estimate_error(squares, self.weights, self.total, given))


def draw_rows(guides: Sequence[Floats], samples: int, seed: int) -> list[Draw]:
    """A draw of each head's rows by guides ``(heads, rows)``."""
    return [Draw.of(of_head, samples, seed) for of_head in zip(*guides, strict=True)]


def square_sums(sp: Space, x: Array) -> Floats:
    """``sum |x_i|^2`` of each of some heads ``(heads, rows, width)``; waits for the device, once."""
    return np.sum(sp.host(dots(sp, x, x)), axis=1)


def padded(draws: Sequence[Draw]) -> Rows:
    """The rows of all heads, ``(heads, rows)``: the last one fills up those that have fewer."""
    return side_by_side([draw.rows for draw in draws])


def take_rows(sp: Space, x: Array, rows: Rows) -> Array:
    """Rows ``(heads, rows)`` of ``x (heads, all rows, width)``, in float64."""
    return sp.wide(rows_of_heads(sp, x, range(x.shape[0]), rows))


@dataclass(frozen=True)
class ExactRows:
    """Exact attention of some queries of each head, in float64.

    Attributes
    ----------
    out : array, shape (heads, rows, d_v)
    dq : array, shape (heads, rows, d), or None
    largest, sums : arrays, shape (heads, rows)
        The largest score and ``sum_j e^(s_j - largest)``.
    """

    out: Array
    dq: Array | None
    largest: Array
    sums: Array

    def good(self, sp: Space) -> Array:
        """Whether every row has a denominator, as an array of no axes."""
        return sp.xp.all((self.sums > 0) & sp.xp.isfinite(self.sums))

    def check(self, sp: Space, rows: Rows, heads: Sequence[int]) -> None:
        """Raise where a row has none; ``heads`` are their numbers. Waits for the device.

        Raises
        ------
        DenominatorError
        """
        if bool(self.good(sp)):
            return
        largest, sums = sp.host(self.largest), sp.host(self.sums)
        h, i = np.argwhere(~((sums > 0) & np.isfinite(sums)))[0]
        where = f"row {rows[h, i]} of head {heads[h]}"
        if largest[h, i] == -math.inf:
            raise DenominatorError(
                f"{where} has no key to attend to: key_bias is -inf (or its scores overflow) for every key that it may "
                "see; leave such rows out, pad on the right where causal, or give removed keys a large negative bias "
                "(-1e4, say) in place of -inf"
            )
        raise DenominatorError(f"{where} has scores that overflow; make q, k, scale or key_bias smaller")


def exact_rows(sp: Space, heads: Heads, rows: Rows, dout: Array | None = None) -> ExactRows:
    """Rows ``(heads, rows)`` of exact attention, and of dq where there is ``dout (heads, rows, d_v)`` in float64.

    ``out_i = sum_j f_ij v_j`` and ``dq_i = scale sum_j f_ij (dout_i.v_j - dout_i.out_i) k_j``. Denominators are for the
    caller to look at: see `ExactRows.check`.

    Cost: O(rows m (d + d_v)) time a head; memory: tiles.
    """
    xp, t = sp.xp, sp.xp.matrix_transpose
    count, width = rows.shape
    _, m, d, d_v = heads.sizes
    q, place = take_rows(sp, heads.q, rows), sp.asarray(rows, xp.int64)
    most, sums = sp.full((count, width), -math.inf, xp.float64), sp.zeros((count, width), xp.float64)
    totals = sp.zeros((count, width, d_v if dout is None else d_v + 2 * d), xp.float64)
    end = int(rows.max()) + 1 if heads.causal else m
    for a, b in sp.tiles(end, count * (4 * width + 2 * (d + d_v))):
        k, v = sp.wide(heads.k[:, a:b, :]), sp.wide(heads.v[:, a:b, :])
        bias = None if heads.key_bias is None else sp.wide(heads.key_bias[:, None, a:b])
        s = heads.scale * xp.matmul(q, t(k))
        if bias is not None:
            s = tiles.biased(sp, s, bias)
        if heads.causal:
            s = xp.where(sp.arange(a, b) <= place[..., None], s, sp.full((), -math.inf, xp.float64))
        before, most = most, xp.maximum(most, xp.max(s, axis=-1))
        level = xp.where(most == -math.inf, xp.zeros_like(most), most)
        weights, by = xp.exp(s - level[..., None]), xp.exp(before - level)
        parts = [xp.matmul(weights, v)]
        if dout is not None:
            parts += [xp.matmul(weights, k), xp.matmul(tiles.times(sp, weights, xp.matmul(dout, t(v))), k)]
        sums = sums * by + xp.sum(weights, axis=-1)
        totals = totals * by[..., None] + xp.concat(parts, axis=-1)
    totals = totals / xp.where(sums > 0, sums, xp.ones_like(sums))[..., None]
    out = totals[..., :d_v]
    dq = None
    if dout is not None:
        delta = xp.sum(dout * out, axis=-1, keepdims=True)
        dq = heads.scale * (totals[..., d_v + d :] - delta * totals[..., d_v : d_v + d])
    return ExactRows(out, dq, most, sums)


@dataclass(frozen=True)
class KeyGradients:
    """Gradients of keys: ``dk (heads, keys, d)``, ``dv (heads, keys, d_v)``, ``db (heads, keys, 1)``."""

    dk: Array
    dv: Array
    db: Array


def key_gradients(sp: Space, heads: Heads, keys: Rows, dout: Array, delta: Array, log_sums: Array) -> KeyGradients:
    """What all queries give keys ``(heads, keys)``, exact but for the row sums, in float64.

    ``f_ij = e^(s_ij - log_sums_i)``, ``dS_ij = f_ij (dout_i.v_j - delta_i)``, ``dk_j = scale sum_i dS_ij q_i``,
    ``dv_j = sum_i f_ij dout_i``, ``db_j = sum_i dS_ij``.

    Parameters
    ----------
    dout : array, shape (heads, n, d_v)
    delta, log_sums : arrays of float64, shape (heads, n)
        ``dout_i.out_i``, and the logarithms of the row sums.

    Notes
    -----
    Cost: O(keys n (d + d_v)) time a head; memory: tiles.
    """
    xp, t = sp.xp, sp.xp.matrix_transpose
    count, width = keys.shape
    n, _, d, d_v = heads.sizes
    k, v, place = take_rows(sp, heads.k, keys), take_rows(sp, heads.v, keys), sp.asarray(keys, xp.int64)[:, None, :]
    bias = None if heads.key_bias is None else t(take_rows(sp, heads.key_bias[..., None], keys))
    dk, dv, db = (sp.zeros((count, width, columns), xp.float64) for columns in (d, d_v, 1))
    start = int(keys.min()) if heads.causal else 0
    for a, b in sp.tiles(n - start, count * (4 * width + 2 * (d + d_v))):
        i = slice(start + a, start + b)
        q, up = sp.wide(heads.q[:, i, :]), sp.wide(dout[:, i, :])
        exponent = heads.scale * xp.matmul(q, t(k)) - log_sums[:, i, None]
        if bias is not None:
            exponent = tiles.biased(sp, exponent, bias)
        if heads.causal:
            seen = sp.arange(start + a, start + b)[:, None] >= place
            exponent = xp.where(seen, exponent, sp.full((), -math.inf, xp.float64))
        f = xp.exp(exponent)
        ds = tiles.times(sp, f, xp.matmul(up, t(v)) - delta[:, i, None])
        dk = dk + xp.matmul(t(ds), q)
        dv = dv + xp.matmul(t(f), up)
        db = db + xp.sum(ds, axis=1)[..., None]
    return KeyGradients(heads.scale * dk, dv, db)


def measure_error(
    sp: Space,
    q: Array,
    k: Array,
    v: Array,
    key_bias: Array | None,
    out: Array,
    *,
    causal: bool,
    scale: float,
    samples: int,
    seed: int,
) -> tuple[float, float, float, int]:
    """``||out - exact||_F / ||exact||_F`` over all heads, from rows computed exactly: ``(relative, low, high, rows)``.

    Parameters
    ----------
    q, k, v, key_bias, out
        As `lingrad_rs.measure_error` takes them, with any leading axes, and keys that groups of heads may share.

    Raises
    ------
    NonFiniteError, DenominatorError

    Notes
    -----
    Cost: O(samples m (d + d_v)) time; the squared sizes of all queries are copied to the host.
    """
    xp = sp.xp
    check_heads(sp, key_bias, q=q, k=k, v=v, out=out)
    flat = lambda x, last: xp.reshape(x, (math.prod(x.shape[:-last]), *x.shape[-last:]))  # noqa: E731
    q, k, v, out = (flat(x, 2) for x in (q, k, v, out))
    bias = None if key_bias is None else flat(key_bias, 1)
    n, group = q.shape[1], q.shape[0] // k.shape[0]
    shared = lambda x: x if group == 1 or x is None else xp.repeat(x, group, axis=0)  # noqa: E731
    whole = Heads(q, shared(k), shared(v), shared(bias), causal, scale)
    sizes = sp.host(dots(sp, out, out))
    by = [*Known.of(sp, whole).of_queries(sp), sizes]
    draw = Draw.of([guide.reshape(-1) for guide in by], samples, seed)
    of_heads = [(int(h), draw.rows[draw.rows // n == h] % n) for h in np.unique(draw.rows // n)]
    parts, got = [], []
    for h, rows in of_heads:
        kv = h // group
        own_bias = None if bias is None else bias[kv : kv + 1, ...]
        one = Heads(q[h : h + 1, ...], k[kv : kv + 1, ...], v[kv : kv + 1, ...], own_bias, causal, scale, h)
        parts.append(exact_rows(sp, one, rows[None, :]))
        got.append(take_rows(sp, out[h : h + 1, ...], rows[None, :]))
    if not bool(xp.all(xp.stack([part.good(sp) for part in parts]))):
        for part, (h, rows) in zip(parts, of_heads, strict=True):
            part.check(sp, rows[None, :], [h])
    exact = sp.host(xp.concat([part.out for part in parts], axis=1))[0]
    estimate = draw.compare(exact, sp.host(xp.concat(got, axis=1))[0], float(np.sum(sizes)))
    return estimate.relative, estimate.low, estimate.high, estimate.rows
