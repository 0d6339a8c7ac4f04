"""The CPU backend: the compiled core, on checked NumPy arrays.

Every other backend has the functions named here, with the same signatures.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import _check
from .. import _lingrad_rs as core
from .._lingrad_rs import (
    activation_backward,
    activation_forward,
    embedding_backward,
    embedding_forward,
    feed_forward_forward,
    linear_forward,
    norm_forward,
    self_attention_backward,
    self_attention_forward,
    transformer_backward,
    transformer_forward,
    transformer_param_shapes,
    transformer_value_and_grad,
)
from ..errors import ShapeError
from ..spec.engines import Engine
from ..spec.plan import PlanData
from ..spec.scores import Scores

__all__ = [
    "activation_backward",
    "activation_forward",
    "add",
    "attention_backward",
    "attention_backward_again",
    "attention_forward",
    "broadcast_to",
    "copy",
    "embedding_backward",
    "embedding_forward",
    "feed_forward_backward",
    "feed_forward_forward",
    "frobenius_norm",
    "in_float64",
    "linear_backward",
    "linear_forward",
    "measure_error",
    "norm_backward",
    "norm_forward",
    "on_host",
    "removed_where_false",
    "same",
    "self_attention_backward",
    "self_attention_forward",
    "summed_to",
    "token_ids",
    "transformer_backward",
    "transformer_forward",
    "transformer_param_shapes",
    "transformer_value_and_grad",
]

Array = NDArray[Any]


def broadcast_to(x: Array, shape: tuple[int, ...]) -> Array:
    """A view of an array in a shape that it broadcasts to."""
    return np.broadcast_to(x, shape)


def summed_to(x: Array, lined_up: tuple[int, ...], shape: tuple[int, ...]) -> Array:
    """The sums of ``x`` over the axes along which an array of ``lined_up`` shape broadcasts to it, in another shape."""
    lined_up = (1,) * (x.ndim - len(lined_up)) + lined_up
    axes = tuple(i for i, (a, b) in enumerate(zip(x.shape, lined_up, strict=True)) if a != b)
    return (x.sum(axis=axes, dtype=np.float64).astype(x.dtype) if axes else x).reshape(shape)


def token_ids(name: str, x: Array, below: int) -> NDArray[np.uint32]:
    """Integer tokens ``0 <= t < below`` as a new array of contiguous 32-bit ones."""
    ids = np.empty(x.shape, np.uint32)  # before anything is looked at: strides of 0 make arrays larger than any memory
    if x.size:
        _check.token_range(name, int(x.min()), int(x.max()), min(below, 2**32))
    ids[...] = x
    return ids


def add(name: str, x: Array, y: Array) -> Array:
    """``x + y``, C-contiguous, which is called ``name``."""
    with np.errstate(over="ignore", invalid="ignore"):
        total = np.add(x, y, order="C")
    if not np.isfinite(total).all():
        raise _check.overflow(name)
    return total


def copy(x: Array) -> Array:
    """A new C-contiguous array."""
    return x.copy()


def same(x: Array, y: Array) -> bool:
    """Whether arrays of one shape hold the same numbers."""
    return np.array_equal(x, y)


def frobenius_norm(arrays: Sequence[Array]) -> float:
    """The root of the sum of all squares, in float64."""
    largest = max((float(max(x.max(), -x.min())) for x in arrays if x.size), default=0.0)
    if largest == 0:
        return 0.0
    # So that no square overflows, nor all of them become 0.
    scaled = (np.divide(x, largest, dtype=np.float64) for x in arrays)
    return largest * math.sqrt(sum(float(np.sum(np.square(x))) for x in scaled))


def removed_where_false(allowed: Array, q: Array) -> Array:
    """The key bias that stands for the keys that may be attended to: 0 there, and minus infinity elsewhere."""
    return np.where(allowed, 0, -np.inf).astype(q.dtype)


def _broadcast(q: Array, k: Array, scores: Scores) -> Scores:
    """The scores with arrays of an entry for every head, in place."""
    if scores.key_bias is scores.mask is scores.bias is scores.sinks is None:
        return scores
    pairs = (*q.shape[:-1], k.shape[-2])
    shapes = {"key_bias": k.shape[:-1], "mask": pairs, "bias": pairs, "sinks": q.shape[:-2] or (1,)}
    arrays = {name: (getattr(scores, name), shape) for name, shape in shapes.items()}
    views = {name: np.broadcast_to(x, shape) for name, (x, shape) in arrays.items() if x is not None}
    return replace(scores, **views)


def attention_forward(
    q: Array, k: Array, v: Array, scores: Scores, *, engine: Engine | PlanData, keep: bool, wants_lse: bool
) -> tuple[Array, Array | None, core.AttentionState | None]:
    """``out``, the logarithms of row sums where asked for, and with ``keep`` what the backward pass needs."""
    if k.shape[-2] == 0:
        shape = (*q.shape[:-1], v.shape[-1])
        try:
            return np.zeros(shape, q.dtype), np.full(shape[:-1], -np.inf) if wants_lse else None, None
        except ValueError:  # NumPy has a largest size for arrays of no entries too
            raise ShapeError(f"out would have shape {shape}, which no array can have") from None
    scores = _broadcast(q, k, scores)
    return core.attention_forward(q, k, v, scores, engine=engine, keep=keep, wants_lse=wants_lse)


def in_float64(x: Array) -> Array:
    """An array in float64; itself where it is so already."""
    return x.astype(np.float64, copy=False)


def on_host(x: Array) -> Array:
    """An array where the host reads it: itself."""
    return x


def _no_gradients(q: Array, k: Array, v: Array, scores: Scores) -> list[Array | None]:
    """Those of a call without keys."""
    zeros: list[Array | None] = [np.zeros(x.shape, q.dtype) for x in (q, k, v)]
    return zeros + [
        None if x is None else np.zeros(x.shape, q.dtype) for x in (scores.key_bias, scores.bias, scores.sinks)
    ]


def attention_backward(
    q: Array, k: Array, v: Array, scores: Scores, state: core.AttentionState | None, dout: Array, *, samples: int
) -> tuple[list[Array | None], list[dict[str, Any]]]:
    """``dq, dk, dv, dkey_bias, dbias, dsinks``, None of what was not given; and what is known of each head."""
    if state is None:  # no keys
        return _no_gradients(q, k, v, scores), []
    return core.attention_backward(q, k, v, _broadcast(q, k, scores), state, dout, samples=samples)


def attention_backward_again(
    dout: Array,
    q: Array,
    k: Array,
    v: Array,
    out: Array,
    lse: Array,
    scores: Scores,
    *,
    engine: Engine,
    check_finite: bool,
) -> list[Array | None]:
    """The same gradients, from the inputs and results of a forward pass that kept nothing else."""
    if k.shape[-2] == 0:
        return _no_gradients(q, k, v, scores)
    scores = _broadcast(q, k, scores)
    return core.attention_backward_again(dout, q, k, v, out, lse, scores, engine=engine, check_finite=check_finite)[0]


def measure_error(
    q: Array, k: Array, v: Array, scores: Scores, out: Array, *, samples: int, seed: int
) -> tuple[float, float, float, int]:
    """``(relative, low, high, rows)``."""
    return core.measure_error(q, k, v, _broadcast(q, k, scores), out, samples=samples, seed=seed)


def linear_backward(x: Array, w: Array, has_bias: bool, dy: Array) -> tuple[Array, dict[str, Array]]:
    """``(dx, grads)``."""
    dx, dw, db = core.linear_backward(x, w, has_bias, dy)
    return dx, {"w": dw} if db is None else {"w": dw, "b": db}


def norm_backward(x: Array, gain: Array, has_bias: bool, eps: float, dy: Array) -> tuple[Array, dict[str, Array]]:
    """``(dx, grads)``."""
    dx, dgain, dbias = core.norm_backward(x, gain, has_bias, eps, dy)
    return dx, {"gain": dgain} if dbias is None else {"gain": dgain, "bias": dbias}


def feed_forward_backward(
    x: Array, w_in: Array, w_out: Array, activation: str, dy: Array
) -> tuple[Array, dict[str, Array]]:
    """``(dx, grads)``."""
    dx, dw_in, dw_out = core.feed_forward_backward(x, w_in, w_out, activation, dy)
    return dx, {"w_in": dw_in, "w_out": dw_out}
