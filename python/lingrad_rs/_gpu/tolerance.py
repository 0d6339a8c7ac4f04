"""Attention within a tolerance: what a plan chose is run, verified, and computed exactly where it misses.

Outputs, and gradients of queries, are held against rows that are computed exactly. The gradients of keys are held against
exact ones *given the row sums* ``D_i`` and ``delta_i`` of the forward pass, whose own output has been verified: a
relative error of those enters ``dk`` and ``dv`` as one of the same size times numbers that average out over the queries.

Engines run head by head; the samples of all heads are computed together, and compared on the host, where some rows of
results are copied to.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .. import _lingrad_rs as core
from ..engines import Auto, Exact, Landmark, Polynomial
from ..errors import DenominatorError, NonFiniteError, ToleranceError
from ..plan import ErrorEstimate, HeadPlan, head_plans, head_report
from . import engines, measure
from .device import Space
from .heads import Grads, Heads, Saved
from .measure import Draw, Floats, Rows
from .plan import longest, plan_heads, short

__all__ = ["backward_measured", "backward_within", "forward_within"]

Array = Any
_Report = dict[str, Any]

# Rows, and keys, of each head that results are held against.
_SAMPLES = 64
# The least tolerance that a dtype allows.
_FLOOR = {4: 1e-5, 8: 1e-12}


def _check_tolerance(auto: Auto, dtype: Any) -> None:
    size = 4 if "32" in str(dtype) else 8
    if auto.tol < _FLOOR[size]:
        tol, floor = (np.format_float_scientific(x, trim="-", exp_digits=1) for x in (auto.tol, _FLOOR[size]))
        raise ToleranceError(f"tol is {tol}; expected at least {floor} for numbers of {size} bytes")


def _name(engine: object) -> str:
    """What an engine is called in reports."""
    match engine:
        case Polynomial(degree=degree):
            return f"degree {degree}"
        case Landmark(rank=rank):
            return f"{rank} landmarks"
    return "exact"


def _forward(sp: Space, engine: Any, heads: Heads, i: int) -> tuple[Array, Saved]:
    one = heads.one(i)
    return engines.forward(sp, engine, one, [one.first])


def forward_within(
    sp: Space,
    heads: Heads,
    auto: Auto,
    given: Sequence[HeadPlan] | None = None,
    known: Sequence[_Report] | None = None,
) -> tuple[Array, list[Saved], list[_Report]]:
    """``out`` of each head within a tolerance, by the engines of a plan, or by those that are planned now.

    Parameters
    ----------
    heads : Heads
        At least one, of at least one query.
    given : sequence of HeadPlan, optional
        One a head.
    known : sequence of dict, optional
        What is known of the given engines already, on the same data: nothing is verified again.

    Returns
    -------
    out : array, shape (heads, n, dv)
    saved : list of Saved
        One a head.
    reports : list of dict
        One a head, as `lingrad_rs.plan.head_plans` reads them.

    Raises
    ------
    ToleranceError
        The tolerance is below what the dtype allows.
    DenominatorError
        The exact engine has no answer either.

    Notes
    -----
    Cost: that of planning, of the engines that are chosen, and of 16 to 64 exact rows a head; and of exact attention
    where they miss.
    """
    _check_tolerance(auto, heads.q.dtype)
    n, _, _, dv = heads.sizes
    if given is None:
        plans, probed = plan_heads(sp, heads, auto)
        stale = ""
    else:
        fresh: dict[str, Any] = {"measured_error": None, "error_bound": None, "missed": None, "errors": {}}
        plans, probed = [replace(plan, **fresh) for plan in given], [None] * heads.count
        stale = "" if known is not None else "the plan is stale: "
    out = sp.empty((heads.count, n, dv), heads.q.dtype)
    saved: list[Any] = [None] * heads.count
    missed: dict[int, str] = {}
    for i, plan in enumerate(plans):
        try:
            out[i : i + 1, ...], saved[i] = _forward(sp, plan.engine, heads, i)
        except (DenominatorError, NonFiniteError) as error:
            if plan.engine == Exact() or known is not None:
                raise
            missed[i] = f"{stale}{error}"
    if known is not None:
        return out, saved, [dict(report) for report in known]
    tried = [i for i, plan in enumerate(plans) if plan.engine != Exact() and i not in missed]
    if tried:
        references = {i: (probe.draw, probe.out) for i in tried if (probe := probed[i]) is not None}
        references |= _references(sp, heads, [i for i in tried if i not in references], auto.seed ^ 0xF0)
        draws = [references[i][0] for i in tried]
        got = sp.host(measure.take_rows(sp, measure.chosen(sp, out, tried), measure.padded(draws)))
        finite = _all_finite(sp, [out[i, ...] for i in tried])
        bounds = _error_bounds(sp, heads, out, {i: saved[i] for i in tried})
        for c, i in enumerate(tried):
            error = draws[c].compare(references[i][1], got[c, : len(draws[c].rows)])
            if error.high <= auto.tol and finite[c]:
                plans[i] = replace(plans[i], errors={"out": error}, measured_error=error, error_bound=bounds.get(i))
            else:
                missed[i] = f"{stale}{_name(plans[i].engine)} errs by up to {short(error.high)} in out"
    for i, why in missed.items():
        out[i : i + 1, ...], saved[i] = _forward(sp, Exact(), heads, i)
        cost = plans[i].exact_cost
        plans[i] = replace(plans[i], engine=Exact(), cost=cost, predicted_error=None, whole_sequence=(), missed=why)
    return out, saved, [head_report(plan) for plan in plans]


def _references(sp: Space, heads: Heads, which: Sequence[int], seed: int) -> dict[int, tuple[Draw, Floats]]:
    """Rows of some heads, and their exact output."""
    if not which:
        return {}
    some = measure.select(sp, heads, which)
    draws = measure.draw_rows(sp, some.q, _SAMPLES, seed)
    rows = measure.padded(draws)
    exact = measure.exact_rows(sp, some, rows)
    exact.check(sp, rows, [heads.first + i for i in which])
    out = sp.host(exact.out)
    return {i: (draw, out[c, : len(draw.rows)]) for c, (i, draw) in enumerate(zip(which, draws, strict=True))}


def _all_finite(sp: Space, arrays: Sequence[Array]) -> list[bool]:
    """Of each array; waits for the device, once."""
    flags = [sp.xp.all(sp.xp.isfinite(x)) for x in arrays]
    return sp.host(sp.xp.stack(flags)).tolist() if flags else []


def _error_bounds(sp: Space, heads: Heads, out: Array, saved: dict[int, Saved]) -> dict[int, float]:
    """The a-priori bound of the relative Frobenius error of ``out``, before rounding, of polynomials that have one.

    With ``eps = max |p(s) e^-s - 1|`` over the scores that norms allow, ``|out - exact| <= 2 eps / (1 - eps) max|v|``
    entry by entry.
    """
    xp = sp.xp
    which = [i for i, one in saved.items() if isinstance(one.engine, Polynomial)]
    if not which:
        return {}
    some = measure.select(sp, heads, which)
    shifts = np.zeros((2, len(which), heads.sizes[2]))
    for c, i in enumerate(which):
        constants = saved[i].constants
        for side, shift in enumerate((constants.query_shift, constants.key_shift)):
            if shift is not None and len(shift[0]):
                shifts[side, c] = shift[0]
    live = None if some.key_bias is None else some.key_bias != -math.inf
    own = measure.chosen(sp, out, which)
    sizes = [
        longest(sp, some.q, shifts[0]),
        longest(sp, some.k, shifts[1], live),
        sp.wide(xp.max(xp.abs(some.v), axis=(1, 2))),
        xp.sqrt(xp.sum(measure.dots(sp, own, own), axis=1)),
    ]
    bounds = {}
    for i, (query, key, value, size) in zip(which, sp.host(xp.stack(sizes)).T, strict=True):
        eps = core.largest_relative_error(saved[i].constants.coefficients[0], abs(heads.scale) * query * key)
        if not eps < 1:
            continue
        absolute = 2 * eps / (1 - eps) * value * math.sqrt(math.prod(own.shape[1:]))
        if absolute < size:
            bounds[i] = float(absolute / (size - absolute))
    return bounds


class _Sums:
    """Gradients of all heads, those of keys summed over the query heads that share them."""

    def __init__(self, sp: Space, heads: Heads, group: int) -> None:
        n, m, d, dv = heads.sizes
        shared, dtype = heads.count // group, heads.q.dtype
        self.group = group
        self.dq = sp.zeros((heads.count, n, d), dtype)
        self.dk, self.dv = (sp.zeros((shared, m, width), dtype) for width in (d, dv))
        self.db = None if heads.key_bias is None else sp.zeros((shared, m), dtype)

    def members(self, g: int) -> range:
        """The query heads of a key head."""
        return range(g * self.group, (g + 1) * self.group)

    def clear(self, g: int) -> None:
        """Forgets what was added to a key head."""
        for total in (self.dk, self.dv, *([] if self.db is None else [self.db])):
            total[g, ...] = 0.0

    def add(self, i: int, grads: Grads) -> None:
        """Those of query head ``i``."""
        g = i // self.group
        self.dq[i : i + 1, ...] = grads.dq
        self.dk[g : g + 1, ...] += grads.dk
        self.dv[g : g + 1, ...] += grads.dv
        if self.db is not None:
            self.db[g : g + 1, ...] += grads.dkey_bias

    def all_finite(self, sp: Space, groups: Sequence[int]) -> list[bool]:
        """Of each of some key heads."""
        ranges = [(self.members(g).start, self.members(g).stop) for g in groups]
        parts = [_all_finite(sp, [self.dq[a:b, ...] for a, b in ranges])]
        parts += [_all_finite(sp, [x[g, ...] for g in groups]) for x in (self.dk, self.dv)]
        return [all(flags) for flags in zip(*parts, strict=True)]

    def grads(self) -> Grads:
        return Grads(self.dq, self.dk, self.dv, self.db)


def _backward(sp: Space, heads: Heads, i: int, saved: Saved, out: Array, dout: Array, sums: _Sums) -> None:
    part = slice(i, i + 1)
    sums.add(i, engines.backward(sp, heads.one(i), saved, out[part, ...], dout[part, ...]))


def backward_within(
    sp: Space,
    heads: Heads,
    group: int,
    auto: Auto,
    saved: Sequence[Saved],
    reports: Sequence[_Report],
    out: Array,
    dout: Array,
) -> tuple[Grads, list[_Report]]:
    """The gradients within a tolerance, from what `forward_within` left and ``dout (heads, n, dv)``.

    Returns
    -------
    grads : Grads
        ``dq`` of every head; the others of key heads, ``(heads / group, ...)``.
    reports : list of dict

    Notes
    -----
    Cost: that of the engines, of 64 exact queries and keys a head, and of exact attention where they miss.
    """
    plans = list(head_plans(reports))
    sums = _Sums(sp, heads, group)
    missed: dict[int, str] = {}
    for g in range(heads.count // group):
        try:
            for i in sums.members(g):
                _backward(sp, heads, i, saved[i], out, dout, sums)
        except (DenominatorError, NonFiniteError) as error:
            if all(saved[i].engine == Exact() for i in sums.members(g)):
                raise
            missed[g] = str(error)
    approximate = [i for i in range(heads.count) if saved[i].engine != Exact()]
    groups = sorted({i // group for i in approximate} - missed.keys())
    if groups:
        check = _Check.new(sp, heads, sums, groups, saved, out, dout, _SAMPLES, auto.seed ^ 0xB0, approximate)
        for errors, finite in zip(check.errors(sp, sums), sums.all_finite(sp, groups), strict=True):
            worst, of = errors.worst()
            if worst > auto.tol:
                missed[errors.group] = f"{of} errs by up to {short(worst)}"
            elif not finite:
                missed[errors.group] = "overflow"
            else:
                for i in sums.members(errors.group):
                    plans[i] = errors.added_to(plans[i], i)
    for g, why in missed.items():
        sums.clear(g)
        for i in sums.members(g):
            if saved[i].engine == Exact():
                _backward(sp, heads, i, saved[i], out, dout, sums)
                continue
            own, exact = _forward(sp, Exact(), heads, i)
            sums.add(i, engines.backward(sp, heads.one(i), exact, own, dout[i : i + 1, ...]))
            text = f"the gradients of {_name(saved[i].engine)}, computed exactly instead: {why}"
            plans[i] = replace(plans[i], missed=text)
    return sums.grads(), [head_report(plan) for plan in plans]


def backward_measured(
    sp: Space,
    heads: Heads,
    group: int,
    engine: Exact | Polynomial | Landmark,
    saved: Sequence[Saved],
    out: Array,
    dout: Array,
    samples: int,
) -> tuple[Grads, list[_Report]]:
    """The gradients, whatever they are worth, and the errors of all results on so many queries and keys of each head.

    Takes and returns what `backward_within` does.
    """
    sums = _Sums(sp, heads, group)
    for i in range(heads.count):
        _backward(sp, heads, i, saved[i], out, dout, sums)
    every, groups = range(heads.count), range(heads.count // group)
    check = _Check.new(sp, heads, sums, groups, saved, out, dout, samples, 0, every)
    of_out = check.of_queries(sp, check.exact_out, out)
    bounds = _error_bounds(sp, heads, out, dict(enumerate(saved)))
    plans = []
    for errors in check.errors(sp, sums):
        for i in sums.members(errors.group):
            plan = HeadPlan(
                engine, None, of_out[i], bounds.get(i), math.nan, math.nan, reason="given", errors={"out": of_out[i]}
            )
            plans.append(errors.added_to(plan, i))
    return sums.grads(), [head_report(plan) for plan in plans]


@dataclass(frozen=True)
class _GroupErrors:
    """Measured errors of a key head and its query heads."""

    group: int
    dq: dict[int, ErrorEstimate]
    keys: dict[str, ErrorEstimate]

    def worst(self) -> tuple[float, str]:
        """The worst error, and of what; what is no number is the worst of all."""
        errors = [(e.high, "dq") for e in self.dq.values()] + [(e.high, of) for of, e in self.keys.items()]
        return max(((math.inf if math.isnan(e) else e, of) for e, of in errors), key=lambda error: error[0])

    def added_to(self, plan: HeadPlan, i: int) -> HeadPlan:
        """A head's plan with its errors."""
        dq = {"dq": self.dq[i]} if i in self.dq else {}
        return replace(plan, errors={**plan.errors, **dq, **self.keys})


@dataclass(frozen=True)
class _Check:
    """Exact gradients of sampled queries and keys of some key heads, on the host.

    Attributes
    ----------
    groups : the key heads.
    keys : their draws.
    exact_keys : the gradients of those keys by name, (groups, keys, width).
    heads : the query heads whose dq is checked.
    queries : their draws.
    exact_out, exact_dq : (heads, queries, width).
    """

    groups: Sequence[int]
    keys: list[Draw]
    exact_keys: dict[str, Floats]
    heads: list[int]
    queries: list[Draw]
    exact_out: Floats
    exact_dq: Floats

    @staticmethod
    def new(
        sp: Space,
        heads: Heads,
        sums: _Sums,
        groups: Sequence[int],
        saved: Sequence[Saved],
        out: Array,
        dout: Array,
        samples: int,
        seed: int,
        of_dq: Sequence[int],
    ) -> _Check:
        """On so many queries of those heads of the groups that are ``of_dq``, and so many keys."""
        xp = sp.xp
        members = [i for g in groups for i in sums.members(g)]
        some = measure.select(sp, heads, members)
        up, own = measure.chosen(sp, dout, members), measure.chosen(sp, out, members)
        log_sums = xp.concat([saved[i].log_sums(sp, heads.one(i)) for i in members], axis=0)
        firsts = [sums.members(g)[0] for g in groups]
        keys = measure.draw_rows(sp, measure.chosen(sp, heads.k, firsts), samples, seed)
        rows: Rows = np.repeat(measure.padded(keys), sums.group, axis=0)
        exact = measure.key_gradients(sp, some, rows, up, measure.dots(sp, up, own), log_sums)
        by_name = {"dk": exact.dk, "dv": exact.dv} | ({} if sums.db is None else {"dkey_bias": exact.db})
        exact_keys = {
            name: sp.host(xp.sum(xp.reshape(x, (len(groups), sums.group, *x.shape[1:])), axis=1))
            for name, x in by_name.items()
        }
        checked = [i for i in members if i in of_dq]
        queried = measure.select(sp, heads, checked)
        queries = measure.draw_rows(sp, queried.q, samples, seed ^ 1)
        rows = measure.padded(queries)
        exact_rows = measure.exact_rows(
            sp, queried, rows, measure.take_rows(sp, measure.chosen(sp, dout, checked), rows)
        )
        exact_rows.check(sp, rows, [heads.first + i for i in checked])
        out_rows, dq_rows = sp.host(exact_rows.out), sp.host(exact_rows.dq)
        return _Check(groups, keys, exact_keys, checked, queries, out_rows, dq_rows)

    def of_queries(self, sp: Space, exact: Floats, got: Array) -> dict[int, ErrorEstimate]:
        """The error of rows ``(all heads, n, width)`` of each checked head."""
        rows = sp.host(measure.take_rows(sp, measure.chosen(sp, got, self.heads), measure.padded(self.queries)))
        return {i: self.queries[c].compare(exact[c], rows[c]) for c, i in enumerate(self.heads)}

    def errors(self, sp: Space, sums: _Sums) -> list[_GroupErrors]:
        """Those of results, of each key head."""
        dq = self.of_queries(sp, self.exact_dq, sums.dq)
        results = {"dk": sums.dk, "dv": sums.dv} | ({} if sums.db is None else {"dkey_bias": sums.db[..., None]})
        rows = measure.padded(self.keys)
        got = {
            name: sp.host(measure.take_rows(sp, measure.chosen(sp, x, self.groups), rows))
            for name, x in results.items()
        }
        return [
            _GroupErrors(
                g,
                {i: dq[i] for i in sums.members(g) if i in dq},
                {name: self.keys[c].compare(self.exact_keys[name][c], got[name][c]) for name in got},
            )
            for c, g in enumerate(self.groups)
        ]
