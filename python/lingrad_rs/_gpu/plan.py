"""From a tolerance to an engine, head by head.

Engines that would not be clearly faster than exact attention are discarded by a cost model of this device. Some rows
are drawn and computed exactly, over all their keys; with the moments

    U_l = sum_j w_j s'_ij^l [1, v_j, k'_j]        V_l = sum_j w_j s'_ij^l (dout_i.v_j) k'_j

of the same rows every polynomial's output and dq are linear combinations, so that the errors of all degrees are
measured before any of them is run. Landmarks are judged on a sample, by the core. The cheapest engine within the
tolerance is taken, or the exact one; `tolerance` runs it and verifies what comes out.

All heads go through each step together, so that the device is waited for a few times, however many heads there are;
copied to the host are squared sizes, means, samples of 256 to 4096 tokens, and moments.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import _lingrad_rs as core
from ..engines import Auto
from ..plan import HeadPlan, head_plans
from . import measure, sample, tiles
from .causal import BLOCK, PREFIX, Near, near_start
from .device import Space
from .guides import Known
from .heads import Heads, live_keys
from .landmark import WINDOW
from .measure import Floats, Rows
from .sample import Tokens
from .texts import scientific

__all__ = ["longest", "plan_heads", "short"]

Array = Any

# Numbers that exact attention moves for a pair, beside those of the exponentials: scores are written, weights read; in
# the backward pass scores and dout.v are written and read, f and dS written, and read by three products.
_MOVED_FORWARD = 2
_MOVED_BACKWARD = 7
# Operations on arrays of a forward pass, and of a backward one: exact, low-rank.
_CALLS = {"exact": (12, 20), "low rank": (40, 120)}
# Sides of the square arrays that rates are measured with, and the seconds that suffice.
_SIDES = (256, 4096)
_LONG_ENOUGH = 1e-3


@dataclass(frozen=True)
class _Rates:
    """What a device does in a second, and how long an operation takes that does nothing."""

    flops: float
    exps: float
    moved: float
    call: float

    def seconds(self, flops: float, exps: float, moved: float, calls: float = 0) -> float:
        """Of additions and multiplications, exponentials, numbers read or written, and operations on arrays."""
        return flops / self.flops + exps / self.exps + moved / self.moved + calls * self.call


@dataclass(frozen=True)
class _Measured:
    """Rates, and the side of the largest arrays that there was room to measure them with."""

    rates: _Rates
    side: int


_measured: dict[tuple[str, str, str], _Measured] = {}


def _rates(sp: Space, dtype: Any) -> _Rates:
    """Those of the device for a dtype: measured once, and kept until there is room for larger arrays that tell more."""
    key = (sp.xp.__name__, str(sp.device), str(dtype))
    largest = _largest_side(sp.numbers)
    kept = _measured.get(key)
    if kept is None or kept.side < largest:
        kept = _measured[key] = _measure_rates(sp, dtype, largest)
    return kept.rates


def _largest_side(numbers: int) -> int:
    """That of square arrays that rates are measured with, where temporary arrays hold so many numbers."""
    side = _SIDES[0]
    while side < _SIDES[1] and (2 * side) ** 2 <= numbers:
        side *= 2
    return side


def _measure_rates(sp: Space, dtype: Any, largest: int) -> _Measured:
    """From ever larger arrays, until one takes long enough to be timed, or is as large as it may be."""
    # Whether larger arrays would tell more.
    cut_short = False

    def seconds(work: Callable[[Array], Array]) -> tuple[int, float]:
        nonlocal cut_short
        side = _SIDES[0]
        while (taken := _on_device(sp, work, side, dtype)) < _LONG_ENOUGH and side < largest:
            side *= 2
        cut_short |= taken < _LONG_ENOUGH
        return side, taken

    # The product as the engines have theirs, with an axis of heads: some libraries compute it in another way.
    products = lambda x: x[None, ...] @ x[None, ...]  # noqa: E731
    multiply, exponentiate, move = (seconds(work) for work in (products, sp.xp.exp, lambda x: x + 1.0))
    rates = _Rates(
        flops=2 * multiply[0] ** 3 / multiply[1],
        exps=exponentiate[0] ** 2 / exponentiate[1],
        moved=2 * move[0] ** 2 / move[1],
        call=_on_device(sp, lambda x: x + 1.0, 1, dtype),
    )
    return _Measured(rates, largest if cut_short else _SIDES[1])


def _on_device(sp: Space, work: Callable[[Array], Array], side: int, dtype: Any) -> float:
    """Seconds that work on a square array takes."""
    x = sp.full((side, side), 0.5, dtype)
    return _seconds(lambda: work(x), sp.synchronize)


def _seconds(call: Callable[[], object], wait: Callable[[], None] = lambda: None) -> float:
    """Those of the fastest of a few calls."""
    times = []
    for _ in range(4):
        wait()
        start = time.perf_counter()
        call()
        wait()
        times.append(time.perf_counter() - start)
    return max(min(times), 1e-9)


@functools.cache
def _host_flops() -> float:
    """Additions and multiplications a second in float64 of the host, which landmarks are drawn on."""
    x = np.full((256, 256), 0.5)
    return 2 * 256**3 / _seconds(lambda: x @ x)


@dataclass(frozen=True)
class _Size:
    """The sizes of a head, and the rates, that its times depend on; `seconds` of each engine."""

    n: int
    m: int
    d: int
    dv: int
    causal: bool
    gradients: bool
    strict: bool
    rates: _Rates
    wide_rates: _Rates
    numbers: int

    @staticmethod
    def of(sp: Space, heads: Heads, auto: Auto) -> _Size:
        strict = heads.causal and auto.strict_causal
        rates = _rates(sp, heads.q.dtype), _rates(sp, sp.xp.float64)
        return _Size(*heads.sizes, heads.causal, auto.gradients, strict, *rates, sp.numbers)

    @property
    def pairs(self) -> float:
        return self.n * self.m / (2 if self.causal else 1)

    def _exact_pairs(self, pairs: float) -> float:
        flops, exps, moved = 2 * (self.d + self.dv), 1, _MOVED_FORWARD
        if self.gradients:
            flops, exps, moved = flops + 2 * (3 * self.d + 2 * self.dv), 2, moved + _MOVED_BACKWARD
        return self.rates.seconds(flops * pairs, exps * pairs, moved * pairs)

    def _calls(self, kind: str) -> float:
        forward, backward = _CALLS[kind]
        return self.rates.seconds(0, 0, 0, forward + (backward if self.gradients else 0))

    def exact(self) -> float:
        return self._exact_pairs(self.pairs) + self._calls("exact") * max(1.0, self.pairs / self.numbers)

    def near_start(self, i: int) -> int:
        """The first token near query ``i`` under a causal mask."""
        return near_start(Near(WINDOW, self.strict), i)

    def _near(self) -> float:
        """The near pairs of a low-rank engine."""
        if not self.causal:
            return 0.0
        last = self.n - 1
        span = max(last - self.near_start(last) - WINDOW, 0) / 2
        if self.strict:
            span += PREFIX / 2 * min(PREFIX / max(self.n, 1), 1)
        return self._exact_pairs(min(self.n * (WINDOW + span), self.pairs))

    def polynomial(self, degree: int) -> float:
        """Features are written and read once, of a state's tokens, of those that it is applied to, and by gradients."""
        r, potential = (math.comb(self.d + g, g) for g in (degree, degree + 1))
        e = self.dv + 1
        if potential * e > core.LARGEST_STATE:
            return math.inf
        flops, moved = 2 * e * r, 2.0 * r
        if self.gradients:
            flops, moved = flops + 4 * e * potential + e * r, moved + 6 * potential + r
        if self.causal:
            moved += e * (4 * r + (8 * potential if self.gradients else 0)) / BLOCK
        tokens = self.n + self.m
        return self.rates.seconds(flops * tokens, 0, moved * tokens) + self._calls("low rank") + self._near()

    def landmarks(self, rank: int) -> float:
        e, d = self.dv + 1, self.d
        flops, exps, moved = 2 * (d + e), 1.0, 2.0
        if self.gradients:
            flops, exps, moved = flops + 6 * (d + e), 4.0, moved + 8
        if self.causal:
            moved += e * (12 if self.gradients else 4) / BLOCK
        features = (self.n + self.m) * rank
        seconds = self.rates.seconds(flops * features, exps * features, moved * features)
        return seconds + self._calls("low rank") + self._near()

    def drawing(self, rank: int) -> float:
        """Landmarks are drawn by the core, on the host."""
        sample = min(max(4 * rank, 512), 2048)
        flops = 4 * sample**2 * (self.d + rank) + 12 * sample * rank**2 + 20 * rank**3
        return 3 * flops / _host_flops()

    def moments(self, degree: int) -> float:
        one = 2 * (self.dv + 1) + (4 * self.d if self.gradients else 0)
        flops = 2 * (self.d + self.dv) + one * (degree + 2)
        pairs = core.rows_to_plan(self.n) * self.m
        return self.wide_rates.seconds(flops * pairs, pairs, 4 * (degree + 3) * pairs)


def plan_heads(sp: Space, heads: Heads, auto: Auto) -> list[HeadPlan]:
    """A plan for each head: what is measured here, the core's planner decides.

    Cost: at most about a tenth of the time of exact attention, by the model; once a device and dtype, some milliseconds
    to measure its rates.
    """
    size = _Size.of(sp, heads, auto)
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
    pools: list[Tokens] = []
    if which:
        pools = sample.first(sp, heads, which) if size.strict else sample.spread(sp, heads, sample.POOL, 2, which)
    for i, tokens in zip(which, pools, strict=True):
        planners[i].look_for_landmarks(tokens.q, tokens.k, tokens.v, tokens.key_bias)
    return list(head_plans(planner.report() for planner in planners))


def _look_at_polynomials(
    sp: Space, heads: Heads, auto: Auto, size: _Size, planners: Sequence[core.HeadPlanner]
) -> None:
    live = live_keys(sp, heads)
    queries, keys, values = (sp.host(_sums(sp, *of)) for of in ((heads.q,), (heads.k, live), (heads.v, live)))
    shifts = [
        planner.shift(_split(queries[i]), _split(keys[i])) or np.zeros((2, size.d))
        for i, planner in enumerate(planners)
    ]
    fits: dict[int, list[list[float] | None]] = {}
    # The same tokens as the engine's, or for a plan all through the sequence.
    samples = sample.first(sp, heads) if size.strict else sample.spread(sp, heads, sample.FIT, 0)
    for i, (tokens, planner) in enumerate(zip(samples, planners, strict=True)):
        coefficients = planner.look_at_tokens(tokens.q, tokens.k, tokens.key_bias, tokens.positions, _split(values[i]))
        if planner.degrees() > 0:
            fits[i] = coefficients
    which = list(fits)
    if not which:
        return
    some = measure.select(sp, heads, which)
    draws = measure.draw_rows(Known.of(sp, some).of_queries(sp), core.rows_to_plan(size.n), auto.seed ^ 0x9A)
    rows = measure.padded(draws)
    by = _rounded(sp, heads, np.array([shifts[i] for i in which]))
    bounds, natural = _bounds(sp, some, rows, by)
    dout = core.random_dout(rows.shape[1], size.dv, auto.seed)[None] if auto.gradients else None
    usable = bounds <= core.LARGEST_BOUND
    degree = max(planners[i].degrees() for i in which)
    sums = _moments(sp, some, size, rows, by, np.where(usable, bounds, 0.0), dout, degree)
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
            d_v=size.dv,
            natural=float(natural[c]),
            epsilon=float(sp.xp.finfo(heads.q.dtype).eps),
            coefficients=fits[i],
        )


def _split(sums: Floats) -> tuple[Floats, float, float]:
    """Column sums, the sum of squares, and how many rows."""
    return sums[:-2], float(sums[-2]), float(max(sums[-1], 1))


def _sums(sp: Space, x: Array, live: Array | None = None) -> Array:
    """Of live rows ``(heads, rows, width)``: column sums, the sum of squares, and how many; ``(heads, width + 2)``."""
    xp = sp.xp
    count, rows, width = x.shape
    sums, squares = sp.zeros((count, width), xp.float64), sp.zeros((count, 1), xp.float64)
    for a, b in sp.tiles(rows, 2 * count * width):
        part = sp.wide(x[:, a:b, :])
        if live is not None:
            part = xp.where(live[:, a:b, None], part, xp.zeros_like(part))
        sums = sums + xp.sum(part, axis=1)
        squares = squares + xp.sum(part * part, axis=(1, 2))[:, None]
    number = sp.full((count, 1), rows, xp.float64)
    if live is not None:
        number = xp.sum(sp.wide(live), axis=1, keepdims=True)
    return xp.concat([sums, squares, number], axis=1)


def _rounded(sp: Space, heads: Heads, x: Floats) -> Floats:
    """As the pass will have it."""
    single = sp.xp.finfo(heads.q.dtype).bits == 32
    return x.astype(np.float32 if single else np.float64).astype(np.float64)


def longest(sp: Space, x: Array, by: Array | None = None, live: Array | None = None) -> Array:
    """The length of each head's longest live row of ``x (heads, rows, width)`` less ``by (heads, width)``, float64."""
    xp = sp.xp
    count, rows, width = x.shape
    most = sp.zeros((count,), xp.float64)
    for a, b in sp.tiles(rows, 3 * count * width):
        part = sp.wide(x[:, a:b, :])
        squares = xp.sum((part if by is None else part - by[:, None, :]) ** 2, axis=-1)
        if live is not None:
            squares = xp.where(live[:, a:b], squares, xp.zeros_like(squares))
        most = xp.maximum(most, xp.max(squares, axis=1))
    return xp.sqrt(most)


def _bounds(sp: Space, heads: Heads, rows: Rows, by: Floats) -> tuple[Floats, Floats]:
    """Of each head: what no score of these rows exceeds, and how large a gradient of a query may be for a dout of 1."""
    xp, live = sp.xp, live_keys(sp, heads)
    alpha, beta = (sp.asarray(by[:, side], xp.float64) for side in (0, 1))
    queries = measure.take_rows(sp, heads.q, rows) - alpha[:, None, :]
    sizes = [
        xp.sqrt(xp.max(xp.sum(queries**2, axis=-1), axis=1)),
        longest(sp, heads.k, beta, live),
        longest(sp, heads.k, live=live),
        longest(sp, heads.v, live=live),
    ]
    q, shifted, k, v = sp.host(xp.stack(sizes))
    return abs(heads.scale) * q * shifted, abs(heads.scale) * k * v


def _biases(sp: Space, heads: Heads, by: Floats) -> Array:
    """``b_j + scale alpha.k'_j`` of every key, ``(heads, m)`` in float64."""
    xp = sp.xp
    count, m, d = heads.k.shape
    result = sp.empty((count, m), xp.float64)
    alpha, beta = (sp.asarray(by[:, side], xp.float64) for side in (0, 1))
    for a, b in sp.tiles(m, 2 * count * d):
        k = sp.wide(heads.k[:, a:b, :]) - beta[:, None, :]
        along = heads.scale * xp.matmul(k, alpha[..., None])[..., 0]
        if heads.key_bias is not None:
            own = sp.wide(heads.key_bias[:, a:b])
            along = xp.where(own == -math.inf, own, along + own)
        result[:, a:b] = along
    return result


def _moments(
    sp: Space, heads: Heads, size: _Size, rows: Rows, by: Floats, bounds: Floats, dout: Floats | None, degree: int
) -> Floats:
    """Sums over the keys of some queries: see the top of this file.

    Returns
    -------
    ndarray, shape (3 + degree, heads, rows, width)
        Under the exact weights of near keys, those of far ones, and the powers of the scores from 0 on. Columns are
        ``1, v, k', (dout.v) k'``, the last two where there is ``dout (1, rows, dv)``.

    Notes
    -----
    Cost: O(rows m (d + (degree + 3) (dv + d))) time a head in float64; memory: tiles, and two numbers a key.
    """
    xp, t = sp.xp, sp.xp.matrix_transpose
    count, width = rows.shape
    d, dv = size.d, size.dv
    biases, live = _biases(sp, heads, by), live_keys(sp, heads)
    level = xp.max(biases, axis=1, keepdims=True)
    level = xp.where(level == -math.inf, xp.zeros_like(level), level)
    alpha, beta = (sp.asarray(by[:, side], xp.float64)[:, None, :] for side in (0, 1))
    q, bound = measure.take_rows(sp, heads.q, rows) - alpha, sp.asarray(bounds, xp.float64)[:, None, None]
    up = None if dout is None else sp.asarray(dout, xp.float64)
    place = sp.asarray(rows, xp.int64)[..., None]
    starts = [[size.near_start(int(i)) if heads.causal else size.m for i in head] for head in rows]
    far_end = sp.asarray(starts, xp.int64)[..., None]
    columns = 1 + dv + (0 if up is None else 2 * d)
    sums = [sp.zeros((count, width, columns), xp.float64) for _ in range(degree + 3)]
    end = int(rows.max()) + 1 if heads.causal else size.m
    for a, b in sp.tiles(end, count * (8 * width + 3 * (d + dv))):
        k, v = sp.wide(heads.k[:, a:b, :]) - beta, sp.wide(heads.v[:, a:b, :])
        if live is not None:
            k, v = (xp.where(live[:, a:b, None], x, xp.zeros_like(x)) for x in (k, v))
        w = xp.exp(biases[:, a:b] - level)[:, None, :]
        s = heads.scale * xp.matmul(q, t(k))
        s = xp.where(w == 0, xp.zeros_like(s), s)  # whatever a removed key holds
        exact, power = w * xp.exp(s - bound), w * xp.ones_like(s)
        ones = xp.ones((count, b - a, 1), dtype=xp.float64, device=sp.device)
        values = xp.concat([ones, v] if up is None else [ones, v, k], axis=-1)
        upstream = None if up is None else xp.matmul(up, t(v))
        kinds = [exact, power]
        if heads.causal:
            index, zero = sp.arange(a, b), xp.zeros_like(s)
            far = index < far_end
            near = xp.where((index <= place) & (index >= far_end), exact, zero)
            sums[0] = sums[0] + _weighted(sp, near, values, upstream, k)
            kinds = [xp.where(far, x, zero) for x in kinds]
        sums[1] = sums[1] + _weighted(sp, kinds[0], values, upstream, k)
        power = kinds[1]
        for kind in range(2, degree + 3):
            sums[kind] = sums[kind] + _weighted(sp, power, values, upstream, k)
            power = power * s
    result = sp.host(xp.stack(sums))
    result[:2] *= np.exp(bounds)[:, None, None]
    return result


def _weighted(sp: Space, weights: Array, values: Array, upstream: Array | None, k: Array) -> Array:
    sums = sp.xp.matmul(weights, values)
    if upstream is None:
        return sums
    return sp.xp.concat([sums, sp.xp.matmul(tiles.times(sp, weights, upstream), k)], axis=-1)


def short(x: float) -> str:
    """A number in two digits."""
    return scientific(x, 1)
