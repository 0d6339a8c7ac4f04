"""The CPU backend: the compiled core, on checked NumPy arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import _lingrad_rs as core
from .engines import Engine, Polynomial

__all__ = ["attention_backward", "attention_forward", "measure_error"]


def _polynomial(engine: Engine) -> Polynomial | None:
    return engine if isinstance(engine, Polynomial) else None


def attention_forward(
    q: NDArray[Any],
    k: NDArray[Any],
    v: NDArray[Any],
    key_bias: NDArray[Any] | None,
    *,
    engine: Engine,
    causal: bool,
    scale: float,
    keep: bool,
) -> tuple[NDArray[Any], core.AttentionState | None]:
    """``out``, and with ``keep`` what the backward pass needs beside the inputs."""
    if q.shape[-2] == k.shape[-2] == 0:
        return np.zeros((*q.shape[:-1], v.shape[-1]), q.dtype), None
    polynomial = _polynomial(engine)
    return core.attention_forward(q, k, v, key_bias, polynomial=polynomial, causal=causal, scale=scale, keep=keep)


def attention_backward(
    q: NDArray[Any],
    k: NDArray[Any],
    v: NDArray[Any],
    key_bias: NDArray[Any] | None,
    state: core.AttentionState | None,
    dout: NDArray[Any],
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any] | None]:
    """``(dq, dk, dv, dkey_bias)``; the last is None where there is no ``key_bias``."""
    if state is None:  # no queries and no keys
        dkey_bias = None if key_bias is None else np.zeros(key_bias.shape, q.dtype)
        return np.zeros(q.shape, q.dtype), np.zeros(k.shape, q.dtype), np.zeros(v.shape, q.dtype), dkey_bias
    return core.attention_backward(q, k, v, key_bias, state, dout)


def measure_error(
    q: NDArray[Any],
    k: NDArray[Any],
    v: NDArray[Any],
    key_bias: NDArray[Any] | None,
    out: NDArray[Any],
    *,
    causal: bool,
    scale: float,
    samples: int,
    seed: int,
) -> tuple[float, float, float, int]:
    """``(relative, low, high, rows)``."""
    return core.measure_error(q, k, v, key_bias, out, causal=causal, scale=scale, samples=samples, seed=seed)
