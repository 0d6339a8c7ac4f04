"""Heads of attention, what their forward pass leaves, and their gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ....spec.engines import HeadEngine
from ..device import Space

__all__ = [
    "Grads",
    "Heads",
    "Saved",
    "chosen",
    "dots",
    "heads_at",
    "live_keys",
    "part_of",
    "rows_of_heads",
    "side_by_side",
    "weighs",
]

Array = Any
Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Heads:
    """Heads that share no keys.

    Attributes
    ----------
    q : array, shape (heads, n, d)
    k : array, shape (heads, m, d)
    v : array, shape (heads, m, d_v)
    key_bias : array, shape (heads, m), or None
    causal : bool
    scale : float
    first : int
        The number of the first one, for what errors say.
    """

    q: Array
    k: Array
    v: Array
    key_bias: Array | None
    causal: bool
    scale: float
    first: int = 0

    @property
    def count(self) -> int:
        """How many."""
        return self.q.shape[0]

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """``n, m, d, d_v``."""
        return self.q.shape[1], self.k.shape[1], self.q.shape[2], self.v.shape[2]

    def part(self, start: int, end: int) -> Heads:
        """Some of them."""
        bias = None if self.key_bias is None else self.key_bias[start:end, ...]
        q, k, v = (x[start:end, ...] for x in (self.q, self.k, self.v))
        return replace(self, q=q, k=k, v=v, key_bias=bias, first=self.first + start)


@dataclass(frozen=True)
class Saved:
    """What the backward pass needs beside the inputs, ``out`` and its gradient.

    Weights of the normalised rows are ``f_ij = row_scale_i e^(s_ij - row_max_i)``, where ``s`` are the engine's own
    scores, and their exponentials its own.

    Attributes
    ----------
    engine : Exact, Polynomial or Landmark
        That of the first head; those of the others differ in numbers alone, which `constants` holds.
    row_max, row_scale : arrays, shape (heads, n)
    constants : object
        The numbers of each head that its engine holds, or took from the data; see `part_of`.
    """

    engine: HeadEngine
    row_max: Array
    row_scale: Array
    constants: Any

    def part(self, start: int, end: int) -> Saved:
        """That of some heads."""
        rows = {"row_max": self.row_max[start:end, :], "row_scale": self.row_scale[start:end, :]}
        return replace(self, **rows, constants=part_of(self.constants, start, end))


def part_of(constants: Any, start: int, end: int) -> Any:
    """Constants of some heads: arrays whose first axis they are, None, or a dataclass of such."""
    if constants is None:
        return None
    if hasattr(constants, "shape"):
        return constants[start:end, ...]
    each = {of.name: part_of(getattr(constants, of.name), start, end) for of in fields(constants)}
    return type(constants)(**each)


@dataclass(frozen=True)
class Grads:
    """Gradients, of the shapes of `Heads`."""

    dq: Array
    dk: Array
    dv: Array
    dkey_bias: Array | None


def live_keys(sp: Space, heads: Heads) -> Array | None:
    """Which keys have a weight, ``(heads, m)``; None where there is no bias."""
    return None if heads.key_bias is None else weighs(sp, heads.key_bias)


def weighs(sp: Space, bias: Array) -> Array:
    """Where a bias leaves a key a weight beside the others: also numbers like -1e9 stand for minus infinity."""
    bias = sp.wide(bias)
    largest = sp.xp.max(bias, axis=-1, keepdims=True)
    return sp.xp.exp(bias - sp.xp.where(largest == -math.inf, sp.xp.zeros_like(largest), largest)) > 0


def dots(sp: Space, x: Array, y: Array) -> Array:
    """``x_i.y_i`` of rows ``(heads, rows, width)`` in float64, ``(heads, rows)``."""
    count, rows, width = x.shape
    result = sp.empty((count, rows), sp.xp.float64)
    for start, end in sp.tiles(rows, 3 * count * width):
        product = sp.wide(x[:, start:end, :]) * sp.wide(y[:, start:end, :])
        result[:, start:end] = sp.xp.sum(product, axis=-1)
    return result


def side_by_side(rows: Sequence[Rows]) -> Rows:
    """``(heads, rows)``: the last row of each, of which it has at least one, fills up those that have fewer."""
    most = max(map(len, rows))
    return np.stack([np.pad(of_head, (0, most - len(of_head)), mode="edge") for of_head in rows])


def rows_of_heads(sp: Space, x: Array, which: Sequence[int], rows: Rows) -> Array:
    """Rows ``(some heads, rows)`` of those heads of ``x (heads, all rows, width)``."""
    count, n, width = x.shape
    index = (np.asarray(which, np.int64)[:, None] * n + rows).reshape(-1)
    taken = sp.xp.take(sp.xp.reshape(x, (count * n, width)), sp.asarray(index, sp.xp.int64), axis=0)
    return sp.xp.reshape(taken, (*rows.shape, width))


def chosen(sp: Space, x: Array, which: Sequence[int]) -> Array:
    """Some heads of an array; itself for all of them."""
    if list(which) == list(range(x.shape[0])):
        return x
    return sp.xp.take(x, sp.asarray(which, sp.xp.int64), axis=0)


def heads_at(sp: Space, heads: Heads, which: Sequence[int]) -> Heads:
    """Some of the heads, copied unless they are all. Their numbers are lost."""
    bias = None if heads.key_bias is None else chosen(sp, heads.key_bias, which)
    q, k, v = (chosen(sp, x, which) for x in (heads.q, heads.k, heads.v))
    return replace(heads, q=q, k=k, v=v, key_bias=bias)
