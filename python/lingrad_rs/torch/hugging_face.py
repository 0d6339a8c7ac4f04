"""The library as an attention implementation of Hugging Face's transformers."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import _check
from ..errors import ArgumentError
from ..spec.engines import Engine
from .engines import text_of_engine
from .functional import attention
from .masks import Structure, structure_of
from .reports import Listener, reports
from .tensors import is_plain

__all__ = ["register_hugging_face"]

# What changes results and is not served here. Others (position_ids, use_cache, ...) say nothing to attention.
_REFUSED = {
    "head_mask": "single heads are not weighted here",
    "indices": "keys are not chosen one by one here",
    "block_indices": "keys are not chosen block by block here",
}


def register_hugging_face(
    name: str = "lingrad",
    *,
    engine: Engine | None = None,
    tol: float | None = None,
    report: Listener | None = None,
) -> None:
    """Make ``attn_implementation=name`` known to transformers: its attention function, and its masks.

    Models are then made with ``from_pretrained(..., attn_implementation=name)``, or changed by
    ``model.set_attn_implementation(name)``.

    Parameters
    ----------
    name : str
        Registering a name again replaces it.
    engine : Engine, optional
        `Exact` unless given, so that results stay as they are.
    tol : float, optional
        In place of an engine: each head of each layer is within this relative error, or exact.
    report : callable, optional
        Called with what each head chose within the tolerance, once for each layer of a forward pass; see `reports`.

    Raises
    ------
    ArgumentError, ToleranceError
        The name, the engine or the tolerance will not do. Models raise it for what cannot be served: dropout of
        attention weights in training, weights of attention as an output, masks of heads.
    ModuleNotFoundError
        transformers is not installed, or older than 4.57.

    Notes
    -----
    Served: padding on either side, sequences packed by position ids, sliding windows, softcaps, sinks, biases of
    positions, static and dynamic caches. Causal masks, windows, padding and packing are handed on as such, so that no
    mask of n x m is made; other masks, and those of compiled models, are made as for "sdpa", and need `Exact`. Rows of
    padding, which see nothing, are 0.
    """
    if not _check.is_text(name) or not name:
        raise ArgumentError(f"name is {_check.shown(name)}; expected a text, such as 'lingrad'")
    text_of_engine(engine, tol)  # so that what will not do is told here
    if report is not None and not callable(report):
        raise ArgumentError(f"report is {_check.shown(report)}; expected a callable")
    try:
        from transformers import AttentionInterface, AttentionMaskInterface, masking_utils
    except ImportError as error:
        raise ModuleNotFoundError(
            "register_hugging_face needs transformers of 4.57 or later: pip install 'lingrad_rs[huggingface]'"
        ) from error
    AttentionInterface.register(name, _attention_function(engine, tol, report))
    # Without this one, models make no masks, and padding would be attended to.
    AttentionMaskInterface.register(name, functools.partial(_mask, masking_utils))


def _attention_function(engine: Engine | None, tol: float | None, report: Listener | None) -> Callable[..., Any]:
    def lingrad_attention(
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        dropout: float = 0.0,
        scaling: float | None = None,
        is_causal: bool | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        position_bias: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """``(batch, n, h, d_v)`` from ``(batch, h, n, d)``, and no weights."""
        _refuse(dropout, kwargs)
        options = _mask_options(module, query, key, attention_mask, is_causal, kwargs.get("sliding_window"))
        if position_bias is not None:
            bias = position_bias[..., : key.shape[-2]]
            options["bias"] = bias + options["bias"] if "bias" in options else bias
        sinks = kwargs.get("sinks") if s_aux is None else s_aux
        if sinks is not None:
            # A parameter of another dtype than what the layers compute in, with some models.
            options["sinks"] = sinks.reshape(-1).to(query.dtype)
        with contextlib.nullcontext() if report is None else reports(report):
            out = attention(
                query,
                key,
                value,
                engine=engine,
                tol=tol,
                scale=scaling,
                softcap=softcap,
                empty_rows="zero",
                **options,
            )
        assert isinstance(out, Tensor)
        return out.transpose(1, 2).contiguous(), None

    return lingrad_attention


def _refuse(dropout: float, kwargs: dict[str, Any]) -> None:
    if dropout != 0:
        raise ArgumentError(
            f"dropout is {dropout}; expected 0.0: attention weights are never formed, so that none can be dropped: "
            "model.eval(), or attention_dropout=0.0 in the model's config"
        )
    if kwargs.get("output_attentions"):
        raise ArgumentError(
            "output_attentions is True; expected False: attention weights are never formed; attn_implementation="
            "'eager' has them"
        )
    for name, why in _REFUSED.items():
        if kwargs.get(name) is not None:
            raise ArgumentError(f"{name} is given; expected None: {why}")


def _mask_options(
    module: torch.nn.Module, query: Tensor, key: Tensor, mask: Any, is_causal: bool | None, sliding_window: int | None
) -> dict[str, Any]:
    """The options of `attention` for what a model says of its mask."""
    if isinstance(mask, Structure):
        return dict(mask.options)
    if mask is not None:
        mask = mask[..., : key.shape[-2]]
        if mask.dtype is not torch.bool:
            return {"bias": mask.to(query.dtype)}
        # A row suits every engine, which masks of pairs do not.
        is_row = mask.dim() == 4 and mask.shape[1] == mask.shape[2] == 1
        return {"key_bias": mask[:, 0]} if is_row else {"mask": mask}
    # No mask was made, so that the module says what it is: as for "sdpa", counted from the first key.
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if not causal or query.shape[-2] == 1:
        return {}
    window = None if sliding_window is None else (sliding_window - 1, None)
    return {"causal": True, "query_offset": 0, "window": window}


def _mask(
    masking_utils: Any,
    batch_size: int,
    kv_length: int,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Any = None,
    **kwargs: Any,
) -> Structure | Tensor:
    """The mask of a layer as its structure; as ``(batch, 1, n, m)`` bools where that is not known."""
    if isinstance(attention_mask, Structure):  # made by an outer model
        return attention_mask
    if mask_function is None:
        mask_function = masking_utils.causal_mask_function
    # Always a mask: None would leave to each module to say what it sees.
    skips = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}

    def dense() -> Tensor:
        sdpa_mask: Any = masking_utils.sdpa_mask  # whose types say neither Tensor nor None
        return sdpa_mask(
            batch_size=batch_size,
            kv_length=kv_length,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            **(kwargs | skips),
        )

    rows = _rows(kwargs)
    if rows is None or not is_plain(attention_mask) or not all(isinstance(x, int) for x in (kv_length, kv_offset)):
        return dense()
    q_length, q_offset = rows
    padding = None if attention_mask is None else attention_mask[:, kv_offset : kv_offset + kv_length].to(torch.bool)
    if padding is not None:
        # A static cache holds keys that are yet to come.
        padding = torch.nn.functional.pad(padding, (0, kv_length - padding.shape[-1]))
        padding = None if bool(padding.all()) else padding
    found = structure_of(
        mask_function,
        batch=batch_size,
        n=q_length,
        m=kv_length,
        offset=q_offset - kv_offset,
        padding=padding,
        dense=dense,
        positions=(q_offset, kv_offset),
    )
    return dense() if found is None else found


def _rows(kwargs: dict[str, Any]) -> tuple[int, int] | None:
    """How many queries there are, and the position of the first; None where that is not to be read.

    Tracing reads no values. A static cache counts in a tensor: read for many queries, and not for one, whose mask is a
    row and whose step may be compiled.
    """
    positions = kwargs.get("cache_position")  # of all queries, before transformers 5
    first = kwargs.get("q_offset", 0) if positions is None else positions
    length = kwargs.get("q_length") if positions is None else len(positions)
    if not isinstance(length, int):
        return None
    if not isinstance(first, Tensor):
        return (length, first) if isinstance(first, int) else None
    if length <= 1 or not is_plain(first):
        return None
    offset = int(first.reshape(-1)[0])
    if positions is not None and not torch.equal(positions, torch.arange(offset, offset + length).to(positions)):
        return None
    return length, offset
