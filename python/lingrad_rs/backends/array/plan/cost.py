"""What engines cost on a device: the model that `rates` and sizes go into."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .... import _lingrad_rs as core
from ....spec.engines import Auto
from ..device import Space
from ..linear.scan import BLOCK, Near, near_start
from ..problem.heads import Heads
from .rates import Rates, host_flops, rates_of

__all__ = ["Size"]

# Numbers that exact attention moves for a pair, beside those of the exponentials: scores are written, weights read; in
# the backward pass scores and dout.v are written and read, f and dS written, and read by three products.
_MOVED_FORWARD = 2
_MOVED_BACKWARD = 7
# Operations on arrays of a forward pass, and of a backward one: exact, low-rank.
_CALLS = {"exact": (12, 20), "low rank": (40, 120)}


@dataclass(frozen=True)
class Size:
    """The sizes of a head, and the rates, that its times depend on; `seconds` of each engine."""

    n: int
    m: int
    d: int
    d_v: int
    causal: bool
    gradients: bool
    strict: bool
    rates: Rates
    wide_rates: Rates
    numbers: int

    @staticmethod
    def of(sp: Space, heads: Heads, auto: Auto) -> Size:
        """Those of heads."""
        strict = heads.causal and auto.strict_causal
        rates = rates_of(sp, heads.q.dtype), rates_of(sp, sp.xp.float64)
        return Size(*heads.sizes, heads.causal, auto.gradients, strict, *rates, sp.numbers)

    @property
    def pairs(self) -> float:
        """Of a query and a key that it sees."""
        return self.n * self.m / (2 if self.causal else 1)

    def _exact_pairs(self, pairs: float) -> float:
        flops, exps, moved = 2 * (self.d + self.d_v), 1, _MOVED_FORWARD
        if self.gradients:
            flops, exps, moved = flops + 2 * (3 * self.d + 2 * self.d_v), 2, moved + _MOVED_BACKWARD
        return self.rates.seconds(flops * pairs, exps * pairs, moved * pairs)

    def _calls(self, kind: str) -> float:
        forward, backward = _CALLS[kind]
        return self.rates.seconds(0, 0, 0, forward + (backward if self.gradients else 0))

    def exact(self) -> float:
        """Seconds of exact attention."""
        return self._exact_pairs(self.pairs) + self._calls("exact") * max(1.0, self.pairs / self.numbers)

    def near_start(self, i: int) -> int:
        """The first token near query ``i`` under a causal mask."""
        return near_start(Near(core.WINDOW, self.strict), i)

    def _near(self) -> float:
        """The near pairs of a low-rank engine."""
        if not self.causal:
            return 0.0
        last = self.n - 1
        span = max(last - self.near_start(last) - core.WINDOW, 0) / 2
        if self.strict:
            span += core.PREFIX / 2 * min(core.PREFIX / max(self.n, 1), 1)
        return self._exact_pairs(min(self.n * (core.WINDOW + span), self.pairs))

    def polynomial(self, degree: int) -> float:
        """Features are written and read once, of a state's tokens, of those that it is applied to, and by gradients."""
        r, potential = (math.comb(self.d + g, g) for g in (degree, degree + 1))
        e = self.d_v + 1
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
        """Seconds of an engine of so many landmarks."""
        e, d = self.d_v + 1, self.d
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
        return 3 * flops / host_flops()

    def moments(self, degree: int) -> float:
        """Seconds to measure the errors of polynomials up to a degree."""
        one = 2 * (self.d_v + 1) + (4 * self.d if self.gradients else 0)
        flops = 2 * (self.d + self.d_v) + one * (degree + 2)
        pairs = core.rows_to_plan(self.n) * self.m
        return self.wide_rates.seconds(flops * pairs, pairs, 4 * (degree + 3) * pairs)
