"""The backend of CuPy arrays, with the functions of `cpu`.

It is written to the Python array API standard, so that all of its logic also runs, and is tested, on the CPU. Work is
done in batched matrix products over chunks of tokens and heads that fit in the device's free memory; nothing waits for
the device but the checks of inputs and results, draws of samples, and reports.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np

from ... import _check
from ..._lingrad_rs import transformer_param_shapes
from ...errors import DtypeError
from ...spec.engines import Engine
from ...spec.plan import PlanData
from ...spec.scores import Scores
from . import attention, layers, measure, model
from .device import Space, run
from .layers.attention_block import WEIGHT_NAMES, SelfAttention
from .problem.finite import check_arguments, check_overflow

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

Array = Any
_R = TypeVar("_R")


def _forward(compute: Callable[[Space], Array], **arrays: Array | None) -> Array:
    """``y``, by ``compute(space)``, of arrays that are known to be finite, the first of which is not None."""
    return _run_checked(compute, lambda y: {"y": y}, **arrays)


def _backward(
    compute: Callable[[Space], tuple[Array, dict[str, Array]]], **arrays: Array | None
) -> tuple[Array, dict[str, Array]]:
    """``(dx, grads)``, likewise."""
    return _run_checked(compute, _gradients, **arrays)


def _gradients(result: tuple[Array, dict[str, Array]]) -> dict[str, Array]:
    """``dx`` and ``grads`` by the names that errors call them."""
    dx, grads = result
    return {"dx": dx} | {f"the gradient of {name}": grad for name, grad in grads.items()}


def _run_checked(compute: Callable[[Space], _R], named: Callable[[_R], dict[str, Array]], **arrays: Array | None) -> _R:
    """A result, once the arrays and what it holds by name are known to be finite; waits for the device, twice."""

    def checked(sp: Space) -> _R:
        check_arguments(sp, **arrays)
        result = compute(sp)
        check_overflow(sp, named(result))
        return result

    return run(next(iter(arrays.values())), checked)


def token_ids(name: str, x: Array, below: int) -> Array:
    """Integer tokens ``0 <= t < below`` as a new C-contiguous array of 64-bit ones; waits for the device, once."""

    def ids(sp: Space) -> Array:
        if math.prod(x.shape):
            low, high = sp.host(sp.xp.stack([sp.xp.min(x), sp.xp.max(x)]))
            _check.token_range(name, int(low), int(high), below)
        return sp.contiguous(sp.xp.astype(x, sp.xp.int64))

    return run(x, ids)


def add(name: str, x: Array, y: Array) -> Array:
    """``x + y``, C-contiguous, which is called ``name``; waits for the device, once."""

    def total(sp: Space) -> Array:
        result = sp.contiguous(x + y)
        check_overflow(sp, {name: result})
        return result

    return run(x, total)


def copy(x: Array) -> Array:
    """A new C-contiguous array."""
    return run(x, lambda sp: sp.contiguous(sp.xp.asarray(x, copy=True)))


def same(x: Array, y: Array) -> bool:
    """Whether arrays of one shape hold the same numbers; waits for the device."""
    return run(x, lambda sp: bool(sp.xp.all(x == y)))


def frobenius_norm(arrays: Sequence[Array]) -> float:
    """The root of the sum of all squares, in float64; waits for the device, once."""

    def norm(sp: Space) -> float:
        xp = sp.xp
        rows = [xp.reshape(x, (-1, x.shape[-1])) for x in arrays if math.prod(x.shape)]
        largest = sp.zeros((), xp.float64)
        for x in rows:
            largest = xp.maximum(largest, sp.wide(xp.max(xp.abs(x))))
        # So that no square overflows, nor all of them become 0.
        scale = xp.where(largest > 0, largest, xp.ones_like(largest))
        total = sp.zeros((), xp.float64)
        for x in rows:
            for a, b in sp.tiles(x.shape[0], 2 * x.shape[1]):
                part = sp.wide(x[a:b, :]) / scale
                total = total + xp.sum(part * part)
        norm, largest = sp.host(xp.stack([xp.sqrt(total), largest]))
        return float(norm) * float(largest)

    return run(arrays[0], norm)


def _refuse_half(q: Array) -> None:
    if not _check.is_float(q):
        raise DtypeError(f"q has dtype {_check.dtype_name(q)} on a GPU; expected float32 or float64")


def removed_where_false(allowed: Array, q: Array) -> Array:
    """The key bias that stands for the keys that may be attended to: 0 there, and minus infinity elsewhere."""

    def bias(sp: Space) -> Array:
        zeros = sp.zeros(allowed.shape, q.dtype)
        return sp.xp.where(allowed, zeros, zeros - math.inf)

    return run(q, bias)


def attention_forward(
    q: Array, k: Array, v: Array, scores: Scores, *, engine: Engine | PlanData, keep: bool, wants_lse: bool
) -> tuple[Array, Array | None, attention.State | attention.OptionsState | None]:
    """``out``, the logarithms of row sums where asked for, and with ``keep`` what the backward pass needs."""
    _refuse_half(q)
    if k.shape[-2] == 0:

        def nothing(sp: Space) -> tuple[Array, Array | None]:
            lse = sp.full(q.shape[:-1], -math.inf, sp.xp.float64) if wants_lse else None
            return sp.zeros((*q.shape[:-1], v.shape[-1]), q.dtype), lse

        return *run(q, nothing), None
    return run(
        q, lambda sp: attention.forward_scores(sp, q, k, v, scores, engine=engine, keep=keep, wants_lse=wants_lse)
    )


def in_float64(x: Array) -> Array:
    """An array in float64; itself where it is so already."""
    return run(x, lambda sp: sp.wide(x))


def broadcast_to(x: Array, shape: tuple[int, ...]) -> Array:
    """A view of an array in a shape that it broadcasts to."""
    return run(x, lambda sp: sp.xp.broadcast_to(x, shape))


def summed_to(x: Array, lined_up: tuple[int, ...], shape: tuple[int, ...]) -> Array:
    """The sums of ``x`` over the axes along which an array of ``lined_up`` shape broadcasts to it, in another shape."""
    lined_up = (1,) * (x.ndim - len(lined_up)) + lined_up
    axes = tuple(i for i, (a, b) in enumerate(zip(x.shape, lined_up, strict=True)) if a != b)

    def summed(sp: Space) -> Array:
        total = sp.astype(sp.xp.sum(sp.wide(x), axis=axes), x.dtype) if axes else x
        return sp.contiguous(sp.xp.reshape(total, shape))

    return run(x, summed)


def on_host(x: Array) -> np.ndarray[Any, Any]:
    """A copy of an array where the host reads it; waits for the device."""
    return run(x, lambda sp: sp.host(x))


def _no_gradients(q: Array, k: Array, v: Array, scores: Scores) -> list[Array | None]:
    """Those of a call without keys."""
    given = (q, k, v, scores.key_bias, scores.bias, scores.sinks)
    return [None if x is None else run(q, lambda sp, x=x: sp.zeros(x.shape, q.dtype)) for x in given]


def attention_backward(
    q: Array,
    k: Array,
    v: Array,
    scores: Scores,
    state: attention.State | attention.OptionsState | None,
    dout: Array,
    *,
    samples: int,
) -> tuple[list[Array | None], list[dict[str, Any]]]:
    """``dq, dk, dv, dkey_bias, dbias, dsinks``, None of what was not given; and what is known of each head."""
    if state is None:  # no keys
        return _no_gradients(q, k, v, scores), []
    return run(q, lambda sp: attention.backward_scores(sp, q, k, v, scores, state, dout, samples=samples))


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
    _refuse_half(q)
    if k.shape[-2] == 0:
        return _no_gradients(q, k, v, scores)
    options = {"engine": engine, "check_finite": check_finite}
    return run(q, lambda sp: attention.backward_again(sp, dout, q, k, v, out, lse, scores, **options))


def measure_error(
    q: Array, k: Array, v: Array, scores: Scores, out: Array, *, samples: int, seed: int
) -> tuple[float, float, float, int]:
    """``(relative, low, high, rows)``."""
    attention.expect_plain(scores, q, k, "measure_error")
    options = {"causal": scores.causal, "scale": scores.scale, "samples": samples, "seed": seed}

    def measured(sp: Space) -> tuple[float, float, float, int]:
        kept = attention.without_removed(sp, k, v, scores)
        return measure.measure_error(sp, q, *kept, attention.lined_up(sp, k, scores), out, **options)

    return run(q, measured)


def linear_forward(x: Array, w: Array, b: Array | None) -> Array:
    """``y``."""
    return _forward(lambda sp: layers.linear_forward(sp, x, w, b), x=x, w=w, b=b)


def linear_backward(x: Array, w: Array, has_bias: bool, dy: Array) -> tuple[Array, dict[str, Array]]:
    """``(dx, grads)``."""
    return _backward(lambda sp: layers.linear_backward(sp, x, w, has_bias, dy), x=x, dy=dy, w=w)


def activation_forward(x: Array, kind: str) -> Array:
    """``y``."""
    return _forward(lambda sp: layers.activation_forward(sp, x, kind), x=x)


def activation_backward(x: Array, kind: str, dy: Array) -> Array:
    """``dx``."""
    return _run_checked(lambda sp: layers.activation_backward(sp, x, kind, dy), lambda dx: {"dx": dx}, x=x, dy=dy)


def norm_forward(x: Array, gain: Array, bias: Array | None, eps: float) -> Array:
    """``y``."""
    return _forward(lambda sp: layers.norm_forward(sp, x, gain, bias, eps), x=x, gain=gain, bias=bias)


def norm_backward(x: Array, gain: Array, has_bias: bool, eps: float, dy: Array) -> tuple[Array, dict[str, Array]]:
    """``(dx, grads)``."""
    return _backward(lambda sp: layers.norm_backward(sp, x, gain, has_bias, eps, dy), x=x, dy=dy, gain=gain)


def feed_forward_forward(x: Array, w_in: Array, w_out: Array, kind: str) -> Array:
    """``y``."""
    return _forward(lambda sp: layers.feed_forward_forward(sp, x, w_in, w_out, kind), x=x, w_in=w_in, w_out=w_out)


def feed_forward_backward(x: Array, w_in: Array, w_out: Array, kind: str, dy: Array) -> tuple[Array, dict[str, Array]]:
    """``(dx, grads)``."""
    return _backward(
        lambda sp: layers.feed_forward_backward(sp, x, w_in, w_out, kind, dy), x=x, dy=dy, w_in=w_in, w_out=w_out
    )


def embedding_forward(tokens: Array, embed: Array) -> Array:
    """``y``."""
    return _forward(lambda sp: layers.embedding_forward(sp, tokens, embed), embed=embed)


def embedding_backward(tokens: Array, vocab: int, dy: Array) -> Array:
    """``dembed``."""
    named = lambda dembed: {"the gradient of embed": dembed}  # noqa: E731
    return _run_checked(lambda sp: layers.embedding_backward(sp, tokens, vocab, dy), named, dy=dy)


def self_attention_forward(x: Array, weights: Sequence[Array], options: Any) -> Array:
    """``y``."""

    def forward(sp: Space) -> Array:
        y = SelfAttention.of(sp, weights, options).forward(_batched(sp, x))
        return sp.xp.reshape(y, (*x.shape[:-1], y.shape[-1]))

    return _forward(forward, x=x, **_named(weights))


def self_attention_backward(
    x: Array, weights: Sequence[Array], options: Any, dy: Array
) -> tuple[Array, dict[str, Array]]:
    """``(dx, grads)``."""

    def backward(sp: Space) -> tuple[Array, dict[str, Array]]:
        dx, grads = SelfAttention.of(sp, weights, options).backward(_batched(sp, x), _batched(sp, dy))
        return sp.xp.reshape(dx, x.shape), grads

    return _backward(backward, x=x, dy=dy, **_named(weights))


def _named(weights: Sequence[Array]) -> dict[str, Array]:
    return dict(zip(WEIGHT_NAMES[len(weights)], weights, strict=True))


def _batched(sp: Space, x: Array) -> Array:
    """``(..., n, d)`` as ``(batch, n, d)``."""
    return sp.xp.reshape(x, (math.prod(x.shape[:-2]), *x.shape[-2:]))


def transformer_forward(config: Any, params: Sequence[tuple[str, Array]], x: Array) -> tuple[Array, model.Trace]:
    """Logits ``(..., n, vocab_size)``, and the trace for the backward pass."""

    def forward(sp: Space) -> tuple[Array, model.Trace]:
        y, trace = model.forward(sp, config, params, x)
        check_overflow(sp, {"y": y})
        return y, trace

    return run(x, forward)


def transformer_backward(
    config: Any, params: Sequence[tuple[str, Array]], x: Array, trace: model.Trace, dy: Array
) -> tuple[Array, dict[str, Array]]:
    """``(dx, grads)``, where ``dx (..., n, d_model)`` is the gradient with respect to the embedded input."""

    def backward(sp: Space) -> tuple[Array, dict[str, Array]]:
        result = model.backward(sp, config, params, x, trace, dy)
        check_overflow(sp, _gradients(result))
        return result

    return run(x, backward)


def transformer_value_and_grad(
    config: Any,
    params: Sequence[tuple[str, Array]],
    tokens: Array,
    targets: Array,
    *,
    samples: int,
    progress: Callable[[float], object] | None,
) -> tuple[float, dict[str, Array], list[model.Report]]:
    """``(loss, grads, layers)``: of each layer the measured error of its attention, and what is known of its heads."""
    furthest = 0.0

    def forward(fraction: float) -> None:
        # A step that is tried again with smaller temporary arrays begins anew.
        nonlocal furthest
        if progress is not None and fraction > furthest:
            furthest = fraction
            progress(fraction)

    options = {"samples": samples, "progress": forward}

    def value_and_grad(sp: Space) -> tuple[float, dict[str, Array], list[model.Report]]:
        loss, grads, layers = model.value_and_grad(sp, config, params, tokens, targets, **options)
        check_overflow(sp, {f"the gradient of {name}": grad for name, grad in grads.items()})
        return loss, grads, layers

    return run(tokens, value_and_grad)
