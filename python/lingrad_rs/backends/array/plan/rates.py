"""What a device does in a second, measured once; the core has its own for the host."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..device import Space

__all__ = ["Rates", "host_flops", "rates_of", "set_rates"]

Array = Any

# Sides of the square arrays that rates are measured with, and the seconds that suffice.
_SIDES = (256, 4096)
_LONG_ENOUGH = 1e-3


@dataclass(frozen=True)
class Rates:
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

    rates: Rates
    side: int


_measured: dict[tuple[str, str, str], _Measured] = {}
_given: tuple[Rates, float] | None = None


def set_rates(rates: Rates | None, flops: float = 0.0) -> None:
    """Plan by these rates, and these of the host, on every device: plans that do not depend on the machine.

    None: by measured ones again.
    """
    global _given
    _given = None if rates is None else (rates, flops)


def rates_of(sp: Space, dtype: Any) -> Rates:
    """Those of the device for a dtype: measured once, and kept until there is room for larger arrays that tell more."""
    if _given is not None:
        return _given[0]
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
    rates = Rates(
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


def host_flops() -> float:
    """Additions and multiplications a second in float64 of the host, which landmarks are drawn on."""
    return _measured_host_flops() if _given is None else _given[1]


@functools.cache
def _measured_host_flops() -> float:
    x = np.full((256, 256), 0.5)
    return 2 * 256**3 / _seconds(lambda: x @ x)
