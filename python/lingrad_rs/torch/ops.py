"""Attention and its gradient as operators of PyTorch, with all that its transformations ask of one.

Operators see through neither dataclasses nor optional groups of arguments, so that an engine is a text here and a
window two numbers. Shapes are checked before (`functional`): every tensor here has the batch axes of q, and the axis of
heads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import lingrad_rs as lg

from ..errors import ArgumentError
from .engines import engine_from_text
from .reports import report
from .tensors import array_of, is_plain, tensor_of

__all__ = ["attention"]

_OPTIONS = (
    "str engine, bool causal, float? scale, SymInt? query_offset, SymInt? left, SymInt? right, float? softcap, "
    "bool zero_empty_rows, Tensor? key_bias, Tensor? segment_ids, Tensor? mask, Tensor? bias, Tensor? sinks"
)
# Of the forward operator's arguments, those that may have a gradient; in the order in which gradients come.
_DIFFERENTIABLE = ("q", "k", "v", "key_bias", "bias", "sinks")
_NAMES = (
    "q", "k", "v", "engine", "causal", "scale", "query_offset", "left", "right", "softcap", "zero_empty_rows",
    "key_bias", "segment_ids", "mask", "bias", "sinks",
)  # fmt: skip
_BACKWARD_NAMES = ("dout", "q", "k", "v", "out", "lse", *_NAMES[3:])


def _options(
    engine: str,
    causal: bool,
    scale: float | None,
    query_offset: int | None,
    left: int | None,
    right: int | None,
    softcap: float | None,
    zero_empty_rows: bool,
    key_bias: Tensor | None,
    segment_ids: Tensor | None,
    mask: Tensor | None,
    bias: Tensor | None,
    sinks: Tensor | None,
) -> dict[str, Any]:
    """The options of `lingrad_rs.attention`; those that were not given are left out."""
    options: dict[str, Any] = {"engine": engine_from_text(engine), "causal": causal, "scale": scale}
    if query_offset is not None:
        options["query_offset"] = query_offset
    if left is not None or right is not None:
        options["window"] = (left, right)
    if softcap is not None:
        options["softcap"] = softcap
    if zero_empty_rows:
        options["empty_rows"] = "zero"
    for name, x in (
        ("key_bias", key_bias),
        ("segment_ids", segment_ids),
        ("mask", mask),
        ("bias", bias),
        ("sinks", sinks),
    ):
        if x is not None:
            options[name] = array_of(x)
    return options


def _is_empty(q: Tensor, k: Tensor) -> bool:
    """Whether there is no pair of a query and a key."""
    return k.shape[-2] == 0 or q.shape[:-1].numel() == 0


def _lse_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype is torch.float64 else torch.float32


def _new_results(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return q.new_empty((*q.shape[:-1], v.shape[-1])), q.new_empty(q.shape[:-1], dtype=_lse_dtype(q))


def _forward(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    """``out`` and ``lse`` of `lingrad_rs.attention`."""
    if _is_empty(q, k):
        return _without_pairs(q, v, zero_empty_rows=options[7], sinks=options[12])
    arrays = array_of(q), array_of(k), array_of(v)
    named = _options(*options)
    out, lse = lg.attention(*arrays, **named, return_lse=True)
    report(arrays, named)
    return tensor_of(out), tensor_of(lse)


def _without_pairs(q: Tensor, v: Tensor, *, zero_empty_rows: bool, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    out, lse = _new_results(q, v)
    if lse.numel() and not zero_empty_rows:
        raise lg.DenominatorError(
            "k has no keys (m = 0), so that every row sums to 0; expected at least one, or empty_rows='zero'"
        )
    lse.fill_(-torch.inf)
    return out.zero_(), lse if sinks is None else lse.copy_(sinks.detach().unsqueeze(-1))


_attention = torch.library.custom_op(
    "lingrad_rs::attention",
    _forward,
    mutates_args=(),
    schema=f"(Tensor q, Tensor k, Tensor v, {_OPTIONS}) -> (Tensor, Tensor)",
)


@_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    return _new_results(q, v)


def _backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *options: Any
) -> list[Tensor]:
    """The gradients of `lingrad_rs.attention_backward`: of q, k, v, then of key_bias, bias and sinks where given."""
    if _is_empty(q, k):
        return [torch.zeros_like(x, memory_format=torch.contiguous_format) for x in _with_gradient(q, k, v, options)]
    arrays = (array_of(x) for x in (dout, q, k, v, out, lse))
    # A scaler of losses (AMP) looks for infinities in gradients: they go through.
    grads = lg.attention_backward(*arrays, **_options(*options), check_finite=False)
    return [tensor_of(x) for x in grads]


def _with_gradient(q: Tensor, k: Tensor, v: Tensor, options: Sequence[Any]) -> list[Tensor]:
    """The arguments that have gradients, in the order of these; a key bias of bools has none."""
    key_bias, bias, sinks = options[8], options[11], options[12]
    biases = [x for x in (key_bias, bias, sinks) if x is not None and x.is_floating_point()]
    return [q, k, v, *biases]


_attention_backward = torch.library.custom_op(
    "lingrad_rs::attention_backward",
    _backward,
    mutates_args=(),
    schema=f"(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_OPTIONS}) -> Tensor[]",
)


@_attention_backward.register_fake
def _(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *options: Any) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in _with_gradient(q, k, v, options)]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, *options = inputs
    *plain, key_bias, segment_ids, mask, bias, sinks = options
    ctx.options = plain
    # Kept by autograd, which tells where one of them was changed in place.
    ctx.save_for_backward(q, k, v, *output, key_bias, segment_ids, mask, bias, sinks)
    ctx.set_materialize_grads(False)


def _pull_back(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
    if dlse is not None:
        raise ArgumentError("lse was differentiated, which has no gradient here; expected lse.detach()")
    q, k, v, out, lse, *tensors = ctx.saved_tensors
    if dout is None:
        return (None,) * len(_NAMES)
    # Where the gradient itself is to be differentiated, the operator refuses it.
    pull = _backward if is_plain(dout) and not torch.is_grad_enabled() else _attention_backward
    grads = pull(dout, q, k, v, out, lse, *ctx.options, *tensors)
    key_bias, _, _, bias, sinks = tensors
    results: dict[str, Tensor] = dict(zip("qkv", grads, strict=False))
    biases = {"key_bias": key_bias, "bias": bias, "sinks": sinks}
    given = [name for name, x in biases.items() if x is not None and x.is_floating_point()]
    results |= zip(given, grads[3:], strict=True)
    return tuple(results.get(name) for name in _NAMES)


_attention.register_autograd(_pull_back, setup_context=_keep)


def _keep_nothing(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    pass


def _refuse_second_derivative(ctx: Any, *grads: Any) -> Any:
    raise ArgumentError(
        "a gradient of attention was differentiated again; expected first derivatives alone: second ones are not "
        "implemented"
    )


_attention_backward.register_autograd(_refuse_second_derivative, setup_context=_keep_nothing)


def _batched(names: Sequence[str], op: Callable[..., Any]) -> Callable[..., Any]:
    """The rule of ``torch.vmap``: its axis becomes the first axis of batch.

    What has none is expanded, without a copy, so that its gradient is one for each entry of that axis. Sinks are common
    to a batch: with them, one call an entry.
    """

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        dims = dict(zip(names, in_dims, strict=True))
        named = dict(zip(names, args, strict=True))
        if named["sinks"] is not None and (dims["sinks"] is not None or "dout" in named):
            calls = [
                op(*(x if dims[name] is None else x.select(dims[name], i) for name, x in named.items()))
                for i in range(info.batch_size)
            ]
            stacked = [torch.stack(parts) for parts in zip(*calls, strict=True)]
        else:
            axes = named["q"].dim() - (dims["q"] is not None)
            moved = (_with_first_axis(name, x, dims[name], info.batch_size, axes) for name, x in named.items())
            stacked = list(op(*moved))
        results = stacked if "dout" in named else tuple(stacked)
        return results, type(results)([0] * len(results))

    return rule


def _with_first_axis(name: str, x: Any, dim: int | None, size: int, axes: int) -> Any:
    if not isinstance(x, Tensor) or name == "sinks":
        return x
    x = x.unsqueeze(0) if dim is None else x.movedim(dim, 0)
    # Masks and biases may have fewer axes than the scores, which the new one must stay in front of.
    wanted = axes + 1 if name in ("mask", "bias") else x.dim()
    x = x.reshape(x.shape[0], *[1] * (wanted - x.dim()), *x.shape[1:])
    return x.expand(size, *x.shape[1:])


_attention.register_vmap(_batched(_NAMES, _attention))
_attention_backward.register_vmap(_batched(_BACKWARD_NAMES, _attention_backward))


class _Eager(torch.autograd.Function):
    """The operator without the dispatcher."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        output = _forward(*inputs)
        _keep(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        return _pull_back(ctx, *grads)


def attention(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    """``out`` and ``lse``, through the operator where something looks at what is called.

    The dispatcher takes some 100 microseconds to keep 16 arguments for a gradient. Plain tensors go around it.
    """
    if is_plain(q, k, v, *options[8:]):
        return _Eager.apply(q, k, v, *options) if torch.is_grad_enabled() else _forward(q, k, v, *options)
    return _attention(q, k, v, *options)
