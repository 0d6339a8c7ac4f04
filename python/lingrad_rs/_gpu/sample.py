"""Tokens of heads that are copied to the host, where the compiled core fits coefficients and draws landmarks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import _lingrad_rs as core
from .causal import PREFIX
from .device import Space
from .heads import Heads
from .measure import chosen

__all__ = ["FIT", "POOL", "Tokens", "first", "spread"]

Array = Any

FIT = 256
"""Queries, and keys, that coefficients are fitted to."""
POOL = 4096
"""Queries, and keys, that landmarks are drawn from."""


@dataclass(frozen=True)
class Tokens:
    """Sampled tokens of a head, and where they stand (None: from the first on)."""

    q: NDArray[Any]
    k: NDArray[Any]
    v: NDArray[Any]
    key_bias: NDArray[Any] | None
    positions: tuple[NDArray[np.int64], NDArray[np.int64]] | None


def first(sp: Space, heads: Heads, which: Sequence[int] | None = None) -> list[Tokens]:
    """The first tokens of some heads, or of all, as many as constants may be taken from under a mask."""
    n, m, _, _ = heads.sizes
    rows = np.arange(min(PREFIX, n)), np.arange(min(PREFIX, m))
    return _taken(sp, heads, which, rows, None)


def spread(sp: Space, heads: Heads, count: int, seed: int, which: Sequence[int] | None = None) -> list[Tokens]:
    """So many queries and keys of some heads, or of all, drawn all through the sequence as the core draws them."""
    n, m, _, _ = heads.sizes
    rows = core.stratified(n, count, seed), core.stratified(m, count, seed + 1)
    return _taken(sp, heads, which, rows, rows)


def _taken(
    sp: Space,
    heads: Heads,
    which: Sequence[int] | None,
    rows: tuple[NDArray[np.int64], NDArray[np.int64]],
    positions: tuple[NDArray[np.int64], NDArray[np.int64]] | None,
) -> list[Tokens]:
    """Waits for the device: for as many heads at once as temporary arrays hold."""
    which = range(heads.count) if which is None else which

    def part(x: Array, rows: NDArray[np.int64]) -> NDArray[Any]:
        index, width = sp.asarray(rows, sp.xp.int64), len(rows) * math.prod(x.shape[2:])
        heads_at_once = sp.tiles(len(which), width)
        return np.concatenate([sp.host(sp.xp.take(chosen(sp, x, which[a:b]), index, axis=1)) for a, b in heads_at_once])

    q, k, v = part(heads.q, rows[0]), part(heads.k, rows[1]), part(heads.v, rows[1])
    bias = None if heads.key_bias is None else part(heads.key_bias, rows[1])
    return [Tokens(q[c], k[c], v[c], None if bias is None else bias[c], positions) for c in range(len(q))]
