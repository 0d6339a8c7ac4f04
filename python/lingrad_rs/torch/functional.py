"""Attention of tensors, with `lingrad_rs.attention`'s options and with PyTorch's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from .. import _check
from ..errors import ArgumentError, DtypeError, ShapeError
from ..spec.engines import Engine
from . import ops
from .engines import text_of_engine
from .tensors import DTYPES, check_device, check_matches, check_tensor, dtype_name

__all__ = ["attention", "scaled_dot_product_attention"]


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    engine: Engine | None = None,
    tol: float | None = None,
    causal: bool = False,
    scale: float | None = None,
    key_bias: Tensor | None = None,
    query_offset: int | None = None,
    window: tuple[int | None, int | None] | None = None,
    segment_ids: Tensor | None = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    empty_rows: Literal["error", "zero"] = "error",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`lingrad_rs.attention` of tensors, which autograd differentiates.

    ``out_i = sum_j exp(s_ij) v_j / sum_j exp(s_ij)`` with ``s_ij = scale q_i . k_j`` plus biases, over the keys that
    row i sees; the options are those of `lingrad_rs.attention`.

    Parameters
    ----------
    query : Tensor, shape (..., h, n, d)
        float32, float64, float16 or bfloat16, on the CPU or an NVIDIA GPU, any strides. Two axes are one head.
    key : Tensor, shape (..., h_kv, m, d)
        Batch axes broadcast; ``h`` is a multiple of ``h_kv``: query head ``i`` reads key head ``i // (h // h_kv)``.
    value : Tensor, shape (..., h_kv, m, d_v)
    engine : Engine, optional
        `Exact` unless given.
    tol : float, optional
        In place of an engine: the library chooses, within this relative error.
    causal : bool
        Whether row i sees only keys ``j <= i + query_offset``.
    scale : float, optional
        ``1/sqrt(d)`` unless given.
    key_bias : Tensor, shape (m,), (batch, m), (batch, 1, m) or (batch, h_kv, m), optional
        Added to the scores of a key, of the dtype of query; or bool, where True may be attended to.
    query_offset : int, optional
        The position of query 0, counted from key 0; needed with ``causal`` or a window where ``n != m``.
    window : pair of int or None, optional
        Row i sees ``i + query_offset - left <= j <= i + query_offset + right``; None is no limit.
    segment_ids : Tensor of integers, shape (n,), (batch, n) or (batch, 1, n), optional
        Packed sequences: tokens of one segment see only each other.
    mask : Tensor of bool, broadcastable to (..., h, n, m), optional
        True may be attended to. Axes of stride 0 are read in place.
    bias : Tensor of the dtype of query, broadcastable to (..., h, n, m), optional
    softcap : float, optional
        Scores become ``softcap tanh(s / softcap)`` before biases are added.
    sinks : Tensor, shape (h,), optional
        A score that joins each denominator and has no value.
    empty_rows : {"error", "zero"}
        What becomes of rows that may attend to nothing: `DenominatorError`, or rows of 0.
    return_lse : bool
        Whether to return the log of each row's denominator too.

    Returns
    -------
    out : Tensor, shape (..., h, n, d_v)
        Contiguous, of the dtype of query. Gradients flow to query, key, value, and to key_bias, bias and sinks.
    lse : Tensor of float64, shape (..., h, n)
        With ``return_lse``. By `Exact` it is differentiated too; its gradient is rounded to the dtype of query.

    Raises
    ------
    ShapeError, DtypeError, DeviceError, ArgumentError, NonFiniteError, DenominatorError, ToleranceError
        As from `lingrad_rs.attention`. Second derivatives and forward-mode derivatives are an `ArgumentError`.

    Notes
    -----
    Tensors are read where they lie. Cost: that of the engine, and some 30 microseconds.

    In bfloat16 and float16, computation is in float32. Under ``torch.autocast``, tensors are cast as PyTorch casts them
    for its own attention. It may be compiled, exported, vmapped and checkpointed.
    """
    query, key, value, dtype = _floats(query, key, value)
    has_heads = max(query.dim(), key.dim(), value.dim()) > 2
    query, key, value = _with_same_batch(query, key, value)
    text = text_of_engine(engine, tol)
    left, right = (None, None) if window is None else _pair(window)
    if query_offset is None and (causal or window is not None):
        if query.shape[-2] != key.shape[-2]:
            raise ArgumentError(
                f"query_offset is None with {query.shape[-2]} queries and {key.shape[-2]} keys; expected an integer: 0 "
                "is PyTorch's is_causal, m - n a cache's"
            )
        query_offset = 0
    batch, (h, n), (h_kv, m) = query.shape[:-3], query.shape[-3:-1], key.shape[-3:-1]
    if key_bias is not None:
        key_bias = _option("key_bias", key_bias, query, dtype, {torch.bool})
        key_bias = _expanded("key_bias", key_bias, (*batch, h_kv, m), h_kv)
    if segment_ids is not None:
        segment_ids = check_tensor("segment_ids", segment_ids)
        if segment_ids.is_floating_point() or segment_ids.dtype is torch.bool:
            raise DtypeError(f"segment_ids has dtype {dtype_name(segment_ids.dtype)}; expected integers")
        check_device("segment_ids", segment_ids, query, "query")
        segment_ids = _expanded("segment_ids", segment_ids, (*batch, 1, n), 1)
    if mask is not None:
        mask = _option("mask", mask, query, None, {torch.bool})
        _check_broadcasts("mask", mask, (*batch, h, n, m))
    if bias is not None:
        bias = _option("bias", bias, query, dtype, ())
        _check_broadcasts("bias", bias, (*batch, h, n, m))
    if sinks is not None:
        sinks = _option("sinks", sinks, query, dtype, ())
        if sinks.shape != (h,):
            raise ShapeError(f"sinks has shape {tuple(sinks.shape)}; expected ({h},) to match the heads of query")
    zero_empty_rows = _check.choice("empty_rows", empty_rows, ("error", "zero")) == "zero"
    out, lse = ops.attention(
        query, key, value, text, causal, scale, query_offset, left, right, softcap, zero_empty_rows,
        key_bias, segment_ids, mask, bias, sinks,
    )  # fmt: skip
    if not has_heads:
        out, lse = out.squeeze(0), lse.squeeze(0)
    return (out, lse) if return_lse else out


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    engine: Engine | None = None,
    tol: float | None = None,
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention`, with its arguments and what they mean.

    Parameters
    ----------
    query : Tensor, shape (..., h, n, d)
    key : Tensor, shape (..., h, m, d)
    value : Tensor, shape (..., h, m, d_v)
        Leading axes broadcast.
    attn_mask : Tensor, broadcastable to (..., h, n, m), optional
        bool: True may be attended to. Of the dtype of query: added to the scores; it has a gradient. Rows that may
        attend to nothing are 0. A mask that is the same for all queries, as ``(batch, 1, 1, m)``, suits every engine,
        others `Exact` alone.
    dropout_p : float
        0: nothing is dropped here.
    is_causal : bool
        Row i sees keys ``j <= i``, also where ``n != m``; not together with a mask.
    scale : float, optional
        ``1/sqrt(d)`` unless given.
    enable_gqa : bool
        Whether ``h`` may be a multiple of the number of heads of key and value.
    engine, tol
        As for `attention`: `Exact` unless given.

    Returns
    -------
    Tensor, shape (..., h, n, d_v)
        Contiguous, of the dtype of query.

    Raises
    ------
    ShapeError, DtypeError, DeviceError, ArgumentError, NonFiniteError, ToleranceError
        An argument does not fit; the message says which, what it got and what it needs.

    Notes
    -----
    Cost: that of the engine, and some 30 microseconds.
    """
    if dropout_p != 0:
        raise ArgumentError(
            f"dropout_p is {_check.shown(dropout_p)}; expected 0.0: attention weights are never formed, so that none "
            "can be dropped"
        )
    if attn_mask is not None and is_causal:
        raise ArgumentError("attn_mask and is_causal=True are both given; expected one of them")
    for name, x in (("query", query), ("key", key), ("value", value)):
        check_tensor(name, x)
    key_bias = mask = bias = None
    if query.dim() > 2 or key.dim() > 2 or value.dim() > 2:
        query, key, value = _with_same_heads(query, key, value, enable_gqa)
    if attn_mask is not None:
        attn_mask = check_tensor("attn_mask", attn_mask)
        if attn_mask.dim() > max(query.dim(), key.dim(), value.dim()):
            raise ShapeError(
                f"attn_mask has shape {tuple(attn_mask.shape)}; expected at most the axes of the scores, (..., h, n, m)"
            )
        is_bool = attn_mask.dtype is torch.bool
        if _is_same_for_all_queries(attn_mask):
            # Of one row, which every engine serves.
            row = attn_mask if attn_mask.dim() < 2 else attn_mask.squeeze(-2)
            key_bias = row.expand(*row.shape[:-1], key.shape[-2]) if row.dim() else row.expand(key.shape[-2])
        elif is_bool:
            mask = attn_mask
        else:
            bias = attn_mask
    out = attention(
        query,
        key,
        value,
        engine=engine,
        tol=tol,
        causal=is_causal,
        scale=scale,
        key_bias=key_bias,
        query_offset=0 if is_causal else None,
        mask=mask,
        bias=bias,
        empty_rows="zero",
    )
    assert isinstance(out, Tensor)
    return out


def _is_same_for_all_queries(attn_mask: Tensor) -> bool:
    axes = attn_mask.dim()
    return axes < 2 or (attn_mask.shape[-2] == 1 and (axes < 3 or attn_mask.shape[-3] == 1))


def _with_same_heads(query: Tensor, key: Tensor, value: Tensor, grouped: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values whose numbers of heads fit, by PyTorch's rules: equal, or 1, or a divisor with GQA."""
    h, h_k, h_v = (x.shape[-3] if x.dim() > 2 else 1 for x in (query, key, value))
    if h == h_k == h_v:
        return query, key, value
    if grouped:
        for name, x, count in (("key", key, h_k), ("value", value, h_v)):
            if count == 0 or h % count:
                raise ShapeError(
                    f"{name} has {count} heads (shape {tuple(x.shape)}); expected a number that divides the {h} heads "
                    f"of query (shape {tuple(query.shape)})"
                )
        if h_k == h_v:
            return query, key, value
        # Groups of two sizes, which the engines do not know.
        return query, key.repeat_interleave(h // h_k, dim=-3), value.repeat_interleave(h // h_v, dim=-3)
    heads = max(h, h_k, h_v)
    for name, x, count in (("query", query, h), ("key", key, h_k), ("value", value, h_v)):
        if count not in (1, heads):
            raise ShapeError(
                f"{name} has {count} heads (shape {tuple(x.shape)}); expected {heads}, or 1; with enable_gqa=True, a "
                "divisor of query's"
            )
    query = _with_heads(query, heads)
    return (query, key, value) if h_k == h_v else (query, _with_heads(key, heads), _with_heads(value, heads))


def _with_heads(x: Tensor, heads: int) -> Tensor:
    x = x if x.dim() > 2 else x.unsqueeze(0)
    return x.expand(*x.shape[:-3], heads, *x.shape[-2:])


def _floats(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor, torch.dtype | None]:
    """The three as autocast wants them, checked; and the dtype that it casts options to, None outside of it."""
    cast: torch.dtype | None = None
    tensors = []
    for name, x in (("query", query), ("key", key), ("value", value)):
        x = check_tensor(name, x)
        if not tensors and torch.is_autocast_enabled(x.device.type if x.device.type != "meta" else "cpu"):
            cast = torch.get_autocast_dtype(x.device.type if x.device.type != "meta" else "cpu")
        if cast is not None:
            x = _autocast(x, cast)
        if x.dtype not in DTYPES:
            raise DtypeError(f"{name} has dtype {dtype_name(x.dtype)}; expected float32, float64, float16 or bfloat16")
        if x.dim() < 2:
            raise ShapeError(f"{name} has shape {tuple(x.shape)}; expected (..., heads, tokens, width)")
        if tensors:
            check_matches(name, x, tensors[0], "query")
        tensors.append(x)
    query, key, value = tensors
    if query.shape[-1] != key.shape[-1]:
        raise ShapeError(
            f"key has shape {tuple(key.shape)}; expected (..., m, {query.shape[-1]}) to match query of shape "
            f"{tuple(query.shape)}"
        )
    if value.shape[-2] != key.shape[-2]:
        raise ShapeError(
            f"value has shape {tuple(value.shape)}; expected (..., {key.shape[-2]}, d_v) to match key of shape "
            f"{tuple(key.shape)}"
        )
    return query, key, value, cast


def _autocast(x: Tensor, dtype: torch.dtype) -> Tensor:
    # As PyTorch does: float64 stays.
    return x.to(dtype) if x.is_floating_point() and x.dtype is not torch.float64 else x


def _with_same_batch(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The three with an axis of heads and the same axes of batch before it; expanded axes have stride 0."""
    axes = max(query.dim(), key.dim(), value.dim(), 3)
    query, key, value = (x if x.dim() == axes else x[(None,) * (axes - x.dim())] for x in (query, key, value))
    batch = query.shape[:-3]
    if key.shape[:-3] != batch or value.shape[:-3] != batch:
        try:
            batch = torch.broadcast_shapes(query.shape[:-3], key.shape[:-3], value.shape[:-3])
        except RuntimeError as error:
            raise ShapeError(
                f"key has shape {tuple(key.shape)} and value {tuple(value.shape)}; expected axes of batch that "
                f"broadcast with those of query, of shape {tuple(query.shape)}"
            ) from error
        query, key, value = (x.expand(*batch, *x.shape[-3:]) for x in (query, key, value))
    h, h_kv = query.shape[-3], key.shape[-3]
    if value.shape[-3] != h_kv:
        raise ShapeError(
            f"value has shape {tuple(value.shape)}; expected {h_kv} heads to match key of shape {tuple(key.shape)}"
        )
    if h != h_kv and (h_kv == 0 or h % h_kv):
        raise ShapeError(
            f"key has {h_kv} heads (shape {tuple(key.shape)}); expected a number that divides the {h} heads of query "
            f"(shape {tuple(query.shape)})"
        )
    return query, key, value


def _pair(window: Any) -> tuple[Any, Any]:
    if not isinstance(window, Sequence) or len(window) != 2:
        raise ArgumentError(f"window is {_check.shown(window)}; expected (left, right), each an integer >= 0 or None")
    return window[0], window[1]


def _option(name: str, value: Tensor, query: Tensor, cast: torch.dtype | None, others: Any) -> Tensor:
    """A tensor beside the three, of the dtype of query or of `others`; without those, of `others` alone."""
    x = check_tensor(name, value)
    if x.dtype in others:
        check_device(name, x, query, "query")
        return x
    if others and name == "mask":
        raise DtypeError(f"{name} has dtype {dtype_name(x.dtype)}; expected bool")
    if cast is not None:
        x = _autocast(x, cast)
    check_matches(name, x, query, "query")
    return x


def _expanded(name: str, x: Tensor, full: tuple[int, ...], heads: int) -> Tensor:
    """Numbers of tokens with all axes of batch and one of heads, which stays 1 where it is."""
    shape = x.shape
    if 1 < x.dim() == len(full) - 1:  # (batch, m)
        x = x.unsqueeze(-2)
    wanted = (*full[:-2], x.shape[-2] if x.dim() > 1 else 1, full[-1])
    try:
        if x.dim() == 0 or x.shape[-1] != full[-1] or wanted[-2] not in (1, heads):
            raise RuntimeError
        return x.expand(wanted)
    except RuntimeError:
        tokens, batch = full[-1], ", ".join(map(str, full[:-2]))
        raise ShapeError(
            f"{name} has shape {tuple(shape)}; expected ({tokens},), or ({batch}, {tokens}), or with an axis of 1 or "
            f"{heads} heads before the last"
        ) from None


def _check_broadcasts(name: str, x: Tensor, full: tuple[int, ...]) -> None:
    got = x.shape
    if len(got) > len(full) or any(a not in (1, b) for a, b in zip(reversed(got), reversed(full), strict=False)):
        raise ShapeError(f"{name} has shape {tuple(got)}; expected what broadcasts to {tuple(full)}")
