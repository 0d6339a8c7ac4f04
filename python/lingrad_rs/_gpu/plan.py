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

import functools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .. import _lingrad_rs as core
from ..engines import Auto, Exact, Landmark, LandmarkConstants, Polynomial
from ..errors import LingradError
from ..plan import ErrorEstimate, HeadPlan
from . import measure, sample, tiles
from .causal import BLOCK, PREFIX, Near, near_start
from .device import Space
from .guides import Known
from .heads import Heads, live_keys
from .landmark import WINDOW
from .measure import Draw, Floats, Rows
from .polynomial import LARGEST_STATE
from .sample import Tokens
from .texts import scientific

__all__ = ["longest", "plan_heads", "short"]

Array = Any

# Rows that a plan is made from: one of so many, within limits.
_ONE_ROW_OF = 256
_ROWS = (16, 32)
# Degrees of polynomials, and landmarks, that are considered.
_DEGREES = 6
_RANKS = (32, 64, 128, 256)
# What an engine may cost, relative to exact attention: a polynomial, whose error is known before it runs, and
# landmarks.
_WORTH_IT = 0.6
_LANDMARKS_WORTH_IT = 0.1
# What planning may cost, relative to exact attention, in all, and drawing landmarks.
_PLANNING = 0.1
_DRAWING = 0.06
# What a polynomial costs, relative to exact attention, where it is cheap, and how far below the tolerance it should
# then lie for gradients; and how far any lies.
_CHEAP = 0.1
_ROOM = 0.4
_KEYS_ROOM = 0.8
# A gradient is nothing but rounding below so many units of that, relative to what its factors might give.
_ROUNDING = 32
# Means below this part of the root mean square are left where they are.
_SMALL_MEAN = 0.05
# Sampled weights that err so many times more than the tolerance are not looked at further, but where the spread of the
# values is below this.
_HOPELESS = 4.0
_SPREAD = 0.5
# Beyond this bound of the scores no polynomial is considered.
_LARGEST_BOUND = 300.0

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
        if potential * e > LARGEST_STATE:
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

    @property
    def rows(self) -> int:
        """Rows that a plan is made from."""
        return min(max(self.n // _ONE_ROW_OF, _ROWS[0]), _ROWS[1])

    def moments(self, degree: int) -> float:
        one = 2 * (self.dv + 1) + (4 * self.d if self.gradients else 0)
        flops = 2 * (self.d + self.dv) + one * (degree + 2)
        pairs = self.rows * self.m
        return self.wide_rates.seconds(flops * pairs, pairs, 4 * (degree + 3) * pairs)


def plan_heads(sp: Space, heads: Heads, auto: Auto) -> list[HeadPlan]:
    """A plan for each head.

    Cost: at most about a tenth of the time of exact attention, by the model; once a device and dtype, some milliseconds
    to measure its rates.
    """
    size = _Size.of(sp, heads, auto)
    exact_cost = size.exact()
    exact = HeadPlan(Exact(), None, None, None, exact_cost, exact_cost)
    costs = [size.polynomial(degree) for degree in range(1, _DEGREES + 1)]
    dear = [cost > _WORTH_IT * exact_cost for cost in costs]
    costs = costs[: dear.index(True) if any(dear) else None]
    ranks = [
        rank
        for rank in _RANKS
        if size.landmarks(rank) <= _LANDMARKS_WORTH_IT * exact_cost and size.drawing(rank) <= _DRAWING * exact_cost
    ]
    if not (costs or ranks) or size.moments(len(costs)) > _PLANNING * exact_cost:
        reason = "no low-rank engine is clearly faster at this size"
        return [replace(exact, reason=reason)] * heads.count
    cheapest = f"the cheapest within {short(auto.tol)}"
    plans = []
    found = _polynomials(sp, heads, auto, size, costs, exact_cost)
    for head in found:
        if head.engine is None:
            plans.append(replace(exact, reason=head.reason))
            continue
        constants = ("coefficients",) + (("shift",) if head.engine.shift != "none" else ())
        whole = constants if heads.causal and not size.strict else ()
        cost = costs[head.engine.degree - 1]
        plans.append(
            replace(
                exact, engine=head.engine, predicted_error=head.error, cost=cost, whole_sequence=whole, reason=cheapest
            )
        )
    cheaper = [[rank for rank in ranks if size.landmarks(rank) < plan.cost] for plan in plans]
    which = [i for i, ranks in enumerate(cheaper) if ranks]
    pools: list[Tokens] = []
    if which:
        pools = sample.first(sp, heads, which) if size.strict else sample.spread(sp, heads, sample.POOL, 2, which)
    for i, tokens in zip(which, pools, strict=True):
        chosen, reason = _landmarks(tokens, heads, auto, size.strict, cheaper[i], heads.first + i)
        if chosen is not None:
            engine, error = chosen
            whole = ("landmarks",) if heads.causal and not size.strict else ()
            cost = size.landmarks(engine.rank)
            plans[i] = replace(
                exact, engine=engine, predicted_error=error, cost=cost, whole_sequence=whole, reason=cheapest
            )
        elif plans[i].engine == Exact():
            plans[i] = replace(plans[i], reason=f"{plans[i].reason}; {reason}")
    return plans


@dataclass(frozen=True)
class _Found:
    """The best polynomial of a head, if there is one, and its error; or why there is none."""

    reason: str = ""
    engine: Polynomial | None = None
    error: float | None = None


_TOO_LARGE = _Found("scores too large for any polynomial")


def _polynomials(
    sp: Space, heads: Heads, auto: Auto, size: _Size, costs: Sequence[float], exact_cost: float
) -> list[_Found]:
    """The best polynomial of each head, of degrees whose costs are given."""
    if not costs:
        return [_Found("polynomials cost too much at this width")] * heads.count
    found = [_TOO_LARGE] * heads.count
    shifts = [None] * heads.count if size.strict else _shifts(sp, heads)
    spread = [1.0] * heads.count if auto.gradients else _spreads(sp, heads)
    fits: dict[int, list[list[float] | None]] = {}
    # The same tokens as the engine's, or for a plan all through the sequence.
    samples = sample.first(sp, heads) if size.strict else sample.spread(sp, heads, sample.FIT, 0)
    for i, tokens in enumerate(samples):
        coefficients, error = _fit(tokens, heads, len(costs), shifts[i])
        if coefficients is None:
            continue
        if not error <= _HOPELESS * auto.tol and spread[i] >= _SPREAD:
            found[i] = _Found(f"the weights by polynomials up to degree {len(costs)} err by {short(error)}")
            continue
        fits[i] = coefficients
    which = list(fits)
    if not which:
        return found
    some = measure.select(sp, heads, which)
    draws = measure.draw_rows(Known.of(sp, some).of_queries(sp), size.rows, auto.seed ^ 0x9A)
    rows = measure.padded(draws)
    by = np.array([shifts[i] or np.zeros((2, size.d)) for i in which])
    bounds, natural = _bounds(sp, some, rows, by)
    dout = None
    if auto.gradients:
        dout = np.random.default_rng(auto.seed ^ 0x1D).uniform(-1, 1, (1, rows.shape[1], size.dv))
    usable = bounds <= _LARGEST_BOUND
    sums = _moments(sp, some, size, rows, by, np.where(usable, bounds, 0.0), dout, len(costs))
    for c, i in enumerate(which):
        if not usable[c]:
            continue
        moments = _Moments(sums[:, c, : len(draws[c].rows)], size, heads.scale, None if dout is None else dout[0])
        probe = _Probe(draws[c], moments, natural[c], fits[i], shifts[i])
        found[i] = _best_polynomial(sp, heads, auto, size, costs, exact_cost, probe)
    return found


@dataclass(frozen=True)
class _Probe:
    """A head's drawn rows, and the polynomials that are held against them."""

    draw: Draw
    moments: _Moments
    natural: float
    coefficients: list[list[float] | None]
    shift: tuple[Floats, Floats] | None


def _best_polynomial(
    sp: Space, heads: Heads, auto: Auto, size: _Size, costs: Sequence[float], exact_cost: float, probe: _Probe
) -> _Found:
    draw, moments = probe.draw, probe.moments
    out, dq = moments.exact()
    if dq is not None:
        # Rounding is all that such a gradient has: no engine but the exact one errs as that does.
        epsilon = sp.xp.finfo(heads.q.dtype).eps
        if float(np.linalg.norm(dq)) <= _ROUNDING * epsilon * probe.natural * float(np.linalg.norm(moments.dout)):
            return _Found("the gradients of queries vanish")
    within = (_KEYS_ROOM if auto.gradients else 1) * auto.tol
    cheap = [auto.gradients and cost <= _CHEAP * exact_cost for cost in costs] + [False]
    tried, best, least = [], None, math.inf
    for degree in range(1, len(costs) + 1):
        a = probe.coefficients[degree - 1]
        got = None if a is None else moments.polynomial(a)
        if a is None or got is None:
            continue
        error = _expected(draw.compare(out, got[0]))
        if dq is not None and got[1] is not None:
            error = max(error, _expected(draw.compare(dq, got[1])))
        tried.append(f"{degree}: {short(error)}")
        # The gradients of keys are not known yet: they are given some room, and more where that costs little.
        if error <= within and (best is None or (cheap[degree - 1] and error < least)):
            best, least = _polynomial(degree, "fitted" if size.strict else a, probe.shift), error
        if least <= (_ROOM * auto.tol if cheap[degree] else within):
            break
    if best is None:
        return _Found(f"errors of polynomials by degree are {', '.join(tried)}")
    return _Found(engine=best, error=least)


def _expected(error: ErrorEstimate) -> float:
    # Between the estimate and the end of its interval: an engine that is chosen too easily costs its time.
    return math.sqrt(error.relative * error.high)


def _polynomial(degree: int, coefficients: Any, shift: tuple[Floats, Floats] | None) -> Polynomial:
    by = "none" if shift is None else (shift[0].tolist(), shift[1].tolist())
    return Polynomial(degree, coefficients, shift=by, window=WINDOW)


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


def _shifts(sp: Space, heads: Heads) -> list[tuple[Floats, Floats] | None]:
    """The means of each head's queries and keys, in its dtype, where subtracting them makes scores smaller."""
    sums = sp.host(sp.xp.stack([_sums(sp, heads.q), _sums(sp, heads.k, live_keys(sp, heads))]))
    number = np.maximum(sums[..., -1], 1)
    mean = sums[..., :-2] / number[..., None]
    large = np.sum(mean**2, axis=-1) > _SMALL_MEAN**2 * sums[..., -2] / number
    query, key = _rounded(sp, heads, mean)
    return [(query[i], key[i]) if large[:, i].any() else None for i in range(heads.count)]


def _rounded(sp: Space, heads: Heads, x: Floats) -> Floats:
    """As the pass will have it."""
    single = sp.xp.finfo(heads.q.dtype).bits == 32
    return x.astype(np.float32 if single else np.float64).astype(np.float64)


def _spreads(sp: Space, heads: Heads) -> list[float]:
    """The size of each head's values less their mean, relative to their size, of keys that no bias removes."""
    of_heads = sp.host(_sums(sp, heads.v, live_keys(sp, heads)))
    sums, squares, number = of_heads[:, :-2], of_heads[:, -2], of_heads[:, -1]
    return np.sqrt(np.maximum(squares - np.sum(sums**2, axis=1) / number, 0) / squares).tolist()


def _fit(
    tokens: Tokens, heads: Heads, degree: int, shift: tuple[Floats, Floats] | None
) -> tuple[list[list[float] | None] | None, float]:
    """Coefficients of each degree, and how far weights by the last are off; None where scores are too large."""
    query, key = ([], []) if shift is None else (shift[0].tolist(), shift[1].tolist())
    try:
        return core.fitted_polynomials(
            tokens.q,
            tokens.k,
            tokens.key_bias,
            degree=degree,
            query_shift=query,
            key_shift=key,
            positions=tokens.positions,
            causal=heads.causal,
            scale=heads.scale,
        )
    except LingradError:
        return None, math.inf


def _landmarks(
    tokens: Tokens, heads: Heads, auto: Auto, strict: bool, ranks: Sequence[int], head: int
) -> tuple[tuple[Landmark, float] | None, str]:
    """The fewest landmarks that are well within the tolerance on a sample, and their error; or why there are none."""
    found, reason = core.landmark_candidates(
        tokens.q,
        tokens.k,
        tokens.v,
        tokens.key_bias,
        tol=auto.tol,
        gradients=auto.gradients,
        strict=strict,
        seed=auto.seed,
        ranks=ranks,
        causal=heads.causal,
        scale=heads.scale,
        head=head,
    )
    if found is None:
        return None, reason
    rank, constants, error = found
    return (Landmark(rank, auto.seed, None if constants is None else LandmarkConstants(**constants)), error), ""


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


class _Moments:
    """Those of one head's rows, ``(3 + degree, rows, width)``, on the host."""

    def __init__(self, sums: Floats, size: _Size, scale: float, dout: Floats | None) -> None:
        self.near, self.far_exact, self.powers = sums[0], sums[1], sums[2:]
        self.size, self.scale = size, scale
        self.dout = np.zeros((0, size.dv)) if dout is None else dout[: sums.shape[1]]

    def exact(self) -> tuple[Floats, Floats | None]:
        """The exact rows of out, and of dq."""
        return self._rows(self.near + self.far_exact)

    def polynomial(self, a: Sequence[float]) -> tuple[Floats, Floats | None] | None:
        """The same by a polynomial beyond the near keys; None where a denominator is not positive."""
        sums = self.near + np.tensordot(np.array(a), self.powers[: len(a)], axes=1)
        return self._rows(sums) if np.all(sums[:, 0] > 0) else None

    def _rows(self, sums: Floats) -> tuple[Floats, Floats | None]:
        d, dv = self.size.d, self.size.dv
        sums = sums / sums[:, :1]
        out = sums[:, 1 : 1 + dv]
        if not len(self.dout):
            return out, None
        delta = np.sum(self.dout * out, axis=1, keepdims=True)
        return out, self.scale * (sums[:, 1 + dv + d :] - delta * sums[:, 1 + dv : 1 + dv + d])


def short(x: float) -> str:
    """A number in two digits."""
    return scientific(x, 1)
