"""Self-attention with its projections, in the paper's form and with many heads.

The paper's form is ``y = f v`` with ``q = x w``, ``k = x``, ``v = x w_v``, so that ``dw = x^T dq``, ``dw_v = x^T dv``
and ``dx = dq w^T + dk + dv w_v^T``. With heads, ``q = x w_q``, ``k = x w_k`` and ``v = x w_v`` are cut into heads,
whose outputs, side by side, are ``o``, and ``y = o w_o``: ``do = dy w_o^T``, ``dw_o = o^T dy``, ``dw_q = x^T dq`` (w_k
and w_v alike), ``dx = dq w_q^T + dk w_k^T + dv w_v^T``.

With a score bound, a head's row ``z`` of queries or keys becomes ``u = z / |z|`` before it is turned by its position.
As ``du/dz = (1 - u u^T) / |z|`` and turning keeps lengths and inner products, a gradient ``g`` of the turned u becomes
``(g - u (u . g)) / |z|`` and is then turned back. A row of zeros stays zero, and so does its gradient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ....errors import NonFiniteError, ShapeError
from ....spec.engines import Engine
from .. import attention
from ..device import Space
from ..problem.finite import first_bad
from . import rows_of, sum_of_products

__all__ = ["WEIGHT_NAMES", "Inside", "SelfAttention"]

Array = Any

WEIGHT_NAMES = {2: ("w", "w_v"), 4: ("w_q", "w_k", "w_v", "w_o")}
"""By their number: those of the paper's form, those with heads."""
_ROPE_BASE = 10000.0


@dataclass(frozen=True)
class _Rope:
    """Cosines and sines of the angles ``p base^(-2i/d)`` at positions p, each ``(n, d/2)``.

    The pair ``(x_i, x_{i + d/2})`` is turned: ``y1 = x1 cos - x2 sin``, ``y2 = x2 cos + x1 sin``.
    """

    sp: Space
    cos: Array
    sin: Array

    def turn(self, x: Array, start: int, stop: int) -> Array:
        """``x (..., stop - start, d)``, turned."""
        return self._turned(x, self.cos[start:stop, :], self.sin[start:stop, :])

    def turn_back(self, x: Array, start: int, stop: int) -> Array:
        """Undoes `turn`, and pulls gradients back through it."""
        return self._turned(x, self.cos[start:stop, :], -self.sin[start:stop, :])

    def _turned(self, x: Array, cos: Array, sin: Array) -> Array:
        half = x.shape[-1] // 2
        x1, x2 = x[..., :half], x[..., half:]
        return self.sp.xp.concat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1)


def _rope(sp: Space, n: int, d: int, dtype: Any) -> _Rope:
    """For heads of the even width d; the angles are computed in float64."""
    frequencies = sp.asarray(_ROPE_BASE ** (-2.0 * np.arange(d // 2) / d), sp.xp.float64)
    angles = sp.wide(sp.arange(0, n))[:, None] * frequencies[None, :]
    return _Rope(sp, sp.astype(sp.xp.cos(angles), dtype), sp.astype(sp.xp.sin(angles), dtype))


@dataclass(frozen=True)
class _Projected:
    """``rows = x w`` head by head, normalised and turned where that was asked for."""

    w: Array | None
    """None: the rows are x itself."""
    rows: Array
    """``(batch, heads, n, width)``."""
    inverse_norms: Array | None = None
    """``1 / |z|`` of rows before they were normalised, 0 where ``z = 0``: float64 ``(batch, heads, n, 1)``."""
    rope: _Rope | None = None


@dataclass(frozen=True)
class Inside:
    """What the forward pass computes between x and y, for the backward pass to use."""

    q: _Projected
    k: _Projected
    v: _Projected
    out: Array
    """``(batch, heads, n, value width)``."""
    state: attention.State | None
    """None without tokens, or where no backward pass follows."""


def _project(sp: Space, x: Array, w: Array, heads: int, *, unit: bool = False, rope: _Rope | None = None) -> _Projected:
    """``x w`` of ``x (batch, n, d)``, each head's row normalised where ``unit``, then turned."""
    xp = sp.xp
    batch, n, d = x.shape
    width = w.shape[1] // heads
    rows = sp.empty((batch, heads, n, width), x.dtype)
    inverse_norms = sp.empty((batch, heads, n, 1), xp.float64) if unit else None
    for start, stop in sp.tiles(n, batch * max(d, heads * width)):
        z = rows_of(sp, x[:, start:stop, :]) @ w
        z = xp.permute_dims(xp.reshape(z, (batch, stop - start, heads, width)), (0, 2, 1, 3))
        if inverse_norms is not None:
            wide = sp.wide(z)
            square = xp.sum(wide * wide, axis=-1, keepdims=True)
            # The last term is 0, or NaN where the square is not finite.
            inverse = xp.where(square > 0, 1 / xp.sqrt(square), xp.zeros_like(square)) + 0 * square
            inverse_norms[:, :, start:stop, :] = inverse
            z = sp.astype(wide * inverse, x.dtype)
        rows[:, :, start:stop, :] = z if rope is None else rope.turn(z, start, stop)
    return _Projected(w, rows, inverse_norms, rope)


def _check_norms(sp: Space, **projected: _Projected) -> None:
    """Raise where a row cannot be normalised; waits for the device, once."""
    norms = {name: part.inverse_norms for name, part in projected.items() if part.inverse_norms is not None}
    bad = first_bad(sp, {name: sp.xp.isfinite(x) for name, x in norms.items()})
    if bad is not None:
        raise NonFiniteError(
            f"a row of {bad} = x w_{bad} holds NaN or infinity, or its square overflows; score_bound needs finite norms"
        )


def _side_by_side(sp: Space, x: Array) -> Array:
    """``(batch, heads, n, width)`` as ``(batch n, heads width)``."""
    batch, heads, n, width = x.shape
    return sp.xp.reshape(sp.xp.permute_dims(x, (0, 2, 1, 3)), (batch * n, heads * width))


def _pull_back(sp: Space, part: _Projected, gradient: Array, start: int, stop: int) -> Array:
    """The gradient of the tokens ``start .. stop`` with respect to ``x w``, side by side."""
    xp = sp.xp
    g = gradient[:, :, start:stop, :]
    if part.inverse_norms is not None:
        u = part.rows[:, :, start:stop, :]
        along = sp.astype(xp.sum(u * g, axis=-1, keepdims=True, dtype=xp.float64), u.dtype)
        g = sp.astype(sp.wide(g - u * along) * part.inverse_norms[:, :, start:stop, :], u.dtype)
    if part.rope is not None:
        g = part.rope.turn_back(g, start, stop)
    return _side_by_side(sp, g)


@dataclass(frozen=True)
class SelfAttention:
    """Self-attention on arrays ``(batch, n, d)``: its weights, and how attention is computed.

    The weights are ``(w, w_v)`` or ``(w_q, w_k, w_v, w_o)``; the paper's form is one head.
    """

    sp: Space
    weights: Sequence[Array]
    engine: Engine | attention.Planned
    causal: bool
    scale: float | None = None
    n_heads: int = 1
    n_kv_heads: int = 1
    rope: bool = False
    score_bound: float | None = None

    @staticmethod
    def of(sp: Space, weights: Sequence[Array], options: Any) -> SelfAttention:
        """With the options of a `lingrad_rs.SelfAttention`."""
        names = ("engine", "causal", "scale", "n_heads", "n_kv_heads", "rope", "score_bound")
        return SelfAttention(sp, weights, **{name: getattr(options, name) for name in names})

    def forward(self, x: Array) -> Array:
        """``y (batch, n, e)``. Memory beyond the output: q, k, v and the heads' outputs."""
        return self.finish(self.inside(x, keep=False))

    def backward(self, x: Array, dy: Array) -> tuple[Array, dict[str, Array]]:
        """``(dx, grads)``; computes `forward` again.

        Memory beyond the results: q, k, v, the heads' outputs and the gradients of the four.
        """
        dx, grads, _ = self.pull_back(x, self.inside(x, keep=True), dy, samples=0)
        return dx, grads

    def inside(self, x: Array, *, keep: bool) -> Inside:
        """Everything up to the heads' outputs, and with ``keep`` what `pull_back` needs."""
        sp = self.sp
        batch, n, d = x.shape
        if d == 0:
            raise ShapeError("x has width 0; expected at least 1")
        h, h_kv = self.n_heads, self.n_kv_heads
        if len(self.weights) == 2:
            w, w_v = self.weights
            q, k = _project(sp, x, w, 1), _Projected(None, sp.xp.reshape(x, (batch, 1, n, d)))
        else:
            w_q, w_k, w_v, _ = self.weights
            rope = _rope(sp, n, w_q.shape[1] // h, x.dtype) if self.rope else None
            q, k = (
                _project(sp, x, w, heads, unit=self.score_bound is not None, rope=rope)
                for w, heads in ((w_q, h), (w_k, h_kv))
            )
            _check_norms(sp, q=q, k=k)
        v = _project(sp, x, w_v, h_kv)
        if batch * n == 0:
            return Inside(q, k, v, sp.zeros((batch, h, n, v.rows.shape[-1]), x.dtype), None)
        options = {"engine": self.engine, "causal": self.causal, "scale": self.score_scale, "keep": keep}
        out, state = attention.forward(sp, q.rows, k.rows, v.rows, None, **options)
        return Inside(q, k, v, out, state)

    @property
    def score_scale(self) -> float:
        """The scale; where none is given the score bound, else ``1/sqrt(width of a head)``."""
        if self.scale is not None:
            return self.scale
        return self.score_bound or math.sqrt(self.n_heads / self.weights[0].shape[1])

    def finish(self, inside: Inside) -> Array:
        """From the heads' outputs to ``y``."""
        sp, xp = self.sp, self.sp.xp
        batch, h, n, width = inside.out.shape
        if len(self.weights) == 2:
            return xp.reshape(inside.out, (batch, n, width))
        w_o = self.weights[3]
        y = sp.empty((batch, n, w_o.shape[1]), inside.out.dtype)
        for start, stop in sp.tiles(n, batch * h * width):
            o = _side_by_side(sp, inside.out[:, :, start:stop, :])
            y[:, start:stop, :] = xp.reshape(o @ w_o, (batch, stop - start, w_o.shape[1]))
        return y

    def pull_back(
        self, x: Array, inside: Inside, dy: Array, *, samples: int
    ) -> tuple[Array, dict[str, Array], list[dict[str, Any]]]:
        """`backward`, given what the forward pass computed; and a report of each head, as from attention."""
        sp, xp = self.sp, self.sp.xp
        is_combined = len(self.weights) == 2
        batch, h, n, width = inside.out.shape
        parts, reports = [inside.q, inside.k, inside.v], []
        if inside.state is None:
            gradients = [part.rows for part in parts]  # without tokens
        else:
            if is_combined:
                dout = xp.reshape(dy, (batch, 1, n, width))
            else:
                dout = _project(sp, dy, xp.matrix_transpose(self.weights[3]), h).rows
            q, k, v = (part.rows for part in parts)
            (*gradients, _), reports = attention.backward(sp, q, k, v, None, inside.state, dout, samples=samples)
        names = WEIGHT_NAMES[len(self.weights)]
        sums = {name: sp.zeros(w.shape, xp.float64) for name, w in zip(names, self.weights, strict=True)}
        names = ("w", "", "w_v") if is_combined else names[:3]
        dx = sp.empty(x.shape, x.dtype)
        for start, stop in sp.tiles(n, batch * max(x.shape[2], *(w.shape[1] for w in self.weights))):
            x_tile = rows_of(sp, x[:, start:stop, :])
            tile = sp.zeros(x_tile.shape, x.dtype)
            for name, part, gradient in zip(names, parts, gradients, strict=True):
                dz = _pull_back(sp, part, gradient, start, stop)
                if part.w is None:
                    tile += dz
                else:
                    sums[name] += sum_of_products(sp, x_tile, dz)
                    tile += dz @ xp.matrix_transpose(part.w)
            dx[:, start:stop, :] = xp.reshape(tile, (batch, stop - start, x.shape[2]))
            if not is_combined:
                o = _side_by_side(sp, inside.out[:, :, start:stop, :])
                sums["w_o"] += sum_of_products(sp, o, rows_of(sp, dy[:, start:stop, :]))
        return dx, {name: sp.contiguous(sp.astype(total, x.dtype)) for name, total in sums.items()}, reports
