"""What runs on the host: NumPy arrays in JAX's layout in and out, one call of the library for each.

JAX's masks are finite: what they remove has the score ``LOWEST``. A row that loses all of its keys to them is therefore
an average of the values of the keys that they removed, where this library has zeros or an error. Such rows are called
lost here. They are left out of the library's call, and the average is put in their place.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Through the package, so that what stands there is what runs.
import lingrad_rs as lg

from ..spec.engines import Engine

__all__ = ["LOWEST", "Options", "backward", "forward"]

# The score of what JAX's masks remove, as jax.nn has it.
LOWEST = float(np.float32(-0.7) * np.finfo(np.float32).max)

# Rows whose masks are written out at a time.
_ROWS = 256

# The axes of each array, but for those that vmap puts in front.
_AXES = {"query": 4, "key": 4, "value": 4, "out": 4, "dout": 4, "bias": 4, "mask": 4}
_AXES |= {"lse": 3, "key_bias": 3, "key_mask": 3, "query_lengths": 1}

Arrays = Mapping[str, Any]


@dataclass(frozen=True)
class Options:
    """What is known while JAX traces."""

    engine: Engine | None
    tol: float | None
    scale: float | None
    is_causal: bool
    window: tuple[int, int] | None

    def keywords(self) -> dict[str, Any]:
        """The options as `lingrad_rs.attention` has them."""
        keywords = {"engine": self.engine, "tol": self.tol, "scale": self.scale, "causal": self.is_causal}
        if self.is_causal or self.window is not None:
            keywords["query_offset"] = 0  # JAX counts queries and keys from their beginnings
        if self.window is not None:
            keywords["window"] = self.window
        return keywords | {"empty_rows": "zero"}


def forward(options: Options, arrays: Arrays) -> tuple[NDArray[Any], NDArray[Any]]:
    """``out (..., b, t, h, d_v)`` and ``lse (..., b, h, t)``, of `arrays` by name.

    JAX has no float64 unless it is asked for, so that of float32 and less ``lse`` is float32.
    """
    call = _Call(options, arrays)
    out, lse = lg.attention(*call.inputs, **call.keywords, return_lse=True)
    beyond, lost = call.beyond(lse), call.lost(lse)
    if beyond is not None:
        out[beyond] = 0
    if lost is not None:
        for head, rows, weights in call.averages(lost):
            out[head][rows] = call.average(head, weights)
    return _swapped(out), lse.astype(np.result_type(out.dtype, np.float32), copy=False)


def backward(options: Options, arrays: Arrays) -> dict[str, NDArray[Any]]:
    """The gradients of query, key and value, and of bias and key_bias where they are among `arrays`."""
    call = _Call(options, arrays)
    lse = call.whole("lse")
    dout, out = (_swapped(call.whole(name)) for name in ("dout", "out"))
    beyond, lost = call.beyond(lse), call.lost(lse)
    outside = [rows for rows in (beyond, lost) if rows is not None]
    dout_inside = dout
    if outside:
        rows = np.logical_or.reduce(outside)
        # Their gradients are taken out by zeros; and out may be NaN there.
        dout_inside, out = (np.where(rows[..., None], x.dtype.type(0), x) for x in (dout, out))
    grads = lg.attention_backward(dout_inside, *call.inputs, out, lse, **call.keywords, check_finite=False)
    names = ["query", "key", "value", *(name for name in ("key_bias", "bias") if name in arrays)]
    results = dict(zip(names, grads, strict=True))
    if lost is not None:
        call.add_averages(results["value"], dout, lost)
    return {name: _swapped(x) if name in ("query", "key", "value") else x for name, x in results.items()}


class _Call:
    """The arrays of one call, as the library takes them: views, with heads before tokens."""

    def __init__(self, options: Options, arrays: Arrays) -> None:
        self.options = options
        self.arrays = {name: np.asarray(x) for name, x in arrays.items()}
        self.lead = np.broadcast_shapes(*(x.shape[: x.ndim - _AXES[name]] for name, x in self.arrays.items()))
        self.inputs = tuple(_swapped(self.whole(name)) for name in ("query", "key", "value"))
        self.keywords = options.keywords()
        # Gradients of what vmap does not map are wanted for each of its calls, so biases have all of its axes.
        if "bias" in self.arrays:
            self.keywords["bias"] = self.whole("bias")
        if "mask" in self.arrays:
            self.keywords["mask"] = self.arrays["mask"]
        if "key_bias" in self.arrays:
            key_bias = self.whole("key_bias")
            if "key_mask" in self.arrays:
                key_bias = np.where(self.arrays["key_mask"], key_bias, key_bias.dtype.type(-np.inf))
            self.keywords["key_bias"] = key_bias
        elif "key_mask" in self.arrays:
            self.keywords["key_bias"] = self.whole("key_mask")

    def whole(self, name: str) -> NDArray[Any]:
        """An array with all of the axes that vmap puts in front: a view."""
        x = self.arrays[name]
        return np.broadcast_to(x, self.lead + x.shape[x.ndim - _AXES[name] :])

    def beyond(self, lse: NDArray[Any]) -> NDArray[np.bool_] | None:
        """The rows beyond the lengths of the queries; None where there are none."""
        if "query_lengths" not in self.arrays:
            return None
        rows = np.arange(lse.shape[-1]) >= self.arrays["query_lengths"][..., None, None]
        return np.broadcast_to(rows, lse.shape) if rows.any() else None

    def lost(self, lse: NDArray[Any]) -> NDArray[np.bool_] | None:
        """The rows that lost all of their keys, but for those beyond the lengths; None where there are none."""
        lost = lse <= LOWEST
        beyond = self.beyond(lse) if lost.any() else None
        if beyond is not None:
            lost &= ~beyond
        if not lost.any():
            return None
        if self._may_be_lost_to_a_bias():
            # A bias may be as low as what masks are to JAX. What no mask has touched is as the library has it.
            for head, rows in _chunks(lost):
                none_removed = ~self._removed(head, rows).any(axis=-1)
                lost[head][rows[none_removed & (lse[head][rows] > -np.inf)]] = False
        return lost if lost.any() else None

    def averages(self, lost: NDArray[np.bool_]) -> Iterator[tuple[tuple[int, ...], NDArray[Any], NDArray[Any] | None]]:
        """Heads, lost rows of theirs, and the weights ``(rows, s)`` of their keys; None where all weigh the same."""
        for head, rows in _chunks(lost):
            if not self._may_be_lost_to_a_bias():
                yield head, rows, None
                continue
            removed = self._removed(head, rows)
            count = removed.sum(axis=-1, keepdims=True)
            # A bias that removes all keys by itself makes NaN.
            yield head, rows, np.where(count > 0, removed / np.maximum(count, 1), np.nan)

    def average(self, head: tuple[int, ...], weights: NDArray[Any] | None) -> NDArray[Any]:
        """The values of a head's keys, averaged."""
        value = self.inputs[2][self._of_keys(head)]
        wide = value.astype(np.result_type(value.dtype, np.float32), copy=False)
        return (wide.mean(axis=0) if weights is None else weights @ wide).astype(value.dtype)

    def add_averages(self, dvalue: NDArray[Any], dout: NDArray[Any], lost: NDArray[np.bool_]) -> None:
        """Adds to the gradient of values what comes through the averages."""
        kind = np.result_type(dvalue.dtype, np.float32)
        for head, rows, weights in self.averages(lost):
            of_rows = dout[head][rows].astype(kind)
            target = dvalue[self._of_keys(head)]
            added = of_rows.sum(axis=0) / len(target) if weights is None else np.nan_to_num(weights).T @ of_rows
            target[...] = (target + added).astype(target.dtype)

    def _may_be_lost_to_a_bias(self) -> bool:
        return "bias" in self.arrays or "key_bias" in self.arrays

    def _of_keys(self, head: tuple[int, ...]) -> tuple[int, ...]:
        group = self.inputs[0].shape[-3] // self.inputs[1].shape[-3]
        return (*head[:-1], head[-1] // group)

    def _removed(self, head: tuple[int, ...], rows: NDArray[Any]) -> NDArray[np.bool_]:
        """What masks remove in some rows of a head: ``(rows, s)``."""
        *_, t, _ = self.inputs[0].shape
        *_, s, _ = self.inputs[1].shape
        i, j = rows[:, None], np.arange(s)
        removed = np.zeros((len(rows), s), np.bool_)
        if self.options.is_causal:
            removed |= j > i
        if self.options.window is not None:
            left, right = self.options.window
            removed |= (j < i - left) | (j > i + right)
        if "key_mask" in self.arrays:
            removed |= ~self.whole("key_mask")[(*head[:-1], 0)]
        if "mask" in self.arrays:
            whole = np.broadcast_to(self.arrays["mask"], (*self.inputs[0].shape[:-2], t, s))
            removed |= ~whole[head][rows]
        return removed


def _chunks(lost: NDArray[np.bool_]) -> Iterator[tuple[tuple[int, ...], NDArray[Any]]]:
    for head in np.ndindex(lost.shape[:-1]):
        (rows,) = np.nonzero(lost[head])
        for i in range(0, len(rows), _ROWS):
            yield head, rows[i : i + _ROWS]


def _swapped(x: NDArray[Any]) -> NDArray[Any]:
    """Tokens and heads in the other order: a view."""
    return x.swapaxes(-3, -2)
