"""Attention and its gradient, exact or in low-rank form."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import _check
from .backends import select
from .errors import ArgumentError, DtypeError, ShapeError
from .spec.engines import Auto, Engine, Exact, Polynomial, check_engine, not_derived
from .spec.plan import ErrorEstimate, HeadPlan, PlanData, head_plans, unplanned

__all__ = ["Plan", "Pullback", "attention", "attention_vjp", "measure_error", "plan_attention"]

_Arrays = tuple[NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any] | None]


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
) -> NDArray[Any]:
    """Attention, head by head.

    ``out_i = sum_j exp(s_ij) v_j / sum_j exp(s_ij)`` with ``s_ij = scale q_i . k_j + key_bias_j``, over ``j <= i`` with
    ``causal=True``; `Polynomial` and `Landmark` replace ``exp``, and a tolerance chooses.

    Parameters
    ----------
    q : ndarray, shape (..., h, n, d)
        Queries, float32 or float64, any strides. Two axes are one head, three are heads, the others batch. All arrays
        are NumPy's, or CuPy's on one device; so are the results.
    k : ndarray, shape (..., h_kv, m, d)
        Keys. ``h`` is a multiple of ``h_kv``: query head ``i`` reads key head ``i // (h // h_kv)``.
    v : ndarray, shape (..., h_kv, m, d_v)
        Values.
    engine : Exact, Polynomial, Landmark or Auto, optional
        How it is computed; `Polynomial` of degree 2 unless given.
    tol : float, optional
        In place of an engine: each head is within this relative error, or exact; see `Auto`.
    causal : bool
        Whether query i sees only keys ``j <= i``; needs ``n == m``.
    scale : float, optional
        The factor of the scores; ``1/sqrt(d)`` unless given.
    key_bias : ndarray, shape (..., h_kv, m), optional
        Added to the scores, in the arrays' dtype by `Exact`; ``-inf`` removes a key (padding). So do the numbers that
        other libraries use for it, as ``finfo.min``, in rows that see another key; causal rows that see no other are
        refused by `Landmark` and by a shifted `Polynomial`. ``(m,)`` where k has two axes.

    Returns
    -------
    out : ndarray, shape (..., h, n, d_v)
        A new C-contiguous array of the same dtype.

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
    engine = _chosen(engine, tol, gradients=False)
    (q, k, v, key_bias), options = _arguments(q, k, v, key_bias, engine, causal, scale)
    return select.of(q, k, v).attention_forward(q, k, v, key_bias, **options, keep=False)[0]


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
) -> tuple[NDArray[Any], Pullback]:
    """Attention, and the function that pulls a gradient back through it.

    With ``f`` the normalised rows, ``delta_i = dout_i . out_i`` and ``dS = f * (dout v^T - delta 1^T)``:
    ``dq = scale dS k``, ``dk = scale dS^T q``, ``dv = f^T dout``, ``dkey_bias = dS^T 1``.

    Parameters
    ----------
    q, k, v, engine, tol, causal, scale, key_bias
        As for `attention`; ``tol`` holds for the gradients too.

    Returns
    -------
    out : ndarray, shape (..., h, n, d_v)
        As from `attention`.
    vjp : Pullback
        ``vjp(dout)`` returns ``(dq, dk, dv)``, and ``dkey_bias`` as a fourth where ``key_bias`` was given: new arrays
        of the shapes of q, k, v and key_bias. It may be called many times. It reads q, k, v and key_bias again, so they
        must not change in between; ``out`` may. With a tolerance, ``vjp.heads`` tells what was chosen and measured.

    Raises
    ------
    ToleranceError, ShapeError, DtypeError, DeviceError, ArgumentError, NonFiniteError, DenominatorError
        As from `attention`; ``vjp`` for a ``dout`` that does not fit ``out``.

    Notes
    -----
    Memory kept until ``vjp`` is gone: the inputs, a copy of ``out``, two numbers a query, and with the consistent
    gradient and no mask a state no larger than keys and values. Time: that of the engine.
    """
    engine = _chosen(engine, tol, gradients=True)
    arrays, options = _arguments(q, k, v, key_bias, engine, causal, scale)
    return _vjp(arrays, options)


def _vjp(arrays: _Arrays, options: dict[str, Any]) -> tuple[NDArray[Any], Pullback]:
    q, k, v, key_bias = arrays
    backend = select.of(q, k, v)
    out, state = backend.attention_forward(q, k, v, key_bias, **options, keep=True)
    shape = out.shape

    def call(dout: NDArray[Any], samples: int) -> tuple[tuple[NDArray[Any], ...], tuple[HeadPlan, ...]]:
        _, dout = _check.floats(q=q, dout=dout)
        _check.shape("dout", dout, shape, match=f"out of shape {shape}")
        grads, reports = backend.attention_backward(q, k, v, key_bias, state, dout, samples=samples)
        return (grads if key_bias is not None else grads[:3]), head_plans(reports)

    return out, Pullback(call, () if state is None else head_plans(state.reports()))


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
        arrays, options = _planned(self, q, k, v, key_bias)
        return select.of(*arrays[:3]).attention_forward(*arrays, **options, keep=False)[0]

    def attention_vjp(
        self, q: NDArray[Any], k: NDArray[Any], v: NDArray[Any], *, key_bias: NDArray[Any] | None = None
    ) -> tuple[NDArray[Any], Pullback]:
        """Attention and its pullback by the plan; see `lingrad_rs.attention_vjp`.

        Raises
        ------
        ShapeError, DtypeError
            The plan was made for data of another shape or dtype.
        """
        return _vjp(*_planned(self, q, k, v, key_bias))


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
    (q, k, v, key_bias), options = _arguments(q, k, v, key_bias, auto, causal, scale)
    _, state = select.of(q, k, v).attention_forward(q, k, v, key_bias, **options, keep=True)
    # Without queries and keys there is nothing to report.
    heads = (unplanned(Exact()),) * math.prod(q.shape[:-2]) if state is None else head_plans(state.reports())
    del options["engine"]
    return Plan(auto=auto, heads=heads, shapes=(q.shape, k.shape, v.shape), dtype=_check.dtype_name(q), **options)


def _planned(plan: Plan, q: object, k: object, v: object, key_bias: object) -> tuple[_Arrays, dict[str, Any]]:
    not_derived("plan", plan, (Plan,))
    arrays, options = _arguments(q, k, v, key_bias, plan.auto, plan.causal, plan.scale)
    for name, x, shape in zip("qkv", arrays[:3], plan.shapes, strict=True):
        if _check.dtype_name(x) != plan.dtype:
            raise DtypeError(f"{name} has dtype {_check.dtype_name(x)}; expected {plan.dtype}, as the plan")
        if x.shape != shape:
            raise ShapeError(f"{name} has shape {x.shape}; expected {shape}, as the plan")
    return arrays, options | {"engine": plan}


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
    seed: int = 0,
) -> ErrorEstimate:
    """The relative error of an attention output, measured on rows drawn at random.

    ``||out - exact||_F / ||exact||_F`` over all heads together, estimated from ``samples`` rows that are computed
    exactly in float64. It holds for an ``out`` from anywhere. Rows are drawn by what costs little to know of all of
    them: spread of scores, leverage, the heaviest pairs, sizes of values and of ``out``; an error in a few rows to
    which none of these points stays unseen.

    Parameters
    ----------
    q, k, v, causal, scale, key_bias
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
    (q, k, v, key_bias), options = _arguments(q, k, v, key_bias, Polynomial(), causal, scale)
    del options["engine"]
    _, out = _check.floats(q=q, out=out)
    _check.shape("out", out, (*q.shape[:-1], v.shape[-1]), match=f"q of shape {q.shape} and v of shape {v.shape}")
    samples = _check.integer("samples", samples, 1)
    seed = _check.integer("seed", seed, 0)
    if out.size == 0:
        return ErrorEstimate(0.0, 0.0, 0.0, 0)
    estimate = select.of(q, k, v).measure_error(q, k, v, key_bias, out, **options, samples=samples, seed=seed)
    return ErrorEstimate(*estimate)


def _arguments(
    q: object, k: object, v: object, key_bias: object, engine: object, causal: object, scale: object
) -> tuple[_Arrays, dict[str, Any]]:
    arrays = {"q": q, "k": k, "v": v} | ({} if key_bias is None else {"key_bias": key_bias})
    checked = _check.floats(**arrays)
    q_, k_, v_ = checked[:3]
    bias = checked[3] if len(checked) == 4 else None
    causal = _check.flag("causal", causal)
    _check_shapes(q_, k_, v_, bias, causal)
    factor = 1 / np.sqrt(q_.shape[-1]) if scale is None else _check.number("scale", scale)
    return (q_, k_, v_, bias), {"engine": check_engine(engine), "causal": causal, "scale": float(factor)}


def _check_shapes(
    q: NDArray[Any], k: NDArray[Any], v: NDArray[Any], key_bias: NDArray[Any] | None, causal: bool
) -> None:
    if q.ndim < 2:
        raise ShapeError(f"q has shape {q.shape}; expected (..., h, n, d), or (n, d) for one head")
    n, d = q.shape[-2:]
    if d == 0:
        raise ShapeError(f"q has shape {q.shape}; expected a last axis of at least 1")
    batch, heads = q.shape[:-3], ("h_kv",) if q.ndim > 2 else ()
    _check.shape("k", k, (*batch, *heads, "n", d), match=f"q of shape {q.shape}")
    if causal:
        _check.shape("k", k, (*batch, *heads, n, d), match=f"q of shape {q.shape} with causal=True")
    if q.ndim > 2:
        h, h_kv = q.shape[-3], k.shape[-3]
        if h != h_kv and (h_kv == 0 or h % h_kv):
            raise ShapeError(
                f"k has {h_kv} heads (shape {k.shape}); expected a number that divides the {h} heads of q "
                f"(shape {q.shape})"
            )
    m = k.shape[-2]
    if m == 0 and n > 0:
        raise ShapeError(f"k has shape {k.shape}; expected at least one key (m >= 1)")
    _check.shape("v", v, (*k.shape[:-1], "dv"), match=f"k of shape {k.shape}")
    if v.shape[-1] == 0:
        raise ShapeError(f"v has shape {v.shape}; expected a last axis of at least 1")
    if key_bias is not None:
        _check.shape("key_bias", key_bias, k.shape[:-1], match=f"k of shape {k.shape}")
