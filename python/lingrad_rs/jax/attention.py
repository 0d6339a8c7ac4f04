"""`dot_product_attention`: JAX's arguments, checked and handed to the host, and the rule of its gradient."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

import lingrad_rs as lg

from .. import _check
from ..errors import ArgumentError, DtypeError, ShapeError
from ..spec.engines import Engine, Exact, check_engine
from . import host
from .sharding import over_shards, same_varying_axes, varying_like

__all__ = ["dot_product_attention"]

_FLOATS = ("float32", "float64", "float16", "bfloat16")


def dot_product_attention(
    query: Any,
    key: Any,
    value: Any,
    bias: Any = None,
    mask: Any = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: Any = None,
    key_value_seq_lengths: Any = None,
    local_window_size: int | tuple[int, int] | None = None,
    return_residual: bool = False,
    engine: Engine | None = None,
    tol: float | None = None,
) -> Any:
    """Attention with the arguments and the meaning of ``jax.nn.dot_product_attention``.

    ``out_i = sum_j exp(s_ij) v_j / sum_j exp(s_ij)`` with ``s_ij = scale q_i . k_j + bias_ij``, head by head, over the
    pairs that masks leave. Exact, unless an engine or a tolerance is given.

    Parameters
    ----------
    query : Array, shape (B, T, N, H) or (T, N, H)
        float32, float64, float16 or bfloat16.
    key : Array, shape (B, S, K, H) or (S, K, H)
        Of the same dtype. ``N`` is a multiple of ``K``: query head ``i`` reads key head ``i // (N // K)``.
    value : Array, shape (B, S, K, H_v) or (S, K, H_v)
        Of the same dtype. ``H_v`` may differ from ``H``, other than in ``jax.nn``.
    bias : Array, broadcastable to (B, N, T, S), optional
        Added to the scores. Of a wider dtype than query, it widens what is computed with, and not the result's dtype.
    mask : bool Array, broadcastable to (B, N, T, S), optional
        True where a query may attend to a key.
    scale : float, optional
        The factor of the scores; ``1/sqrt(H)`` unless given. A Python number: to learn it, multiply the query.
    is_causal : bool
        Whether query i sees only keys ``j <= i``, also where T and S differ.
    query_seq_lengths, key_value_seq_lengths : integer Array, shape (B,), optional
        Rows beyond the former are 0; keys beyond the latter are not seen.
    local_window_size : int or (int, int), optional
        Query i sees keys ``i - left <= j <= i + right``.
    return_residual : bool
        Whether to return the logarithms of the rows' denominators too, without a gradient.
    engine : Exact, Polynomial, Landmark, Multipole or Auto, optional
        How it is computed; see `lingrad_rs.attention`. A bias or mask that is the same for all heads and queries
        ``(B or 1, 1, 1, S)`` is a bias of keys, which every engine takes; others are for `Exact`.
    tol : float, optional
        In place of an engine: each head is within this relative error, or exact.

    Returns
    -------
    out : Array, shape (B, T, N, H_v) or (T, N, H_v)
        Of the dtype of query.
    residual : Array, shape (B, T, N) or (T, N)
        With `return_residual`, in the dtype of key.

    Raises
    ------
    ShapeError, DtypeError, ArgumentError, ToleranceError
        An argument does not fit; while JAX traces.
    jax.errors.JaxRuntimeError
        When it runs: the message holds the library's own, such as a NonFiniteError's of an array that holds NaN.

    Notes
    -----
    Gradients: of query, key, value and bias, in reverse mode and once; JAX refuses ``jax.jvp``, and gradients of
    gradients. NaN and infinity in what comes in from behind go through, as loss scaling needs them to.

    Rows without a key are what they are in ``jax.nn``: the mean of the values of the keys that masks removed; NaN where
    the bias alone is ``-inf`` throughout, but without a part in gradients.

    ``jit``, ``vmap``, ``scan`` and ``checkpoint`` work as for any function. The host is called by
    ``jax.pure_callback``. Inside ``jax.shard_map`` each device computes its own part; so it is without one where the
    mesh has explicit axes. With automatic axes XLA gathers what a call of the host reads: use ``jax.shard_map`` there.
    """
    options = host.Options(
        engine=Exact() if engine is None and tol is None else None if engine is None else check_engine(engine),
        tol=tol,
        scale=_scale(scale),
        is_causal=_check.flag("is_causal", is_causal),
        window=_window(local_window_size),
    )
    wants_residual = _check.flag("return_residual", return_residual)
    shape = jnp.shape(query)
    query, key, value = _inputs(query, key, value)
    b, t, n, _ = query.shape
    s = key.shape[1]
    if bias is not None:
        bias = _broadcastable("bias", bias, (b, n, t, s))
    if mask is not None:
        mask = _broadcastable("mask", mask, (b, n, t, s))
    arrays: dict[str, Any] = {"query": query, "key": key, "value": value}
    if bias is not None:
        if not jnp.issubdtype(bias.dtype, jnp.number) or jnp.issubdtype(bias.dtype, jnp.complexfloating):
            raise DtypeError(f"bias has dtype {bias.dtype}; expected numbers (what is bool goes into mask)")
        wide = jnp.promote_types(query.dtype, bias.dtype)
        arrays = {name: x.astype(wide) for name, x in arrays.items()}
        # The same for all heads and queries: a bias of keys.
        by_keys = bias.shape[1:3] == (1, 1)
        arrays |= {"key_bias": _of_keys(bias.astype(wide), b, s)} if by_keys else {"bias": bias.astype(wide)}
    key_mask = None
    if key_value_seq_lengths is not None:
        lengths = _lengths("key_value_seq_lengths", key_value_seq_lengths, b)
        key_mask = (jnp.arange(s) < lengths[:, None])[:, None]
    if mask is not None:
        if mask.dtype != bool:
            raise DtypeError(f"mask has dtype {mask.dtype}; expected bool (numbers to be added go into bias)")
        if mask.shape[1:3] == (1, 1):
            of_keys = _of_keys(mask, b, s)
            key_mask = of_keys if key_mask is None else key_mask & of_keys
        else:
            arrays["mask"] = mask
    if key_mask is not None:
        arrays["key_mask"] = key_mask
    if query_seq_lengths is not None:
        arrays["query_lengths"] = _lengths("query_seq_lengths", query_seq_lengths, b)
    _ask_engine(options, arrays)
    if 0 in (b, t):
        out, lse = jnp.zeros((b, t, n, value.shape[-1]), query.dtype), jnp.zeros((b, n, t), jnp.float32)
    else:
        out, lse = over_shards(functools.partial(_attend, options), arrays)
    out = out.astype(query.dtype).reshape(*shape[:-1], value.shape[-1])
    if not wants_residual:
        return out
    residual = jnp.maximum(jax.lax.stop_gradient(lse), host.LOWEST)
    if "query_lengths" in arrays:
        beyond = jnp.arange(t) >= arrays["query_lengths"][:, None, None]
        residual = jnp.where(beyond, host.LOWEST, residual)
    return out, residual.swapaxes(1, 2).astype(key.dtype).reshape(shape[:-1])


def _attend(options: host.Options, arrays: dict[str, Any]) -> tuple[Any, Any]:
    arrays = same_varying_axes(arrays)
    floats = {name: x for name, x in arrays.items() if jnp.issubdtype(x.dtype, jnp.floating)}
    return _attention(options, floats, {name: x for name, x in arrays.items() if name not in floats})


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(options: host.Options, floats: dict[str, Any], others: dict[str, Any]) -> tuple[Any, Any]:
    query, value = floats["query"], floats["value"]
    b, t, n, _ = query.shape
    results = (
        jax.ShapeDtypeStruct((b, t, n, value.shape[-1]), query.dtype),
        jax.ShapeDtypeStruct((b, n, t), jnp.promote_types(query.dtype, jnp.float32)),
    )
    return _call_host(functools.partial(host.forward, options), results, floats | others)


def _attention_forward(options: host.Options, floats: dict[str, Any], others: dict[str, Any]) -> tuple[Any, Any]:
    results = _attention(options, floats, others)
    return results, (floats, others, results)


def _attention_backward(options: host.Options, kept: Any, grads: tuple[Any, Any]) -> tuple[dict[str, Any], None]:
    floats, others, (out, lse) = kept
    dout, _ = grads
    results = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in floats.items()}
    arrays = floats | others | {"out": out, "lse": lse, "dout": dout}
    return _call_host(functools.partial(host.backward, options), results, arrays), None


_attention.defvjp(_attention_forward, _attention_backward)


def _call_host(function: Any, results: Any, arrays: dict[str, Any]) -> Any:
    # What vmap does not map comes with an axis of length 1.
    computed = jax.pure_callback(function, results, arrays, vmap_method="expand_dims")
    return varying_like(arrays["query"], computed)


def _ask_engine(options: host.Options, arrays: dict[str, Any]) -> None:
    """Raise what the library says of these options, while JAX traces: on one token of zeros."""
    if options.tol is None and isinstance(options.engine, Exact):
        return
    keywords = options.keywords()
    kind = np.dtype(arrays["query"].dtype)
    query, value = (np.zeros((1, 1, arrays[name].shape[-1]), kind) for name in ("query", "value"))
    if "bias" in arrays:
        keywords["bias"] = np.zeros((1, 1, 1), kind)
    if "mask" in arrays:
        keywords["mask"] = np.ones((1, 1, 1), np.bool_)
    if "key_bias" in arrays or "key_mask" in arrays:
        keywords["key_bias"] = np.zeros((1, 1), kind)
    lg.attention(query, query, value, **keywords)


def _inputs(query: Any, key: Any, value: Any) -> tuple[Any, Any, Any]:
    arrays: dict[str, Any] = {}
    for name, given in (("query", query), ("key", key), ("value", value)):
        x = _array(name, given)
        if str(x.dtype) not in _FLOATS:
            raise DtypeError(f"{name} has dtype {x.dtype}; expected one of {', '.join(_FLOATS)}")
        if x.ndim not in (3, 4):
            raise ShapeError(
                f"{name} has shape {x.shape}; expected four axes (batch, tokens, heads, width), or the last three"
            )
        arrays[name] = x if x.ndim == 4 else x[None]
    query, key, value = arrays.values()
    for name in ("key", "value"):
        _check.same_dtype(name, arrays[name], query.dtype, match="query")
    b, _, n, h = query.shape
    _, s, n_keys, _ = key.shape
    _check.shape("key", key, (b, "S", "K", h), match=f"query of shape {query.shape}")
    _check.shape("value", value, (b, s, n_keys, "H_v"), match=f"key of shape {key.shape}")
    if 0 in (h, s, n_keys, value.shape[-1]):
        raise ShapeError(
            f"key has shape {key.shape} and value {value.shape}; expected no axis of length 0 but the batch"
        )
    if n % n_keys or n == 0:
        raise ShapeError(f"query has {n} heads and key has {n_keys}; expected a multiple of the heads of key")
    return query, key, value


def _array(name: str, given: Any) -> Any:
    try:
        return jnp.asarray(given)
    except TypeError:
        raise DtypeError(f"{name} is a {_check.type_name(given)}; expected an array") from None


def _broadcastable(name: str, given: Any, shape: tuple[int, ...]) -> Any:
    """An array with four axes, each of length 1 or that of `shape`."""
    x = _array(name, given)
    if x.ndim > 4 or any(length not in (1, full) for length, full in zip(x.shape[::-1], shape[::-1], strict=False)):
        raise ShapeError(f"{name} has shape {x.shape}; expected what broadcasts to (B, N, T, S) = {shape}")
    return x.reshape((1,) * (4 - x.ndim) + x.shape)


def _of_keys(x: Any, b: int, s: int) -> Any:
    return jnp.broadcast_to(x[:, 0], (b, 1, s))


def _lengths(name: str, given: Any, b: int) -> Any:
    x = _array(name, given)
    if not jnp.issubdtype(x.dtype, jnp.integer):
        raise DtypeError(f"{name} has dtype {x.dtype}; expected integers")
    _check.shape(name, x, (b,), match="the batch of query")
    return x


def _scale(scale: Any) -> float | None:
    if isinstance(scale, Tracer):
        raise ArgumentError("scale is traced by JAX; expected a Python number (to learn a scale, multiply query by it)")
    if isinstance(scale, jax.Array | np.ndarray) and scale.ndim == 0:
        scale = scale.item()
    return None if scale is None else _check.number("scale", scale)


def _window(size: Any) -> tuple[int, int] | None:
    if size is None:
        return None
    if isinstance(size, tuple | list):
        if len(size) != 2:
            raise ArgumentError(
                f"local_window_size is {_check.shown(size)}; expected an integer, or two: (left, right)"
            )
        left, right = size
    else:
        left = right = size
    return _check.integer("local_window_size", left, 0), _check.integer("local_window_size", right, 0)
