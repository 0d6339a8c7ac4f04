"""From a tolerance to an engine, head by head.

Engines that would not be clearly faster than exact attention are discarded by a cost model of this device. Some rows
are drawn and computed exactly, over all their keys; their `moments` tell the errors of polynomials of all degrees
before any of them is run. Landmarks are judged on a sample, by the core. The cheapest engine within the
tolerance is taken, or the exact one; `tolerance` runs it and verifies what comes out.

All heads go through each step together, so that the device is waited for a few times, however many heads there are;
copied to the host are squared sizes, means, samples of 256 to 4096 tokens, and moments.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from .... import _lingrad_rs as core
from ....spec.engines import Auto
from ....spec.plan import HeadPlan, head_plans
from .. import measure
from ..device import Space
from ..engines import sample
from ..measure.guides import Known
from ..problem.heads import Heads, heads_at, live_keys
from ..texts import scientific
from .cost import Size
from .moments import bounds, column_sums, longest, moments, rounded, split

__all__ = ["longest", "plan_heads", "short"]


def plan_heads(sp: Space, heads: Heads, auto: Auto) -> list[HeadPlan]:
    """A plan for each head: what is measured here, the core's planner decides.

    Cost: at most about a tenth of the time of exact attention, by the model; once a device and dtype, some milliseconds
    to measure its rates.
    """
    size = Size.of(sp, heads, auto)
    costs: dict[str, Any] = {
        "exact": size.exact(),
        "polynomials": [size.polynomial(degree) for degree in range(1, core.DEGREES + 1)],
        "landmarks": [size.landmarks(rank) for rank in core.RANKS],
        "drawing": [size.drawing(rank) for rank in core.RANKS],
        "moments": [size.moments(degree) for degree in range(core.DEGREES + 1)],
    }
    tolerance: dict[str, Any] = dataclasses.asdict(auto) | {"causal": heads.causal, "scale": heads.scale}
    planners = [core.HeadPlanner(**tolerance, **costs, head=heads.first + i) for i in range(heads.count)]
    if planners and planners[0].degrees() > 0:
        _look_at_polynomials(sp, heads, auto, size, planners)
    which = [i for i, planner in enumerate(planners) if planner.ranks()]
    pools: list[sample.Tokens] = []
    if which:
        pools = sample.first(sp, heads, which) if size.strict else sample.spread(sp, heads, sample.POOL, 2, which)
    for i, tokens in zip(which, pools, strict=True):
        planners[i].look_for_landmarks(tokens.q, tokens.k, tokens.v, tokens.key_bias)
    return list(head_plans(planner.report() for planner in planners))


def _look_at_polynomials(sp: Space, heads: Heads, auto: Auto, size: Size, planners: Sequence[core.HeadPlanner]) -> None:
    live = live_keys(sp, heads)
    queries, keys, values = (sp.host(column_sums(sp, *of)) for of in ((heads.q,), (heads.k, live), (heads.v, live)))
    shifts = [
        planner.shift(split(queries[i]), split(keys[i])) or np.zeros((2, size.d)) for i, planner in enumerate(planners)
    ]
    fits: dict[int, list[list[float] | None]] = {}
    # The same tokens as the engine's, or for a plan all through the sequence.
    samples = sample.first(sp, heads) if size.strict else sample.spread(sp, heads, sample.FIT, 0)
    for i, (tokens, planner) in enumerate(zip(samples, planners, strict=True)):
        coefficients = planner.look_at_tokens(tokens.q, tokens.k, tokens.key_bias, tokens.positions, split(values[i]))
        if planner.degrees() > 0:
            fits[i] = coefficients
    which = list(fits)
    if not which:
        return
    some = heads_at(sp, heads, which)
    draws = measure.draw_rows(Known.of(sp, some).of_queries(sp), core.rows_to_plan(size.n), auto.seed ^ 0x9A)
    rows = measure.padded(draws)
    by = rounded(sp, heads, np.array([shifts[i] for i in which]))
    largest, natural = bounds(sp, some, rows, by)
    dout = core.random_dout(rows.shape[1], size.d_v, auto.seed)[None] if auto.gradients else None
    usable = largest <= core.LARGEST_BOUND
    degree = max(planners[i].degrees() for i in which)
    sums = moments(sp, some, size, rows, by, np.where(usable, largest, 0.0), dout, degree)
    for c, i in enumerate(which):
        if not usable[c]:
            planners[i].scores_are_too_large()
            continue
        count = len(draws[c].rows)
        planners[i].try_polynomials(
            np.ascontiguousarray(sums[:, c, :count]),
            draws[c].weights,
            size.n,
            None if dout is None else dout[0, :count],
            d=size.d,
            d_v=size.d_v,
            natural=float(natural[c]),
            epsilon=float(sp.xp.finfo(heads.q.dtype).eps),
            coefficients=fits[i],
        )


def short(x: float) -> str:
    """A number in two digits."""
    return scientific(x, 1)
