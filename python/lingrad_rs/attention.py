"""Attention and its gradient, exact or in low-rank form."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from . import _check
from .backends import select
from .errors import ArgumentError, DtypeError, ShapeError
from .spec.engines import Auto, Engine, Exact, Polynomial, check_engine, not_derived
from .spec.plan import ErrorEstimate, HeadPlan, PlanData, head_plans, unplanned
from .spec.scores import Scores, scores_of

__all__ = [
    "Plan",
    "Pullback",
    "attention",
    "attention_backward",
    "attention_vjp",
    "measure_error",
    "plan_attention",
]

_Arrays = tuple[NDArray[Any], NDArray[Any], NDArray[Any]]

_DEFAULT = Polynomial(degree=2)


class Pullback:
    """What `attention_vjp` returns beside ``out``: ``vjp(dout)`` gives the gradients.

    Attributes
    ----------
    heads : tuple of HeadPlan
        With a tolerance: the engine of each head (leading axes flattened) and its measured errors, those of gradients
        after a call; of the last call, if there were many. Without one, empty, or what a call with ``samples``
        measured.
    """

    def __init__(
        self,
        call: Callable[[NDArray[Any], int], tuple[tuple[NDArray[Any], ...], tuple[HeadPlan, ...]]],
        heads: tuple[HeadPlan, ...],
    ) -> None:
        self._call = call
        self.heads = heads

    def __call__(self, dout: NDArray[Any], *, samples: int = 0) -> tuple[NDArray[Any], ...]:
        """``(dq, dk, dv)``, and ``dkey_bias`` where a key bias was given.

        With ``samples``, and without a tolerance (which measures always), so many queries and keys of each head are
        also computed exactly, and `heads` tell the errors of out, dq, dk and dv, with 95% intervals. They are drawn as
        in `measure_error`, by the sizes of ``dout`` and of the gradients too. Exact gradients of keys take the exact
        row sums of the drawn queries; what those of others may add widens their intervals.
        """
        grads, heads = self._call(dout, _check.integer("samples", samples, 0))
        self.heads = heads or self.heads
        return grads


def attention(
    q: NDArray[Any],
    k: NDArray[Any],
    v: NDArray[Any],
    *,
    engine: Engine | None = None,
    tol: float | None = None,
    causal: bool = False,
    scale: float | None = None,
    key_bias: NDArray[Any] | None = None,
    query_offset: int | None = None,
    window: tuple[int | None, int | None] | None = None,
    segment_ids: NDArray[Any] | None = None,
    mask: NDArray[Any] | None = None,
    bias: NDArray[Any] | None = None,
    softcap: float | None = None,
    sinks: NDArray[Any] | None = None,
    empty_rows: Literal["error", "zero"] = "error",
    return_lse: bool = False,
) -> Any:
    """Attention, head by head.

    ``out_i = sum_j exp(s_ij) v_j / sum_j exp(s_ij)`` over the keys that row i may attend to, with
    ``s_ij = cap(scale q_i . k_j) + key_bias_j + bias_ij`` and ``cap(x) = softcap tanh(x / softcap)``; `Polynomial` and
    `Landmark` replace ``exp``, and a tolerance chooses.

    Parameters
    ----------
    q : ndarray, shape (..., h, n, d)
        Queries, float32, float64, float16 or bfloat16 (of ``ml_dtypes``), any strides. Two axes are one head, three are
        heads, the others batch, whose axes broadcast. All arrays are NumPy's, or CuPy's on one device; so are the
        results. Half precision is computed in float32 (NumPy only).
    k : ndarray, shape (..., h_kv, m, d)
        Keys. ``h`` is a multiple of ``h_kv``: query head ``i`` reads key head ``i // (h // h_kv)``.
    v : ndarray, shape (..., h_kv, m, d_v)
        Values.
    engine : Exact, Polynomial, Landmark or Auto, optional
        How it is computed; `Polynomial` of degree 2 unless given.
    tol : float, optional
        In place of an engine: each head is within this relative error, or exact; see `Auto`.
    causal : bool
        Whether row i sees only keys ``j <= i + query_offset``.
    scale : float, optional
        The factor of the scores; ``1/sqrt(d)`` unless given.
    key_bias : ndarray, shape (..., h_kv, m), optional
        Added to the scores of a key, in the arrays' dtype by `Exact`; ``-inf`` removes a key (padding). So do the
        numbers that other libraries use for it, as ``finfo.min``, in rows that see another key; causal rows that see no
        other are refused by `Landmark` and by a shifted `Polynomial`. It broadcasts from ``(m,)``, ``(batch, m)`` and
        ``(batch, 1, m)``. Of bool, True stands for a key that may be attended to.
    query_offset : int, optional
        Where row 0 stands, counted from key 0: 0 as in PyTorch's ``is_causal``, ``m - n`` as with a cache. Needed with
        ``causal`` or a window where n and m differ; in ``-n .. m``.
    window : pair of int or None, optional
        ``(left, right)``: row i sees the keys from ``i + query_offset - left`` to ``i + query_offset + right``; None
        for no limit. Time and memory fall with the window. `Exact` only.
    segment_ids : ndarray of integers, shape (..., n), optional
        Packed sequences: tokens of one segment see only each other. They increase from segment to segment, and
        broadcast as key_bias does; n and m are equal.
    mask : ndarray of bool, shape (..., h, n, m), optional
        Which pairs count. Broadcasts; tiles of pairs without any are skipped. `Exact` only.
    bias : ndarray, shape (..., h, n, m), optional
        Added to the scores; ``-inf`` hides a pair. Broadcasts. `Exact` only.
    softcap : float, optional
        Above 0: what scores stay below in size, before biases are added. `Exact` only.
    sinks : ndarray, shape (h,), optional
        A score for each head that joins each of its denominators, and has no value.
    empty_rows : {"error", "zero"}
        What a row is that may attend to no key.
    return_lse : bool
        Whether to return the logarithms of the denominators too.

    Returns
    -------
    out : ndarray, shape (..., h, n, d_v)
        A new C-contiguous array of the same dtype.
    lse : ndarray, shape (..., h, n), float64
        With ``return_lse``: ``log sum_j exp(s_ij)``, sinks included; minus infinity for rows without keys.

    Raises
    ------
    ShapeError, DtypeError, DeviceError, ArgumentError
        An argument does not fit; the message says which, what it got and what it needs.
    ToleranceError
        ``tol`` is not in (0, 1), or below what the dtype allows.
    NonFiniteError
        An array holds NaN or infinity, or the result would.
    DenominatorError
        A row sums to a number that is not positive, or not finite, or has no key to attend to; or, causal, it sees no
        ``key_bias`` nearer to 0 than 4.5e9, beside which `Landmark` and a shifted `Polynomial` lose what keys add.

    Notes
    -----
    Cost: that of the engine. Source: arXiv 2408.13233.
    """
    options = _options(locals())
    engine = _chosen(engine, tol, gradients=False)
    wants_lse = _check.flag("return_lse", return_lse)
    arrays, scores = _arguments(q, k, v, engine, options)
    out, lse, _ = select.of(*arrays).attention_forward(*arrays, scores, engine=engine, keep=False, wants_lse=wants_lse)
    return (out, lse) if wants_lse else out


def attention_vjp(
    q: NDArray[Any],
    k: NDArray[Any],
    v: NDArray[Any],
    *,
    engine: Engine | None = None,
    tol: float | None = None,
    causal: bool = False,
    scale: float | None = None,
    key_bias: NDArray[Any] | None = None,
    query_offset: int | None = None,
    window: tuple[int | None, int | None] | None = None,
    segment_ids: NDArray[Any] | None = None,
    mask: NDArray[Any] | None = None,
    bias: NDArray[Any] | None = None,
    softcap: float | None = None,
    sinks: NDArray[Any] | None = None,
    empty_rows: Literal["error", "zero"] = "error",
) -> tuple[NDArray[Any], Pullback]:
    """Attention, and the function that pulls a gradient back through it.

    With ``f`` the normalised rows, ``delta_i = dout_i . out_i`` and ``dS = f * (dout v^T - delta 1^T)``:
    ``dq = scale dS k``, ``dk = scale dS^T q``, ``dv = f^T dout``, ``dkey_bias = dS^T 1``, ``dbias = dS``; where scores
    are capped, those of q and k take dS times the derivative of the cap. With ``p_i`` the sink's share of row i,
    ``dsink = -sum_i p_i delta_i``. Gradients of what broadcasts are summed.

    Parameters
    ----------
    q, k, v, engine, tol, causal, scale, key_bias
    query_offset, window, segment_ids, mask, bias, softcap, sinks, empty_rows
        As for `attention`; ``tol`` holds for the gradients too.

    Returns
    -------
    out : ndarray, shape (..., h, n, d_v)
        As from `attention`.
    vjp : Pullback
        ``vjp(dout)`` returns ``(dq, dk, dv)``, then ``dkey_bias``, ``dbias`` and ``dsinks``, each where it was given
        (and, of key_bias, is not of bool): new arrays of their shapes. It may be called many times. It reads q, k, v
        and the options' arrays again, so they must not change in between; ``out`` may. With a tolerance, ``vjp.heads``
        tells what was chosen and measured.

    Raises
    ------
    ToleranceError, ShapeError, DtypeError, DeviceError, ArgumentError, NonFiniteError, DenominatorError
        As from `attention`; ``vjp`` for a ``dout`` that does not fit ``out``.

    Notes
    -----
    Memory kept until ``vjp`` is gone: the inputs, a copy of ``out``, two numbers a query, and with the consistent
    gradient and no mask a state no larger than keys and values. Time: that of the engine.
    """
    options = _options(locals())
    engine = _chosen(engine, tol, gradients=True)
    return _vjp(*_arguments(q, k, v, engine, options), engine, options, (q, k, v))


def attention_backward(
    dout: NDArray[Any],
    q: NDArray[Any],
    k: NDArray[Any],
    v: NDArray[Any],
    out: NDArray[Any],
    lse: NDArray[Any],
    *,
    engine: Engine | None = None,
    tol: float | None = None,
    causal: bool = False,
    scale: float | None = None,
    key_bias: NDArray[Any] | None = None,
    query_offset: int | None = None,
    window: tuple[int | None, int | None] | None = None,
    segment_ids: NDArray[Any] | None = None,
    mask: NDArray[Any] | None = None,
    bias: NDArray[Any] | None = None,
    softcap: float | None = None,
    sinks: NDArray[Any] | None = None,
    empty_rows: Literal["error", "zero"] = "error",
    check_finite: bool = True,
) -> tuple[NDArray[Any], ...]:
    """The gradients of `attention`, from its inputs and results alone: what an operator of another library needs.

    The equations are those of `attention_vjp`; `Exact` takes ``f_ij = exp(s_ij - lse_i)``, and other engines run their
    forward pass again.

    Parameters
    ----------
    dout : ndarray, shape (..., h, n, d_v)
        The gradient of a loss with respect to ``out``.
    q, k, v, engine, tol, causal, scale, key_bias
    query_offset, window, segment_ids, mask, bias, softcap, sinks, empty_rows
        As they were given to `attention`.
    out : ndarray, shape (..., h, n, d_v)
    lse : ndarray, shape (..., h, n), float64
        What ``attention(..., return_lse=True)`` returned. Rounded to float32, each row's weights are off by the factor
        ``1 + 6e-8 |lse|``, at the most.
    check_finite : bool
        Whether a gradient that is not finite is an error; if not, it passes through (training in half precision looks
        for it).

    Returns
    -------
    tuple of ndarray
        As from the pullback of `attention_vjp`.

    Raises
    ------
    ToleranceError, ShapeError, DtypeError, DeviceError, ArgumentError, NonFiniteError, DenominatorError
        As from `attention_vjp`.

    Notes
    -----
    Cost: as the pullback of `attention_vjp`; for engines other than `Exact` that of a forward pass too.
    """
    options = _options(locals())
    engine = _chosen(engine, tol, gradients=True)
    arrays, scores = _arguments(q, k, v, engine, options)
    finite = _check.flag("check_finite", check_finite)
    shape = (*arrays[0].shape[:-1], arrays[2].shape[-1])
    _, dout, out = _check.floats(True, q=arrays[0], dout=dout, out=out)
    _check.shape("dout", dout, shape, match=f"out of shape {shape}")
    _check.shape("out", out, shape, match="q and v")
    lse = _check.array("lse", lse)
    if not _check.is_float(lse):
        raise DtypeError(f"lse has dtype {_check.dtype_name(lse)}; expected float64, as from attention, or float32")
    _check.same_device("lse", lse, arrays[0], match="q")
    _check.shape("lse", lse, shape[:-1], match=f"out of shape {shape}")
    lse = select.of(*arrays).in_float64(lse)
    grads = select.of(*arrays).attention_backward_again(
        dout, *arrays, out, lse, scores, engine=engine, check_finite=finite
    )
    return _given(grads, (q, k, v), scores, options)


def _vjp(
    arrays: _Arrays, scores: Scores, engine: Engine | PlanData, options: dict[str, Any], given: _Arrays
) -> tuple[NDArray[Any], Pullback]:
    q, k, v = arrays
    backend = select.of(q, k, v)
    out, _, state = backend.attention_forward(q, k, v, scores, engine=engine, keep=True, wants_lse=False)
    shape = out.shape

    def call(dout: NDArray[Any], samples: int) -> tuple[tuple[NDArray[Any], ...], tuple[HeadPlan, ...]]:
        _, dout = _check.floats(True, q=q, dout=dout)
        _check.shape("dout", dout, shape, match=f"out of shape {shape}")
        grads, reports = backend.attention_backward(q, k, v, scores, state, dout, samples=samples)
        return _given(grads, given, scores, options), head_plans(reports)

    return out, Pullback(call, () if state is None else head_plans(state.reports()))


def _given(
    grads: Sequence[NDArray[Any] | None], given: Sequence[Any], scores: Scores, options: dict[str, Any]
) -> tuple[NDArray[Any], ...]:
    """The gradients of what was given, q, k and v first, in the shapes that it was given in."""
    backend, results = select.of(*given), []
    for x, gradient in zip(given, grads[:3], strict=True):
        assert gradient is not None
        same = gradient.shape == x.shape
        results.append(gradient if same else backend.summed_to(gradient, x.shape, x.shape))
    for name, gradient in zip(("key_bias", "bias", "sinks"), grads[3:], strict=True):
        if gradient is not None and not _is_bool(options[name]):
            results.append(backend.summed_to(gradient, getattr(scores, name).shape, options[name].shape))
    return tuple(results)


def _is_bool(x: Any) -> bool:
    return select.kind(x) is not None and _check.dtype_name(x) == "bool"


class Plan(PlanData):
    """An engine for each head, chosen within a tolerance by `lingrad_rs.plan_attention`; to be used again.

    Each use is verified like a call with ``tol=``: what misses the tolerance is computed exactly, and ``vjp.heads``
    says that the plan is stale, or what the gradients missed.

    Attributes
    ----------
    auto : Auto
        The tolerance, and how it was met.
    heads : tuple of HeadPlan
        One a head, leading axes flattened.
    causal : bool
    scale : float
    shapes : tuple
        Of q, k and v.
    dtype : str

    Raises
    ------
    ArgumentError
        A field has a value that it may not have, or fields do not fit together.
    """

    def attention(
        self, q: NDArray[Any], k: NDArray[Any], v: NDArray[Any], *, key_bias: NDArray[Any] | None = None
    ) -> NDArray[Any]:
        """Attention by the plan; see `lingrad_rs.attention`.

        Raises
        ------
        ShapeError, DtypeError
            The plan was made for data of another shape or dtype.
        """
        arrays, scores, _ = _planned(self, q, k, v, key_bias)
        return select.of(*arrays).attention_forward(*arrays, scores, engine=self, keep=False, wants_lse=False)[0]

    def attention_vjp(
        self, q: NDArray[Any], k: NDArray[Any], v: NDArray[Any], *, key_bias: NDArray[Any] | None = None
    ) -> tuple[NDArray[Any], Pullback]:
        """Attention and its pullback by the plan; see `lingrad_rs.attention_vjp`.

        Raises
        ------
        ShapeError, DtypeError
            The plan was made for data of another shape or dtype.
        """
        arrays, scores, options = _planned(self, q, k, v, key_bias)
        return _vjp(arrays, scores, self, options, arrays)


def plan_attention(
    q: NDArray[Any],
    k: NDArray[Any],
    v: NDArray[Any],
    *,
    tol: float = 1e-2,
    gradients: bool = True,
    strict_causal: bool = False,
    causal: bool = False,
    scale: float | None = None,
    key_bias: NDArray[Any] | None = None,
    seed: int = 0,
) -> Plan:
    """Choose an engine for each head within a tolerance, to be used on data of the same kind again.

    Parameters
    ----------
    q, k, v, causal, scale, key_bias
        As for `attention`.
    tol, gradients, strict_causal, seed
        As for `Auto`.

    Returns
    -------
    Plan
        Frozen: the engines with all of their constants, what they are expected to cost and to err, and what they erred
        on this data.

    Raises
    ------
    ToleranceError, ShapeError, DtypeError, DeviceError, ArgumentError, NonFiniteError, DenominatorError
        As from `attention`.

    Notes
    -----
    Cost: that of ``attention(q, k, v, tol=tol)``: the chosen engines are run once, and their outputs measured.
    """
    auto = Auto(tol, gradients=gradients, strict_causal=strict_causal, seed=seed)
    options = {"causal": causal, "scale": scale, "key_bias": key_bias}
    arrays, scores = _arguments(q, k, v, auto, options, half=False)
    _, _, state = select.of(*arrays).attention_forward(*arrays, scores, engine=auto, keep=True, wants_lse=False)
    # Without queries and keys there is nothing to report.
    heads = (unplanned(Exact()),) * math.prod(arrays[0].shape[:-2]) if state is None else head_plans(state.reports())
    q, k, v = arrays
    return Plan(
        auto=auto,
        heads=heads,
        causal=scores.causal,
        scale=scores.scale,
        shapes=(q.shape, k.shape, v.shape),
        dtype=_check.dtype_name(q),
    )


def _planned(plan: Plan, q: object, k: object, v: object, key_bias: object) -> tuple[_Arrays, Scores, dict[str, Any]]:
    not_derived("plan", plan, (Plan,))
    options = {"causal": plan.causal, "scale": plan.scale, "key_bias": key_bias}
    arrays, scores = _arguments(q, k, v, plan.auto, options, half=False)
    for name, x, shape in zip("qkv", arrays, plan.shapes, strict=True):
        if _check.dtype_name(x) != plan.dtype:
            raise DtypeError(f"{name} has dtype {_check.dtype_name(x)}; expected {plan.dtype}, as the plan")
        if x.shape != shape:
            raise ShapeError(f"{name} has shape {x.shape}; expected {shape}, as the plan")
    return arrays, scores, options


def _chosen(engine: Engine | None, tol: float | None, *, gradients: bool) -> Engine:
    """The engine that ``engine=`` and ``tol=`` mean together."""
    if tol is not None:
        if engine is not None:
            raise ArgumentError(
                f"tol is {_check.shown(tol)} and engine is {_check.shown(engine)}; expected one of them: a tolerance "
                "chooses"
            )
        return Auto(tol, gradients=gradients)
    if type(engine) is Auto and not gradients:  # one of a derived class is refused with the other arguments
        return dataclasses.replace(engine, gradients=False)
    return _DEFAULT if engine is None else engine


def measure_error(
    q: NDArray[Any],
    k: NDArray[Any],
    v: NDArray[Any],
    out: NDArray[Any],
    *,
    samples: int = 256,
    causal: bool = False,
    scale: float | None = None,
    key_bias: NDArray[Any] | None = None,
    query_offset: int | None = None,
    window: tuple[int | None, int | None] | None = None,
    segment_ids: NDArray[Any] | None = None,
    mask: NDArray[Any] | None = None,
    bias: NDArray[Any] | None = None,
    softcap: float | None = None,
    sinks: NDArray[Any] | None = None,
    empty_rows: Literal["error", "zero"] = "error",
    seed: int = 0,
) -> ErrorEstimate:
    """The relative error of an attention output, measured on rows drawn at random.

    ``||out - exact||_F / ||exact||_F`` over all heads together, estimated from ``samples`` rows that are computed
    exactly in float64. It holds for an ``out`` from anywhere. Rows are drawn by what costs little to know of all of
    them: spread of scores, leverage, the heaviest pairs, sizes of values and of ``out``; an error in a few rows to
    which none of these points stays unseen.

    Parameters
    ----------
    q, k, v, causal, scale, key_bias, query_offset, window, segment_ids, mask, bias, softcap, sinks, empty_rows
        As for `attention`.
    out : ndarray, shape (..., h, n, d_v)
        The output to judge.
    samples : int
        Rows of all heads together, at least 1. As many as there are, or more, means all of them, and no interval.
    seed : int
        Of the draw.

    Returns
    -------
    ErrorEstimate
        The estimate and its 95% confidence interval.

    Raises
    ------
    ShapeError, DtypeError, DeviceError, ArgumentError, NonFiniteError, DenominatorError
        As from `attention`.

    Notes
    -----
    Cost: O((n + m) d^2 + samples m (d + d_v)) time.
    """
    options = _options(locals())
    arrays, scores = _arguments(q, k, v, Exact(), options, half=False)
    q, k, v = arrays
    _, out = _check.floats(q=q, out=out)
    _check.shape("out", out, (*q.shape[:-1], v.shape[-1]), match=f"q of shape {q.shape} and v of shape {v.shape}")
    samples = _check.integer("samples", samples, 1)
    seed = _check.integer("seed", seed, 0)
    if out.size == 0:
        return ErrorEstimate(0.0, 0.0, 0.0, 0)
    return ErrorEstimate(*select.of(q, k, v).measure_error(q, k, v, scores, out, samples=samples, seed=seed))


_NAMES = tuple(name for name in inspect.signature(scores_of).parameters if name not in ("q", "k"))


def _options(arguments: dict[str, Any]) -> dict[str, Any]:
    """Of a function's arguments those that say how scores are made."""
    return {name: arguments[name] for name in _NAMES}


def _arguments(
    q: object, k: object, v: object, engine: object, options: dict[str, Any], *, half: bool = True
) -> tuple[_Arrays, Scores]:
    """The arrays and how scores are made of them, checked, once the engine is one."""
    given = {name: x for name, x in options.items() if x is not None and name in _ARRAYS}
    if given:
        return _arguments_with_arrays(q, k, v, engine, options, given, half=half)
    arrays = _check.floats(half, q=q, k=k, v=v)
    check_engine(engine)
    q_, k_, v_ = _of_one_batch(*arrays)
    _check_shapes(q_, k_, v_, empty=options.get("empty_rows") == "zero")
    return (q_, k_, v_), scores_of(q_, k_, **options)


def _of_one_batch(q: Any, k: Any, v: Any) -> _Arrays:
    """Views whose batch axes are the same, where they broadcast; themselves where they do not."""
    if q.shape[:-3] == k.shape[:-3] == v.shape[:-3] or min(q.ndim, k.ndim, v.ndim) < 3:
        return q, k, v
    try:
        batch = np.broadcast_shapes(*(x.shape[:-3] for x in (q, k, v)))
    except ValueError:
        return q, k, v
    backend = select.of(q)
    q, k, v = (backend.broadcast_to(x, (*batch, *x.shape[-3:])) for x in (q, k, v))
    return q, k, v


def _arguments_with_arrays(
    q: object,
    k: object,
    v: object,
    engine: object,
    options: dict[str, Any],
    given: dict[str, Any],
    *,
    half: bool,
) -> tuple[_Arrays, Scores]:
    allowed = given["key_bias"] if "key_bias" in given and _is_bool(given["key_bias"]) else None
    biases = {name: x for name, x in given.items() if name in _OF_Q and x is not allowed}
    checked = dict(zip(("q", "k", "v", *biases), _check.floats(half, q=q, k=k, v=v, **biases), strict=True))
    q_, k_, v_ = _of_one_batch(*(checked.pop(name) for name in "qkv"))
    check_engine(engine)
    for name, kind in _OF_OTHER_KINDS.items():
        if name in given:
            checked[name] = _check.of_kind(name, given[name], q_, kind)
    if "segment_ids" in checked:
        checked["segment_ids"] = select.of(q_).on_host(checked["segment_ids"])
    if allowed is not None:
        checked["key_bias"] = select.of(q_).removed_where_false(_check.of_kind("key_bias", allowed, q_, "bool"), q_)
    _check_shapes(q_, k_, v_, empty=options.get("empty_rows") == "zero")
    return (q_, k_, v_), scores_of(q_, k_, **(options | checked))


_OF_Q = ("key_bias", "bias", "sinks")
_OF_OTHER_KINDS = {"mask": "bool", "segment_ids": "integer"}
_ARRAYS = frozenset((*_OF_Q, *_OF_OTHER_KINDS))


def _check_shapes(q: NDArray[Any], k: NDArray[Any], v: NDArray[Any], *, empty: bool) -> None:
    if q.ndim < 2:
        raise ShapeError(f"q has shape {q.shape}; expected (..., h, n, d), or (n, d) for one head")
    n, d = q.shape[-2:]
    if d == 0:
        raise ShapeError(f"q has shape {q.shape}; expected a last axis of at least 1")
    batch, heads = q.shape[:-3], ("h_kv",) if q.ndim > 2 else ()
    if k.ndim != q.ndim or k.shape[:-3] != batch or k.shape[-1] != d:
        _check.shape("k", k, (*batch, *heads, "n", d), match=f"q of shape {q.shape}")
    if q.ndim > 2:
        h, h_kv = q.shape[-3], k.shape[-3]
        if h != h_kv and (h_kv == 0 or h % h_kv):
            raise ShapeError(
                f"k has {h_kv} heads (shape {k.shape}); expected a number that divides the {h} heads of q "
                f"(shape {q.shape})"
            )
    if k.shape[-2] == 0 and n > 0 and not empty:
        raise ShapeError(f"k has shape {k.shape}; expected at least one key (m >= 1)")
    if v.ndim != k.ndim or v.shape[:-1] != k.shape[:-1]:
        _check.shape("v", v, (*k.shape[:-1], "dv"), match=f"k of shape {k.shape}")
    if v.shape[-1] == 0:
        raise ShapeError(f"v has shape {v.shape}; expected a last axis of at least 1")
