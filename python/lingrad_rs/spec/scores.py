"""How scores are made of queries and keys, and which pairs count: the options of attention, checked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import _check
from ..errors import ArgumentError, ShapeError

__all__ = ["Scores", "scores_of"]

Array = Any


@dataclass(frozen=True, slots=True)
class Scores:
    """``s_ij = softcap tanh(scale q_i.k_j / softcap) + key_bias_j + bias_ij`` of the pairs that count.

    Arrays lie as they were given, but for axes of 1 that line them up with q, so that they broadcast.

    Attributes
    ----------
    scale : float
    causal : bool
    query_offset : int
        Row i stands at key ``i + query_offset``.
    window : pair of int or None
        Keys before and after a row's own that it sees; None for all.
    starts : list of lists of int, optional
        Where packed sequences start: one list for all heads, or for each of so many equal runs of them.
    softcap : float, optional
    empty_rows_are_zero : bool
        Whether a row without a key to attend to is 0, and no error.
    key_bias : array, shape (..., h_kv, m), optional
    mask : array of bool, shape (..., h, n, m), optional
    bias : array, shape (..., h, n, m), optional
    bias_shape : tuple of int, optional
        That of the bias, lined up, before a backend broadcasts it.
    sinks : array, shape (..., h), optional
    """

    scale: float
    causal: bool = False
    query_offset: int = 0
    window: tuple[int | None, int | None] = (None, None)
    starts: list[list[int]] | None = None
    softcap: float | None = None
    empty_rows_are_zero: bool = False
    key_bias: Array | None = None
    mask: Array | None = None
    bias: Array | None = None
    bias_shape: tuple[int, ...] | None = None
    sinks: Array | None = None

    def needs_exact(self) -> str | None:
        """An option that the exact engine alone has, if there is one."""
        given = {
            "mask": self.mask is not None,
            "bias": self.bias is not None,
            "softcap": self.softcap is not None,
            "window": self.window != (None, None),
        }
        return next((name for name, there in given.items() if there), None)

    def is_plain(self, n: int, m: int) -> bool:
        """Whether there is nothing but a scale, a key bias, and a causal mask over as many queries as keys."""
        return (
            self.needs_exact() is None
            and self.sinks is None
            and self.starts is None
            and not self.empty_rows_are_zero
            and not (self.causal and (self.query_offset != 0 or n != m))
        )


def scores_of(
    q: Array,
    k: Array,
    *,
    scale: object = None,
    causal: object = False,
    key_bias: Array | None = None,
    query_offset: object = None,
    window: object = None,
    segment_ids: Array | None = None,
    mask: Array | None = None,
    bias: Array | None = None,
    softcap: object = None,
    sinks: Array | None = None,
    empty_rows: object = "error",
) -> Scores:
    """The options of a call, once they are known to fit q and k and each other.

    Arrays are known to be arrays of their kinds; ``segment_ids`` is NumPy's.
    """
    m = k.shape[-2]
    causal = _check.flag("causal", causal)
    sides = _window(window)
    banded = causal or sides != (None, None)
    if empty_rows not in ("error", "zero"):
        raise ArgumentError(f"empty_rows is {_check.shown(empty_rows)}; expected 'error' or 'zero'")
    bias = None if bias is None else _of_pairs("bias", bias, q, m)
    return Scores(
        scale=1 / math.sqrt(q.shape[-1]) if scale is None else _check.number("scale", scale),
        causal=causal,
        query_offset=_offset(query_offset, q, k, causal, banded, segment_ids is not None),
        window=sides,
        starts=None if segment_ids is None else _starts(segment_ids, q, m),
        softcap=None if softcap is None else _check.positive("softcap", softcap),
        empty_rows_are_zero=empty_rows == "zero",
        key_bias=None if key_bias is None else _of_keys("key_bias", key_bias, k.shape[:-1], "k", k),
        mask=None if mask is None else _of_pairs("mask", mask, q, m),
        bias=bias,
        bias_shape=None if bias is None else bias.shape,
        sinks=None if sinks is None else _sinks(sinks, q),
    )


def _window(window: object) -> tuple[int | None, int | None]:
    if window is None:
        return None, None
    if not isinstance(window, Sequence) or isinstance(window, str) or len(window) != 2:
        raise ArgumentError(f"window is {_check.shown(window)}; expected a pair (left, right) of integers >= 0 or None")
    left, right = (None if x is None else _check.integer(f"window[{i}]", x, 0) for i, x in enumerate(window))
    return left, right


def _offset(offset: object, q: Array, k: Array, causal: bool, banded: bool, packed: bool) -> int:
    n, m = q.shape[-2], k.shape[-2]
    if offset is None:
        if banded and n != m:
            raise ShapeError(
                f"k has shape {k.shape}; expected {(*k.shape[:-2], n, k.shape[-1])} to match q of shape {q.shape} with "
                f"{'causal=True' if causal else 'a window'}, or query_offset, which tells where row 0 stands: at key 0 "
                f"for 0, and at the end of a cache for m - n = {m - n}"
            )
        return 0
    if isinstance(offset, bool | np.bool_) or not isinstance(offset, int | np.integer):
        raise ArgumentError(f"query_offset is {_check.shown(offset)}; expected an integer")
    if not -n <= offset <= m:
        raise ArgumentError(
            f"query_offset is {_check.shown(int(offset))}; expected {-n} to {m}: n = {n} queries, m = {m} keys"
        )
    if packed and offset != 0:
        raise ArgumentError(f"query_offset is {offset} with segment_ids, whose tokens are queries and keys; expected 0")
    return int(offset)


def _starts(ids: Array, q: Array, m: int) -> list[list[int]]:
    n = q.shape[-2]
    if n != m:
        raise ShapeError(f"segment_ids are given with n = {n} queries and m = {m} keys; expected as many")
    ids = _of_keys("segment_ids", ids, q.shape[:-1], "q", q)
    runs = q.shape[:-2]
    if q.ndim > 2 and ids.shape[-2] == 1:  # heads share them
        ids, runs = ids[..., 0, :], q.shape[:-3]
    if math.prod(ids.shape[:-1]) != 1:
        ids = np.broadcast_to(ids, (*runs, n))
    rows = ids.reshape(-1, n) if ids.size else np.zeros((1, n), np.int64)
    if (rows[:, 1:] < rows[:, :-1]).any():
        raise ArgumentError("segment_ids decrease; expected those of contiguous segments, in increasing order")
    return [[0, *(np.flatnonzero(row[1:] != row[:-1]) + 1).tolist()] if n else [] for row in rows]


def _of_keys(name: str, x: Array, shape: tuple[int, ...], match: str, like: Array) -> Array:
    """Numbers ``(..., heads, keys)`` that broadcast to ``shape``; an axis of heads that is left out is put in."""
    got = x.shape
    if x.ndim == 0 or x.ndim > len(shape) or got[-1] != shape[-1]:
        raise _misfit(name, got, shape, match, like)
    if x.ndim < len(shape):
        missing = len(shape) - x.ndim
        # The heads' axis first, then those of the batch.
        x = x[..., None, :] if x.ndim > 1 or missing == 1 else x
        x = x[(None,) * (len(shape) - x.ndim) + (...,)]
    if any(a not in (1, b) for a, b in zip(x.shape, shape, strict=True)):
        raise _misfit(name, got, shape, match, like)
    return x


def _misfit(name: str, got: tuple[int, ...], shape: tuple[int, ...], match: str, like: Array) -> ShapeError:
    return ShapeError(
        f"{name} has shape {got}; expected {shape} to match {match} of shape {like.shape}, or what broadcasts to it"
    )


def _of_pairs(name: str, x: Array, q: Array, m: int) -> Array:
    shape = (*q.shape[:-1], m)
    if x.ndim > len(shape) or any(a not in (1, b) for a, b in zip(x.shape[::-1], shape[::-1], strict=False)):
        raise _misfit(name, x.shape, shape, "q", q)
    return x[(None,) * (len(shape) - x.ndim) + (...,)]


def _sinks(sinks: Array, q: Array) -> Array:
    h = q.shape[-3] if q.ndim > 2 else 1
    if sinks.shape != (h,):
        raise ShapeError(f"sinks has shape {sinks.shape}; expected ({h},), one a head of q (shape {q.shape})")
    return sinks
