"""Attention of arrays ``(..., heads, n, d)``: heads that share keys are set side by side, computed, and added up."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from ... import _lingrad_rs as core
from ...errors import ArgumentError, DeviceError
from ...spec.engines import Auto, Engine, Exact, HeadEngine
from ...spec.plan import PlanData
from ...spec.scores import Scores
from . import engines, options, tolerance
from .device import Space
from .problem.finite import check_heads, check_results
from .problem.heads import Heads, Saved

__all__ = [
    "OptionsState",
    "State",
    "backward",
    "backward_again",
    "backward_scores",
    "expect_plain",
    "forward",
    "forward_scores",
    "lined_up",
    "without_removed",
]

Array = Any


@dataclass(frozen=True)
class State:
    """The forward pass, as the backward pass needs it, with its own copy of ``out``: the caller may change theirs."""

    engine: Engine | PlanData
    causal: bool
    scale: float
    out: Array
    saved: Saved | list[tolerance.Part]
    known: list[dict[str, Any]]

    def reports(self) -> list[dict[str, Any]]:
        """What is known of each head after the forward pass, where there is a tolerance."""
        return [dict(report) for report in self.known]

    def planned(self) -> Planned | None:
        """The engines that were used within a tolerance, to be used again on the same data."""
        auto = _tolerance(self.engine)
        return None if auto is None else Planned(auto, self.known)


@dataclass(frozen=True)
class OptionsState:
    """The same of exact attention with options that only it has here."""

    out: Array
    lse: Array
    known: list[dict[str, Any]]

    def reports(self) -> list[dict[str, Any]]:
        """What is known of each head after the forward pass, where there is a tolerance."""
        return [dict(report) for report in self.known]


@dataclass(frozen=True)
class Planned:
    """Engines that were used within a tolerance on the same data, and what is known of them."""

    auto: Auto
    reports: list[dict[str, Any]]


def _tolerance(engine: Engine | PlanData | Planned) -> Auto | None:
    return engine.auto if isinstance(engine, PlanData | Planned) else engine if isinstance(engine, Auto) else None


def _heads(
    sp: Space, q: Array, k: Array, v: Array, key_bias: Array | None, *, causal: bool, scale: float
) -> tuple[Heads, int]:
    """One key head for each query head, and how many shared one."""
    xp = sp.xp
    q_heads, kv_heads = math.prod(q.shape[:-2]), math.prod(k.shape[:-2])
    group = q_heads // kv_heads if kv_heads else 1

    def flat(x: Array, inner: int, times: int) -> Array:
        x = xp.reshape(x, (math.prod(x.shape[: x.ndim - inner]), *x.shape[x.ndim - inner :]))
        return x if times == 1 else xp.repeat(x, times, axis=0)

    bias = None if key_bias is None else flat(key_bias, 1, group)
    return Heads(flat(q, 2, 1), flat(k, 2, group), flat(v, 2, group), bias, causal, scale), group


def forward(
    sp: Space,
    q: Array,
    k: Array,
    v: Array,
    key_bias: Array | None,
    *,
    engine: Engine | PlanData | Planned,
    causal: bool,
    scale: float,
    keep: bool,
) -> tuple[Array, State | None]:
    """``out (..., h, n, d_v)``, and with ``keep`` what the backward pass needs beside the inputs."""
    auto = _tolerance(engine)
    plain = Scores(scale=scale, causal=causal)
    core.check_engine(engine.auto if isinstance(engine, Planned) else engine, plain, sp.xp.finfo(q.dtype).bits // 8)
    shape = (*q.shape[:-1], v.shape[-1])
    heads, _ = _heads(sp, q, k, v, key_bias, causal=causal, scale=scale)
    saved: Saved | list[tolerance.Part] = []
    known: list[dict[str, Any]] = []
    if math.prod(q.shape[:-1]) == 0:
        out = sp.zeros(shape, q.dtype)
        if auto is not None:
            known = tolerance.of_nothing(heads.count)
    else:
        check_heads(sp, key_bias, q=q, k=k, v=v)
        if isinstance(engine, HeadEngine):
            out, saved = engines.forward(sp, [engine] * heads.count, heads)
        else:
            given = engine.heads if isinstance(engine, PlanData) else None
            before = engine.reports if isinstance(engine, Planned) else None
            auto = engine if isinstance(engine, Auto) else engine.auto
            out, saved, known = tolerance.forward_within(sp, heads, auto, given, before)
        check_results(sp, out=out)
        out = sp.contiguous(sp.xp.reshape(out, shape))
    if not keep:
        return out, None
    kept = engine if not isinstance(engine, Planned) else engine.auto
    return out, State(kept, causal, scale, sp.xp.asarray(out, copy=True), saved, known)


def backward(
    sp: Space,
    q: Array,
    k: Array,
    v: Array,
    key_bias: Array | None,
    state: State,
    dout: Array,
    *,
    samples: int,
) -> tuple[tuple[Array, Array, Array, Array | None], list[dict[str, Any]]]:
    """``(dq, dk, dv, dkey_bias)``, the last None where there is no ``key_bias``; and what is known of each head."""
    xp = sp.xp
    if math.prod(q.shape[:-1]) == 0:
        zeros = [sp.zeros(x.shape, x.dtype) for x in (q, k, v)]
        return (zeros[0], zeros[1], zeros[2], None if key_bias is None else sp.zeros(key_bias.shape, q.dtype)), []
    check_heads(sp, dout=dout)
    heads, group = _heads(sp, q, k, v, key_bias, causal=state.causal, scale=state.scale)
    flat = (heads.count, heads.q.shape[1], heads.v.shape[2])
    out, up = xp.reshape(state.out, flat), xp.reshape(dout, flat)
    auto, reports = _tolerance(state.engine), []
    if auto is not None:
        assert isinstance(state.saved, list)
        grads, reports = tolerance.backward_within(sp, heads, group, auto, state.saved, state.known, out, up)
    else:
        assert isinstance(state.saved, Saved)
        grads = engines.backward(sp, heads, state.saved, out, up)
        grads = engines.add_groups(sp, grads, group)
        if samples:
            reports = tolerance.measured(sp, heads, group, state.saved, out, up, grads, samples)
    dq, dk, dv = (sp.contiguous(xp.reshape(x, y.shape)) for x, y in ((grads.dq, q), (grads.dk, k), (grads.dv, v)))
    db = None if key_bias is None else sp.contiguous(xp.reshape(grads.dkey_bias, key_bias.shape))
    check_results(sp, dq=dq, dk=dk, dv=dv, **({} if db is None else {"dkey_bias": db[..., None]}))
    return (dq, dk, dv, db), reports


def lined_up(sp: Space, k: Array, scores: Scores) -> Array | None:
    """The key bias of every key head."""
    if scores.key_bias is None or scores.key_bias.shape == k.shape[:-1]:
        return scores.key_bias
    return sp.xp.asarray(sp.xp.broadcast_to(scores.key_bias, k.shape[:-1]), copy=True)


def without_removed(sp: Space, k: Array, v: Array, scores: Scores) -> tuple[Array, Array]:
    """Keys and values with zeros in place of the infinities of removed keys, which products would show."""
    xp, key_bias = sp.xp, lined_up(sp, k, scores)
    if key_bias is None or bool(xp.all(xp.stack([xp.all(xp.isfinite(x)) for x in (k, v)]))):
        return k, v
    removed = (key_bias == -math.inf)[..., None]
    k, v = (xp.where(removed & xp.isinf(x), xp.zeros_like(x), x) for x in (k, v))
    return k, v


def _with_options(sp: Space, engine: Engine | PlanData, scores: Scores, q: Array, k: Array) -> bool:
    """Whether the call has options that the exact engine alone has here; any other engine refuses them."""
    if scores.is_plain(q.shape[-2], k.shape[-2]):
        return False
    numbers = replace(scores, key_bias=None, mask=None, bias=None, sinks=None)
    core.check_engine(engine, numbers, sp.xp.finfo(q.dtype).bits // 8)
    option = scores.needs_exact()
    if isinstance(engine, HeadEngine) and not isinstance(engine, Exact) and option is not None:
        raise ArgumentError(f"{type(engine).__name__} has no {option}; use Exact()")
    if isinstance(engine, Exact) or _tolerance(engine) is not None:
        return True
    raise DeviceError(
        f"{type(engine).__name__} has neither query_offset, segment_ids, sinks nor empty_rows on a GPU; use Exact()"
    )


def _log_sums(sp: Space, heads: Heads, saved: Saved | list[tolerance.Part]) -> Array:
    if isinstance(saved, Saved):
        return engines.log_sums(sp, heads, saved)
    return sp.xp.concat([engines.log_sums(sp, heads.part(part.start, part.end), part.saved) for part in saved])


def forward_scores(
    sp: Space,
    q: Array,
    k: Array,
    v: Array,
    scores: Scores,
    *,
    engine: Engine | PlanData,
    keep: bool,
    wants_lse: bool,
) -> tuple[Array, Array | None, State | OptionsState | None]:
    """``out``, the logarithms of row sums where asked for, and with ``keep`` what the backward pass needs."""
    k, v = without_removed(sp, k, v, scores)
    if _with_options(sp, engine, scores, q, k):
        out, lse = options.forward(sp, q, k, v, scores)
        known = [] if isinstance(engine, Exact) else tolerance.of_nothing(math.prod(q.shape[:-2]))
        state = OptionsState(sp.xp.asarray(out, copy=True), lse, known) if keep else None
        return out, lse if wants_lse else None, state
    key_bias = lined_up(sp, k, scores)
    made = {"engine": engine, "causal": scores.causal, "scale": scores.scale}
    out, state = forward(sp, q, k, v, key_bias, **made, keep=keep or wants_lse)
    lse = None
    if wants_lse:
        assert state is not None
        lse = sp.zeros(q.shape[:-1], sp.xp.float64)
        if math.prod(q.shape[:-1]):
            heads, _ = _heads(sp, q, k, v, key_bias, causal=scores.causal, scale=scores.scale)
            lse = sp.xp.reshape(_log_sums(sp, heads, state.saved), q.shape[:-1])
    return out, lse, state if keep else None


def backward_scores(
    sp: Space,
    q: Array,
    k: Array,
    v: Array,
    scores: Scores,
    state: State | OptionsState,
    dout: Array,
    *,
    samples: int,
) -> tuple[list[Array | None], list[dict[str, Any]]]:
    """``dq, dk, dv, dkey_bias, dbias, dsinks``, None of what was not given; and what is known of each head."""
    k, v = without_removed(sp, k, v, scores)
    if isinstance(state, OptionsState):
        if samples:
            raise DeviceError("samples are not taken with these options on a GPU; expected samples=0")
        return options.backward(sp, q, k, v, scores, state.out, state.lse, dout, check_finite=True), state.reports()
    grads, reports = backward(sp, q, k, v, lined_up(sp, k, scores), state, dout, samples=samples)
    return [*grads, None, None], reports


def backward_again(
    sp: Space,
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
    """The gradients, from the inputs and results of a forward pass that kept nothing else."""
    k, v = without_removed(sp, k, v, scores)
    if isinstance(engine, Exact) or _with_options(sp, engine, scores, q, k):
        return options.backward(sp, q, k, v, scores, out, lse, dout, check_finite=check_finite)
    _, _, state = forward_scores(sp, q, k, v, scores, engine=engine, keep=True, wants_lse=False)
    assert state is not None
    return backward_scores(sp, q, k, v, scores, state, dout, samples=0)[0]


def expect_plain(scores: Scores, q: Array, k: Array, what: str) -> None:
    """Raise where errors are to be measured with options that no measurement on this path knows."""
    if not scores.is_plain(q.shape[-2], k.shape[-2]):
        raise DeviceError(f"{what} knows only causal, scale and key_bias on a GPU; expected none of the other options")
