"""Attention within a tolerance: what a plan chose is run, verified, and computed exactly where it misses.

Outputs, and gradients of queries, are held against rows that are computed exactly. The gradients of keys are held
against exact ones *given the row sums* ``D_i`` and ``delta_i`` of the forward pass, whose own output has been verified:
a relative error of those enters ``dk`` and ``dv`` as one of the same size times numbers that average out over the
queries.

Consecutive heads whose engines differ in numbers alone run together; the samples of all heads are computed together,
and compared on the host, where some rows of results are copied to.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ... import _lingrad_rs as core
from ...errors import DenominatorError, NonFiniteError
from ...spec.engines import Auto, Exact, HeadEngine, Polynomial
from ...spec.plan import ErrorEstimate, HeadPlan, head_plans, head_report, unplanned
from . import engines, measure
from .device import Space
from .measure import Draw, Floats, Rows
from .measure.guides import Known
from .plan import longest, plan_heads, short
from .problem.heads import Grads, Heads, Saved, chosen, dots, heads_at

__all__ = ["Part", "backward_within", "forward_within", "measured", "of_nothing"]

Array = Any
Report = dict[str, Any]

# Drawn queries whose pairs with all drawn keys are on the host at a time.
_PAIRED = 256


def of_nothing(heads: int) -> list[Report]:
    """Reports of heads without queries."""
    return [head_report(unplanned(Exact()))] * heads


@dataclass(frozen=True)
class Part:
    """What the forward pass of heads ``start .. end`` has left, which ran together."""

    start: int
    end: int
    saved: Saved

    @property
    def heads(self) -> range:
        """Their numbers."""
        return range(self.start, self.end)

    def part(self, start: int, end: int) -> Part:
        """That of some of them."""
        return Part(start, end, self.saved.part(start - self.start, end - self.start))


def _ranges(which: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Heads in order, as ranges of those that follow each other."""
    for _, run in itertools.groupby(enumerate(which), key=lambda at: at[1] - at[0]):
        together = [i for _, i in run]
        yield together[0], together[-1] + 1


def _run(sp: Space, own: Sequence[HeadEngine], heads: Heads, start: int, end: int, out: Array) -> Part:
    """Writes ``out`` of some heads, each by its own engine."""
    out[start:end, ...], saved = engines.forward(sp, own, heads.part(start, end))
    return Part(start, end, saved)


def _try(
    sp: Space, own: Sequence[HeadEngine], heads: Heads, start: int, end: int, out: Array
) -> tuple[list[Part], dict[int, str]]:
    """Writes ``out`` of those heads that their engines have an answer for; and why they have none for the others."""
    try:
        return [_run(sp, own, heads, start, end, out)], {}
    except (DenominatorError, NonFiniteError) as error:
        if end - start == 1:
            # Not the error itself: its frames would keep arrays alive.
            return [], {start: str(error)}
    parts, errors = [], {}
    for i in range(start, end):
        part, why = _try(sp, own[i - start : i - start + 1], heads, i, i + 1, out)
        parts += part
        errors |= why
    return parts, errors


def forward_within(
    sp: Space,
    heads: Heads,
    auto: Auto,
    given: Sequence[HeadPlan] | None = None,
    known: Sequence[Report] | None = None,
) -> tuple[Array, list[Part], list[Report]]:
    """``out`` of each head within a tolerance, by the engines of a plan, or by those that are planned now.

    Parameters
    ----------
    heads : Heads
        At least one, of at least one query.
    given : sequence of HeadPlan, optional
        One a head.
    known : sequence of dict, optional
        In place of that, what a call on the same data has reported: nothing is verified again.

    Returns
    -------
    out : array, shape (heads, n, d_v)
    parts : list of Part
    reports : list of dict
        One a head, as `spec.plan.head_plans` reads them.

    Raises
    ------
    DenominatorError
        The exact engine has no answer either.

    Notes
    -----
    Cost: that of planning, of the engines that are chosen, and of 16 to 64 exact rows a head; and of exact attention
    where they miss.
    """
    n, _, _, d_v = heads.sizes
    stale = ""
    if known is not None:
        plans = list(head_plans(known))
    elif given is not None:
        fresh: dict[str, Any] = {"measured_error": None, "error_bound": None, "missed": None, "errors": {}}
        plans, stale = [replace(plan, **fresh) for plan in given], "the plan is stale: "
    else:
        plans = plan_heads(sp, heads, auto)
    out = sp.empty((heads.count, n, d_v), heads.q.dtype)
    parts: list[Part] = []
    missed: dict[int, str] = {}
    own: list[Any] = [plan.engine for plan in plans]
    for (engine, _), run in itertools.groupby(range(heads.count), key=lambda i: engines.without_numbers(own[i])):
        if engine == Exact():
            continue
        together = list(run)
        start, end = together[0], together[-1] + 1
        done, errors = _try(sp, own[start:end], heads, start, end, out)
        parts += done
        missed |= {i: f"{stale}{error}" for i, error in errors.items()}
    if known is None and parts:
        tried = [i for part in parts for i in part.heads]
        # Not the rows that the engines were chosen by.
        sizes = _row_squares(sp, out, tried)
        references = _references(sp, heads, tried, sizes, auto.seed ^ 0xF0)
        draws = [references[i][0] for i in tried]
        got = sp.host(measure.take_rows(sp, chosen(sp, out, tried), measure.padded(draws)))
        finite = _all_finite(sp, chosen(sp, out, tried))
        bounds = _error_bounds(sp, heads, out, parts)
        for c, i in enumerate(tried):
            error = draws[c].compare(references[i][1], got[c, : len(draws[c].rows)], float(np.sum(sizes[c])))
            if error.high <= auto.tol and finite[c]:
                plans[i] = replace(plans[i], errors={"out": error}, measured_error=error, error_bound=bounds.get(i))
            else:
                missed[i] = f"{stale}{engines.name(plans[i].engine)} errs by up to {short(error.high)} in out"
        parts = [
            part.part(start, end)
            for part in parts
            for start, end in _ranges([i for i in part.heads if i not in missed])
        ]
    approximate = {i for part in parts for i in part.heads}
    for start, end in _ranges([i for i in range(heads.count) if i not in approximate]):
        parts.append(_run(sp, [Exact()] * (end - start), heads, start, end, out))
    for i, why in missed.items():
        cost = plans[i].exact_cost
        plans[i] = replace(plans[i], engine=Exact(), cost=cost, predicted_error=None, whole_sequence=(), missed=why)
    return out, parts, [head_report(plan) for plan in plans]


def _row_squares(sp: Space, x: Array, which: Sequence[int]) -> Floats:
    """``|x_i|^2`` of the rows of some heads, on the host."""
    own = chosen(sp, x, which)
    return sp.host(dots(sp, own, own))


def _references(
    sp: Space, heads: Heads, which: Sequence[int], sizes: Floats, seed: int
) -> dict[int, tuple[Draw, Floats]]:
    """Rows of some heads, drawn by the squares of their results too, and their exact output."""
    some = heads_at(sp, heads, which)
    by = [*Known.of(sp, some).of_queries(sp), sizes]
    draws = measure.draw_rows(by, core.rows_to_verify(sizes.shape[1]), seed)
    rows = measure.padded(draws)
    exact = measure.exact_rows(sp, some, rows)
    exact.check(sp, rows, [heads.first + i for i in which])
    out = sp.host(exact.out)
    return {i: (draw, out[c, : len(draw.rows)]) for c, (i, draw) in enumerate(zip(which, draws, strict=True))}


def _all_finite(sp: Space, x: Array) -> NDArray[np.bool_]:
    """Of each element of the first axis; waits for the device, once."""
    return sp.host(sp.xp.all(sp.xp.isfinite(x), axis=tuple(range(1, x.ndim))))


def _error_bounds(sp: Space, heads: Heads, out: Array, parts: Sequence[Part]) -> dict[int, float]:
    """The a-priori bound of the relative Frobenius error of ``out``, before rounding, of polynomials that have one.

    With ``eps = max |p(s) e^-s - 1|`` over the scores that norms allow, ``|out - exact| <= 2 eps / (1 - eps) max|v|``
    entry by entry.
    """
    xp = sp.xp
    constants = {
        i: (part.saved.constants, i - part.start)
        for part in parts
        if isinstance(part.saved.engine, Polynomial)
        for i in part.heads
    }
    if not constants:
        return {}
    some = heads_at(sp, heads, list(constants))
    none = sp.zeros((heads.sizes[2],), xp.float64)
    query_shifts, key_shifts = (
        xp.stack([none if x is None else sp.wide(x[at, ...]) for x, at in of_side])
        for of_side in (
            [(each.query_shift, at) for each, at in constants.values()],
            [(each.key_shift, at) for each, at in constants.values()],
        )
    )
    # Also those of a bias like -1e9, which rows may see that see no others.
    live = None if some.key_bias is None else some.key_bias > -math.inf
    v = some.v if live is None else xp.where(live[..., None], some.v, xp.zeros_like(some.v))
    own = chosen(sp, out, list(constants))
    sizes = [
        longest(sp, some.q, query_shifts),
        longest(sp, some.k, key_shifts, live),
        sp.wide(xp.max(xp.abs(v), axis=(1, 2))),
        xp.sqrt(xp.sum(dots(sp, own, own), axis=1)),
    ]
    bounds = {}
    for (i, (each, at)), of_head in zip(constants.items(), sp.host(xp.stack(sizes)).T, strict=True):
        query, key, value, size = of_head.tolist()
        coefficients = each.coefficients[at].tolist()
        eps = core.largest_relative_error(coefficients, abs(heads.scale) * query * key)
        if not eps < 1:
            continue
        absolute = 2 * eps / (1 - eps) * value * math.sqrt(math.prod(own.shape[1:]))
        if absolute < size:
            bounds[i] = absolute / (size - absolute)
    return bounds


class _Sums:
    """Gradients of all heads, those of keys summed over the query heads that share them."""

    def __init__(self, sp: Space, heads: Heads, group: int) -> None:
        n, m, d, d_v = heads.sizes
        shared, dtype = heads.count // group, heads.q.dtype
        self.group = group
        db = None if heads.key_bias is None else sp.zeros((shared, m), dtype)
        dk, dv = (sp.zeros((shared, m, width), dtype) for width in (d, d_v))
        self.grads = Grads(sp.zeros((heads.count, n, d), dtype), dk, dv, db)

    def _of_keys(self, grads: Grads) -> list[Array]:
        return [x for x in (grads.dk, grads.dv, grads.dkey_bias) if x is not None]

    def clear(self, g: int) -> None:
        """Forgets what was added to a key head."""
        for total in self._of_keys(self.grads):
            total[g, ...] = 0.0

    def add(self, sp: Space, start: int, grads: Grads) -> None:
        """Those of query heads from ``start`` on."""
        count, group = grads.dq.shape[0], self.group
        self.grads.dq[start : start + count, ...] = grads.dq
        # The heads of whole key heads together, those at either end one by one.
        first, last = -(-start // group), (start + count) // group
        for total, x in zip(self._of_keys(self.grads), self._of_keys(grads), strict=True):
            if first < last:
                whole = x[first * group - start : last * group - start, ...]
                total[first:last, ...] += sp.xp.sum(sp.xp.reshape(whole, (-1, group, *x.shape[1:])), axis=1)
            for i in range(start, start + count):
                if not first <= i // group < last:
                    total[i // group, ...] += x[i - start, ...]

    def all_finite(self, sp: Space, groups: Sequence[int]) -> NDArray[np.bool_]:
        """Of each of some key heads."""
        dq = self.grads.dq
        shared = [sp.xp.reshape(dq, (-1, self.group, *dq.shape[1:])), self.grads.dk, self.grads.dv]
        return np.all([_all_finite(sp, chosen(sp, x, groups)) for x in shared], axis=0)


def backward_within(
    sp: Space,
    heads: Heads,
    group: int,
    auto: Auto,
    parts: Sequence[Part],
    reports: Sequence[Report],
    out: Array,
    dout: Array,
) -> tuple[Grads, list[Report]]:
    """The gradients within a tolerance, from what `forward_within` left and ``dout (heads, n, d_v)``.

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
    for part in parts:
        of, own = slice(part.start, part.end), heads.part(part.start, part.end)
        sums.add(sp, part.start, engines.backward(sp, own, part.saved, out[of, ...], dout[of, ...]))
    approximate = {i for part in parts if part.saved.engine != Exact() for i in part.heads}
    groups = sorted({i // group for i in approximate})
    if not groups:
        return sums.grads, [head_report(plan) for plan in plans]
    members = [i for g in groups for i in range(g * group, (g + 1) * group)]
    logs = sp.empty(heads.q.shape[:2], sp.xp.float64)
    for part in parts:
        logs[part.start : part.end, :] = engines.log_sums(sp, heads.part(part.start, part.end), part.saved)
    samples = core.rows_to_verify(max(heads.sizes[:2]))
    sample = _Sample(groups, group, approximate, samples, auto.seed ^ 0xB0)
    check = _Check.new(sp, heads, sample, chosen(sp, logs, members), out, dout, sums.grads)
    for errors, finite in zip(check.errors(sp, sums.grads), sums.all_finite(sp, groups), strict=True):
        g, (worst, of) = errors.group, errors.worst()
        if worst <= auto.tol and finite:
            for i in range(g * group, (g + 1) * group):
                plans[i] = errors.added_to(plans[i], i)
            continue
        why = f"{of} errs by up to {short(worst)}" if worst > auto.tol else "overflow"
        sums.clear(g)
        own = heads.part(g * group, (g + 1) * group)
        exact, saved = engines.forward(sp, [Exact()] * group, own)
        sums.add(sp, g * group, engines.backward(sp, own, saved, exact, dout[g * group : (g + 1) * group, ...]))
        for i in range(g * group, (g + 1) * group):
            if i in approximate:
                text = f"the gradients of {engines.name(plans[i].engine)}, computed exactly instead: {why}"
                plans[i] = replace(plans[i], missed=text)
    return sums.grads, [head_report(plan) for plan in plans]


def measured(
    sp: Space, heads: Heads, group: int, saved: Saved, out: Array, dout: Array, grads: Grads, samples: int
) -> list[Report]:
    """The errors of results that were computed without a tolerance, on so many queries and keys of each head.

    ``grads`` are of query heads and of key heads, as `backward_within` returns them. Cost: that of ``samples`` exact
    queries and keys a head.
    """
    sample = _Sample(range(heads.count // group), group, range(heads.count), samples, 0)
    check = _Check.new(sp, heads, sample, engines.log_sums(sp, heads, saved), out, dout, grads)
    of_out = check.of_queries(sp, check.exact_out, out)
    bounds = _error_bounds(sp, heads, out, [Part(0, heads.count, saved)])
    return [
        head_report(
            errors.added_to(replace(unplanned(saved.engine), errors={"out": of_out[i]}, error_bound=bounds.get(i)), i)
        )
        for errors in check.errors(sp, grads)
        for i in range(errors.group * group, (errors.group + 1) * group)
    ]


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
        errors = {**plan.errors, **dq, **self.keys}
        return replace(plan, errors=errors, measured_error=errors.get("out"))


@dataclass(frozen=True)
class _Sample:
    """What is checked: key heads, each with ``group`` query heads, of which ``of_dq`` are; and on how many rows."""

    groups: Sequence[int]
    group: int
    of_dq: Container[int]
    samples: int
    seed: int


@dataclass(frozen=True)
class _Keys:
    """Drawn keys of some heads, on the host: ``rows (heads, keys)``, and what they hold, in float64."""

    rows: Rows
    k: Floats
    v: Floats
    bias: Floats | None

    @staticmethod
    def of(sp: Space, heads: Heads, rows: Rows) -> _Keys:
        k, v = (sp.host(measure.take_rows(sp, x, rows)) for x in (heads.k, heads.v))
        bias = None
        if heads.key_bias is not None:
            bias = sp.host(measure.take_rows(sp, heads.key_bias[..., None], rows))[..., 0]
        return _Keys(rows, k, v, bias)


@dataclass(frozen=True)
class _RowSums:
    """Logarithms of row sums, and ``dout_i.out_i``, of all rows of some heads ``(heads, n)``, on the host."""

    logs: Floats
    deltas: Floats

    def set_exact(
        self,
        sp: Space,
        c: int,
        place: int,
        draw: Draw,
        heads: Heads,
        dout: Array,
        exact: measure.ExactRows,
        keys: _Keys,
        count: int,
    ) -> Floats:
        """Sets drawn rows of a head to their exact sums, and the others' off by as much as those on average.

        Returns what the others may add to the squared errors of ``count`` keys, ``(keys, 3)``, as the core's
        ``unseen_row_sums`` has it. The head is ``c`` among those whose rows are given, and ``place`` among these.
        """
        xp, size = sp.xp, len(draw.rows)
        own = lambda x: sp.host(x[c, :size, ...])  # noqa: E731
        up, out = own(dout), own(exact.out)
        logs, deltas = own(exact.largest + xp.log(exact.sums)), np.sum(up * out, axis=1)
        squares = np.sum(up**2, axis=1)
        # Rows that are taken for certain stand for no others.
        mass = (draw.weights - 1) * squares
        if np.sum(mass) > 0:
            self.logs[place] += np.sum(mass * (logs - self.logs[place, draw.rows])) / np.sum(mass)
        q = sp.host(measure.take_rows(sp, heads.q[c : c + 1, ...], draw.rows[None, :]))[0]
        before = np.stack([self.logs[place, draw.rows], self.deltas[place, draw.rows]])
        self.logs[place, draw.rows], self.deltas[place, draw.rows] = logs, deltas
        sizes, after = np.stack([np.sum((heads.scale * q) ** 2, axis=1), squares]), np.stack([logs, deltas])
        added = np.zeros((count, 3))
        for some in (slice(start, start + _PAIRED) for start in range(0, size, _PAIRED)):
            scores = heads.scale * q[some] @ keys.k[c, :count].T
            if keys.bias is not None:
                bias = keys.bias[c, :count]
                scores = np.where(bias == -math.inf, bias, scores + bias)
            if heads.causal:
                scores[keys.rows[c, :count] > draw.rows[some, None]] = -math.inf
            upstream, weights = up[some] @ keys.v[c, :count].T, draw.weights[some]
            each = (x[:, some] for x in (after, before, sizes))
            added += core.unseen_row_sums(scores, upstream, weights, *each)
        return added


@dataclass(frozen=True)
class _Check:
    """Exact gradients of sampled queries and keys of some key heads, on the host.

    Attributes
    ----------
    of : _Sample
    keys : list of Draw
        Of each key head.
    exact_keys : dict of str to ndarray, shape (key heads, keys, width)
        The gradients of those keys.
    unseen : list of ndarray, shape (keys, 3)
        What row sums of queries that were not drawn may add to the squared errors of dk, dv and the bias.
    heads : list of int
        The query heads whose dq is checked.
    queries : list of Draw
        Theirs.
    exact_out, exact_dq : ndarray, shape (heads, queries, width)
    """

    of: _Sample
    keys: list[Draw]
    exact_keys: dict[str, Floats]
    unseen: list[Floats]
    heads: list[int]
    queries: list[Draw]
    exact_out: Floats
    exact_dq: Floats

    @staticmethod
    def new(sp: Space, heads: Heads, of: _Sample, log_sums: Array, out: Array, dout: Array, grads: Grads) -> _Check:
        """With the row sums ``(query heads of the key heads, n)`` of the forward pass, and the results to look at."""
        xp, groups = sp.xp, of.groups
        members = [i for g in groups for i in range(g * of.group, (g + 1) * of.group)]
        some = heads_at(sp, heads, members)
        up, own = chosen(sp, dout, members), chosen(sp, out, members)
        checked = [i for i in members if i in of.of_dq]
        queried = heads_at(sp, heads, checked)
        known, sizes = Known.of(sp, some), _row_squares(sp, up, range(len(members)))
        places = [members.index(i) for i in checked]
        by = [x[places] for x in known.of_queries(sp, sizes)] + [_row_squares(sp, grads.dq, checked)]
        queries = measure.draw_rows(by, of.samples, of.seed ^ 1)
        rows = measure.padded(queries)
        by = [np.sum(x.reshape(len(groups), of.group, -1), axis=1) for x in known.of_keys(sp, sizes)]
        by += [_row_squares(sp, x, groups) for x in (grads.dk, grads.dv)]
        keys = measure.draw_rows(by, of.samples, of.seed)
        key_rows = np.repeat(measure.padded(keys), of.group, axis=0)
        up_rows = measure.take_rows(sp, chosen(sp, dout, checked), rows)
        exact_rows = measure.exact_rows(sp, queried, rows, up_rows)
        exact_rows.check(sp, rows, [heads.first + i for i in checked])
        sums = _RowSums(sp.host(log_sums).copy(), sp.host(dots(sp, up, own)).copy())
        of_keys = _Keys.of(sp, queried, key_rows[places])
        unseen = [np.zeros((len(draw.rows), 3)) for draw in keys]
        for c, (place, draw) in enumerate(zip(places, queries, strict=True)):
            g = place // of.group
            unseen[g] += sums.set_exact(sp, c, place, draw, queried, up_rows, exact_rows, of_keys, len(keys[g].rows))
        log_sums, deltas = (sp.asarray(x, xp.float64) for x in (sums.logs, sums.deltas))
        exact = measure.key_gradients(sp, some, key_rows, up, deltas, log_sums)
        by_name = {"dk": exact.dk, "dv": exact.dv} | ({} if heads.key_bias is None else {"dkey_bias": exact.db})
        exact_keys = {
            name: sp.host(xp.sum(xp.reshape(x, (len(groups), of.group, *x.shape[1:])), axis=1))
            for name, x in by_name.items()
        }
        return _Check(of, keys, exact_keys, unseen, checked, queries, sp.host(exact_rows.out), sp.host(exact_rows.dq))

    def of_queries(self, sp: Space, exact: Floats, got: Array) -> dict[int, ErrorEstimate]:
        """The error of rows ``(all heads, n, width)`` of each checked head."""
        rows = sp.host(measure.take_rows(sp, chosen(sp, got, self.heads), measure.padded(self.queries)))
        all_rows = measure.square_sums(sp, chosen(sp, got, self.heads))
        return {i: self.queries[c].compare(exact[c], rows[c], float(all_rows[c])) for c, i in enumerate(self.heads)}

    def errors(self, sp: Space, grads: Grads) -> list[_GroupErrors]:
        """Those of results, of each key head."""
        dq = self.of_queries(sp, self.exact_dq, grads.dq)
        results = {"dk": grads.dk, "dv": grads.dv}
        if grads.dkey_bias is not None:
            results["dkey_bias"] = grads.dkey_bias[..., None]
        rows, group = measure.padded(self.keys), self.of.group
        own = {name: chosen(sp, x, self.of.groups) for name, x in results.items()}
        got = {name: sp.host(measure.take_rows(sp, x, rows)) for name, x in own.items()}
        all_rows = {name: measure.square_sums(sp, x) for name, x in own.items()}
        return [
            _GroupErrors(
                g,
                {i: dq[i] for i in range(g * group, (g + 1) * group) if i in dq},
                {
                    name: self.keys[c].compare(
                        self.exact_keys[name][c], got[name][c], float(all_rows[name][c]), self.unseen[c][:, kind]
                    )
                    for kind, name in enumerate(got)
                },
            )
            for c, g in enumerate(self.of.groups)
        ]
