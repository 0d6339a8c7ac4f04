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
from .engines import EXACT, engine_from_text
from .reports import report
from .tensors import array_of, forward_mode_error, is_plain, is_transformed, refuse_forward_mode, tensor_of

__all__ = ["attention"]

_OPTIONS = (
    "str engine, bool causal, float? scale, SymInt? query_offset, SymInt? left, SymInt? right, float? softcap, "
    "bool zero_empty_rows, Tensor? key_bias, Tensor? segment_ids, Tensor? mask, Tensor? bias, Tensor? sinks"
)
# The forward operator's arguments that may have a gradient, in the order in which gradients come.
_DIFFERENTIABLE = ("q", "k", "v", "key_bias", "bias", "sinks")
# Where the last three of them stand among the options.
_BIASES = (8, 11, 12)
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


def _new_results(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return q.new_empty((*q.shape[:-1], v.shape[-1])), q.new_empty(q.shape[:-1], dtype=torch.float64)


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
) -> tuple[Tensor, ...]:
    """The six gradients of `_DIFFERENTIABLE`; those of what was not given, or has none, are empty."""
    with_gradient = _with_gradient(q, k, v, options)
    if _is_empty(q, k):
        grads = [q.new_zeros(x.shape) for x in with_gradient if x is not None]
    else:
        arrays = [array_of(x) for x in (dout, q, k, v, out, lse)]
        # A scaler of losses (AMP) looks for infinities in gradients: they go through.
        results = lg.attention_backward(*arrays, **_options(*options), check_finite=False)
        grads = [tensor_of(x) for x in results]
    found = iter(grads)
    return tuple(q.new_empty(0) if x is None else next(found) for x in with_gradient)


def _with_gradient(q: Tensor, k: Tensor, v: Tensor, options: Sequence[Any]) -> tuple[Tensor | None, ...]:
    """Of `_DIFFERENTIABLE`, those that have a gradient; a key bias of bools has none."""
    biases = (options[i] for i in _BIASES)
    return (q, k, v, *(x if x is not None and x.is_floating_point() else None for x in biases))


_attention_backward = torch.library.custom_op(
    "lingrad_rs::attention_backward",
    _backward,
    mutates_args=(),
    schema=f"(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_OPTIONS}) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)


@_attention_backward.register_fake
def _(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *options: Any) -> tuple[Tensor, ...]:
    return tuple(q.new_empty(0 if x is None else x.shape) for x in _with_gradient(q, k, v, options))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, *options = inputs
    *plain, key_bias, segment_ids, mask, bias, sinks = options
    ctx.options = plain
    # Kept by autograd, which tells where one of them was changed in place.
    ctx.save_for_backward(q, k, v, *output, key_bias, segment_ids, mask, bias, sinks)
    ctx.set_materialize_grads(False)


def _pull_back(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
    q, k, v, out, lse, *tensors = ctx.saved_tensors
    if dout is None and dlse is None:
        return (None,) * len(_NAMES)
    if dlse is not None:
        dout, v, out = _with_gradient_of_lse(dout, dlse, v, out, engine=ctx.options[0])
    assert dout is not None
    grads = attention_backward(dout, q, k, v, out, lse, *ctx.options, *tensors)
    given = _with_gradient(q, k, v, (*ctx.options, *tensors))
    results = {name: grad for name, x, grad in zip(_DIFFERENTIABLE, given, grads, strict=True) if x is not None}
    if dlse is not None:
        results["v"] = results["v"][..., :-1]
    return tuple(results.get(name) for name in _NAMES)


def _with_gradient_of_lse(
    dout: Tensor | None, dlse: Tensor, v: Tensor, out: Tensor, *, engine: str
) -> tuple[Tensor, Tensor, Tensor]:
    """``dout``, ``v`` and ``out`` with one more column, by which the gradient of ``lse`` is served too.

    ``dlse_i / ds_ij = p_ij``, so that ``ds_ij = p_ij (dout_i . v_j - dout_i . out_i + dlse_i)``. A column of 0 in v, of
    -1 in out and of dlse in dout adds just that.
    """
    if engine != EXACT:
        raise ArgumentError("lse was differentiated, which Exact() alone can; expected that engine, or lse.detach()")
    dout = torch.zeros_like(out) if dout is None else dout
    return (
        torch.cat([dout, dlse.to(dout.dtype).unsqueeze(-1)], dim=-1),
        torch.cat([v, v.new_zeros((*v.shape[:-1], 1))], dim=-1),
        torch.cat([out, out.new_full((*out.shape[:-1], 1), -1)], dim=-1),
    )


def _keep_nothing(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    pass


def _refuse_second_derivative(ctx: Any, *grads: Any) -> Any:
    raise ArgumentError(
        "a gradient of attention was differentiated again; expected first derivatives alone: second ones are not "
        "implemented"
    )


_attention.register_autograd(_pull_back, setup_context=_keep)
_attention_backward.register_autograd(_refuse_second_derivative, setup_context=_keep_nothing)


def _batched(names: Sequence[str], op: Callable[..., Any]) -> Callable[..., Any]:
    """The rule of ``torch.vmap``: its axis becomes the first axis of batch.

    What has none is expanded, without a copy, so that its gradient is one for each entry of that axis. Sinks are common
    to a batch: with their gradient, or with an axis of theirs, one call an entry.
    """

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        dims = dict(zip(names, in_dims, strict=True))
        named = dict(zip(names, args, strict=True))
        if named["sinks"] is not None and (dims["sinks"] is not None or "dout" in named):
            calls = [
                op(*(x if dims[name] is None else x.select(dims[name], i) for name, x in named.items()))
                for i in range(info.batch_size)
            ]
            results = tuple(torch.stack(parts) for parts in zip(*calls, strict=True))
        else:
            axes = named["q"].dim() - (dims["q"] is not None)
            moved = (_with_first_axis(name, x, dims[name], info.batch_size, axes) for name, x in named.items())
            # Gradients of what was not given are empty, and have no such axis.
            results = tuple(x if x.dim() > 1 else x.new_empty((info.batch_size, 0)) for x in op(*moved))
        return results, (0,) * len(results)

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


class _Transformed(torch.autograd.Function):
    """The operator for torch.func, which takes no operator that has a gradient of its own, but functions that do."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor]:
        return attention(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        _keep(ctx, inputs, output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        return _pull_back(ctx, *grads)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        return _batched(_NAMES, attention)(info, in_dims, *args)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise forward_mode_error("an argument")


class _TransformedBackward(torch.autograd.Function):
    """The same of the gradient."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        return attention_backward(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _keep_nothing(ctx, inputs, output)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        _refuse_second_derivative(ctx, *grads)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        return _batched(_BACKWARD_NAMES, attention_backward)(info, in_dims, *args)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise forward_mode_error("an argument")


def attention(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    """``out`` and ``lse``, through the operator where something looks at what is called.

    The dispatcher takes some 100 microseconds to keep 16 arguments for a gradient. Plain tensors go around it.
    """
    refuse_forward_mode(("query", "key", "value", *_NAMES[3:]), (q, k, v, *options))
    if is_plain(q, k, v, *options[8:]):
        return _Eager.apply(q, k, v, *options) if torch.is_grad_enabled() else _forward(q, k, v, *options)
    if is_transformed():
        return _Transformed.apply(q, k, v, *options)
    return _attention(q, k, v, *options)


def attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *options: Any
) -> tuple[Tensor, ...]:
    """The six gradients, as `attention` computes its results."""
    inputs = (dout, q, k, v, out, lse, *options)
    refuse_forward_mode(_BACKWARD_NAMES, inputs)
    # A gradient that is to be differentiated goes through the operator, which refuses that.
    if not torch.is_grad_enabled() and is_plain(dout, q, k, v, out, lse, *options[8:]):
        return _backward(*inputs)
    if is_transformed():
        return _TransformedBackward.apply(*inputs)
    return _attention_backward(*inputs)
