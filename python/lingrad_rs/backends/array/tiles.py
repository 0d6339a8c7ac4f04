"""What happens entry by entry to tiles of scores, in plain array code, or by one kernel where there is one."""

from __future__ import annotations

import math
from typing import Any

from . import kernels
from .device import Space

__all__ = ["biased", "exponentials", "gaussian", "keep", "score_gradients", "times"]

Array = Any


def keep(sp: Space, keys: int, first: Array, last: Array) -> Array:
    """Which of so many keys each row sees: those from ``first`` on and before ``last``, ``(..., rows, keys)``."""
    index = sp.xp.astype(sp.arange(0, keys), first.dtype, copy=False)
    return (index >= first[..., None]) & (index < last[..., None])


def biased(sp: Space, scores: Array, bias: Array) -> Array:
    """Scores with the biases that broadcast against them; minus infinity removes whatever there is."""
    return sp.xp.where(bias == -math.inf, bias, scores + bias)


def times(sp: Space, weights: Array, x: Array) -> Array:
    """Weights times numbers: 0 where the weight is, though the number be infinite or NaN.

    What a key without weight holds may overflow in a product, and must not be seen.
    """
    return sp.xp.where(weights == 0, sp.xp.zeros_like(weights), weights * x)


def exponentials(
    sp: Space, s: Array, most: Array, bias: Array | None, first: Array | None, last: Array | None
) -> tuple[Array, Array, Array]:
    """``e^(s + bias - M)`` with the rows' greatest exponent M, and their sums.

    Parameters
    ----------
    s : array, shape (batch, blocks, rows, keys)
        Scores; they are not needed afterwards.
    most : array, shape (batch, blocks, rows)
        What M is at least; minus infinity for nothing.
    bias : array, shape (batch, blocks, keys), optional
        Added to the scores; minus infinity removes a key.
    first, last : arrays of int32, shape (blocks, rows), optional
        The keys that each row sees are those from ``first`` on and before ``last``; all unless given.

    Returns
    -------
    weights : array, shape (batch, blocks, rows, keys)
    most : array, shape (batch, blocks, rows)
        M; 0 for a row that sees nothing.
    sums : array, shape (batch, blocks, rows)
    """
    if kernels.usable(s):
        return kernels.exponentials(s, most, bias, first, last)
    xp = sp.xp
    s = _masked(sp, s, bias, first, last)
    most = xp.maximum(most, xp.max(s, axis=-1))
    most = xp.where(most == -math.inf, xp.zeros_like(most), most)
    weights = xp.exp(s - most[..., None])
    return weights, most, xp.sum(weights, axis=-1)


def score_gradients(
    sp: Space,
    s: Array,
    e: Array,
    most: Array,
    scale: Array,
    delta: Array,
    bias: Array | None,
    first: Array | None,
    last: Array | None,
) -> tuple[Array, Array]:
    """``f = e^(s + bias - M) scale`` and the scores' gradients ``f (e - delta)``, 0 where ``f`` is.

    Shapes are those of `exponentials`; ``e`` is ``dout v^T``, shaped as ``s``, and ``scale`` and ``delta`` as ``most``.
    Neither ``s`` nor ``e`` is needed afterwards.
    """
    if kernels.usable(s):
        return kernels.score_gradients(s, e, most, scale, delta, bias, first, last)
    f = sp.xp.exp(_masked(sp, s, bias, first, last) - most[..., None]) * scale[..., None]
    return f, times(sp, f, e - delta[..., None])


def _masked(sp: Space, s: Array, bias: Array | None, first: Array | None, last: Array | None) -> Array:
    if bias is not None:
        s = biased(sp, s, bias[..., None, :])
    if first is not None and last is not None:
        s = sp.xp.where(keep(sp, s.shape[-1], first, last), s, sp.full((), -math.inf, s.dtype))
    return s


def gaussian(sp: Space, products: Array, offsets: Array, norms: Array) -> Array:
    """``e^(products + offsets - norms)``, of exponents that are at most 0 but for rounding.

    ``products (batch, blocks, r, tokens)``, not needed afterwards, ``offsets (batch, r)`` and
    ``norms (batch, blocks, tokens)``.
    """
    if kernels.usable(products):
        return kernels.gaussian(products, offsets, norms)
    exponents = products + offsets[:, None, :, None] - norms[:, :, None, :]
    return sp.xp.exp(sp.xp.where(exponents > 0, sp.xp.zeros_like(exponents), exponents))
