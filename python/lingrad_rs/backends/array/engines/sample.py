"""Tokens of heads that are copied to the host, where the compiled core fits coefficients and draws landmarks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .... import _lingrad_rs as core
from ..device import Space
from ..problem.heads import Heads, chosen, rows_of_heads, side_by_side, weighs

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
    which = range(heads.count) if which is None else which
    rows, keys = np.arange(min(core.PREFIX, n)), np.arange(min(core.PREFIX, m))
    return _taken(sp, heads, which, rows, [keys] * len(which), spread=False)


def spread(sp: Space, heads: Heads, count: int, seed: int, which: Sequence[int] | None = None) -> list[Tokens]:
    """So many queries and keys of some heads, or of all, drawn all through the sequence as the core draws them.

    Keys are drawn among those whose bias leaves them a weight beside the others; where all are removed, the first ones
    stand for them.
    """
    n, m, _, _ = heads.sizes
    which = range(heads.count) if which is None else which
    keys = [core.stratified(m, count, seed + 1)] * len(which)
    if heads.key_bias is not None:
        live = [np.flatnonzero(x) for x in sp.host(weighs(sp, chosen(sp, heads.key_bias, which)))]
        keys = [x[core.stratified(len(x), count, seed + 1)] if len(x) else np.arange(min(count, m)) for x in live]
    return _taken(sp, heads, which, core.stratified(n, count, seed), keys, spread=True)


def _taken(
    sp: Space,
    heads: Heads,
    which: Sequence[int],
    queries: NDArray[np.int64],
    keys: Sequence[NDArray[np.int64]],
    *,
    spread: bool,
) -> list[Tokens]:
    """Some queries, and keys of each head; waits for the device: for as many heads at once as temporary arrays hold."""

    def part(x: Array, rows: NDArray[np.int64]) -> NDArray[Any]:
        heads_at_once = sp.tiles(len(which), rows.shape[1] * x.shape[2])
        return np.concatenate([sp.host(rows_of_heads(sp, x, which[a:b], rows[a:b])) for a, b in heads_at_once])

    of_keys = side_by_side(keys)
    q = part(heads.q, np.broadcast_to(queries, (len(which), len(queries))))
    k, v = part(heads.k, of_keys), part(heads.v, of_keys)
    bias = None if heads.key_bias is None else part(heads.key_bias[..., None], of_keys)
    return [
        Tokens(
            q[c],
            k[c, : len(own)],
            v[c, : len(own)],
            None if bias is None else bias[c, : len(own), 0],
            (queries, own) if spread else None,
        )
        for c, own in enumerate(keys)
    ]
