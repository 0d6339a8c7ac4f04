"""The theorem of the paper as a figure: gradients of attention in time n^(1+o(1)) with an error of at most 1/n.

As in the paper (arXiv 2408.13233), heads are d = log2 n wide and scores are q.k/d. Rows of q and k have one norm, so
that no score is beyond a bound R that does not depend on n. The degree is the smallest at which out is proven to err by
at most max |v| / n in every entry (`Polynomial.from_bound`); the rank C(d + g, g) then grows more slowly than any power
of n. One causal head in float64, all of it through the polynomial; forward and backward are timed together.

The theorem bounds each entry of the error of the gradients. Shown beside that are errors relative to the norms of out,
dq, dk and dv, measured on rows drawn at random and computed exactly. No entry of an error is greater than the norm of
all of it: the upper end of the 95% interval of the relative error, times the norm. The errors are far below 1/n because
few scores come near R, and because random errors cancel in sums.

Powers of n are fitted to the times, and to the work of the backward pass, n d C(d + g + 1, g + 1). While the degree is
constant this is n (log n)^(g + 2), whose exponent falls towards 1 slowly; where it steps up, the time jumps. With the
default R the larger half of the lengths up to 2^20 has one degree, and all of them together have a step.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import lingrad_rs as lg
from lingrad_rs.cli import timing

Array = NDArray[np.float64]
LEAST = 10  # the least log2 n
SAMPLES = 64
PARTS = ("out", "dq", "dk", "dv")
# Turns at each length: as many as fit in so many seconds.
TURN_SECONDS = 5.0
MOST_TURNS = 7


@dataclass(frozen=True)
class Row:
    """What was used and measured at one length; ``entry`` is what no entry of an error is greater than."""

    n: int
    d: int
    degree: int
    rank: int
    seconds: float
    errors: dict[str, float]
    entry: float
    bound: float

    @property
    def gradient(self) -> float:
        """The worst relative error of a gradient."""
        return max(self.errors[part] for part in PARTS[1:])

    @property
    def work(self) -> float:
        """Products of the backward pass, but for a constant factor."""
        return float(self.n * self.d * math.comb(self.d + self.degree + 1, self.degree + 1))


def inputs(n: int, d: int, score_bound: float) -> tuple[Array, Array, Array, Array]:
    """Random ``q, k, v, dout`` with ``|q.k| / d <= score_bound``."""
    rng = np.random.default_rng(n)
    q, k, v, dout = (rng.standard_normal((n, d)) for _ in range(4))
    for x in (q, k):
        x *= math.sqrt(score_bound * d) / np.linalg.norm(x, axis=1, keepdims=True)
    return q, k, v, dout


def measured(n: int, score_bound: float) -> Row:
    """One row: the errors in a first call, which is not timed, and the median time of further ones."""
    d = int(math.log2(n))
    q, k, v, dout = inputs(n, d, score_bound)
    engine = lg.Polynomial.from_bound(1 / n, score_bound, diagonal="polynomial")

    def forward() -> tuple[Array, lg.Pullback]:
        return lg.attention_vjp(q, k, v, engine=engine, causal=True, scale=1 / d)

    out, vjp = forward()
    results = (out, *vjp(dout, samples=SAMPLES))
    estimates = vjp.heads[0].errors
    norms = {part: float(np.linalg.norm(x)) for part, x in zip(PARTS, results, strict=True)}
    del out, vjp, results
    seconds: list[float] = []
    while len(seconds) < MOST_TURNS and sum(seconds) < TURN_SECONDS:
        start = time.perf_counter()
        forward()[1](dout)
        seconds.append(time.perf_counter() - start)
    return Row(
        n=n,
        d=d,
        degree=engine.degree,
        rank=math.comb(d + engine.degree, engine.degree),
        seconds=statistics.median(seconds),
        errors={part: estimates[part].relative for part in PARTS},
        entry=max(estimates[part].high * norms[part] for part in PARTS),
        bound=1 / n,
    )


def power(rows: Sequence[Row], of: Callable[[Row], float]) -> tuple[float, float]:
    """``(e, c)`` of the ``c n^e`` nearest to a quantity of the rows, by logarithms."""
    exponent, constant = np.polyfit(np.log([row.n for row in rows]), np.log([of(row) for row in rows]), 1)
    return float(exponent), float(np.exp(constant))


def larger_half(rows: Sequence[Row]) -> Sequence[Row]:
    """The rows that exponents are fitted to; all, where a half is too few."""
    return rows[len(rows) // 2 :] if len(rows) > 2 else rows


def plot(rows: Sequence[Row], path: Path, title: str) -> None:
    """Writes the figure: time, rank and errors over n."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 5), layout="constrained")
    seconds, rank, error = figure.subplots(1, 3)
    figure.suptitle(title)
    n = [row.n for row in rows]
    half = larger_half(rows)
    exponent, constant = power(half, lambda row: row.seconds)
    work, _ = power(half, lambda row: row.work)
    last = rows[-1]
    seconds.plot(n, [row.seconds for row in rows], "o-", label="measured")
    fitted = f"$n^{{{exponent:.2f}}}$, fitted to the larger half (work: $n^{{{work:.2f}}}$)"
    seconds.plot([row.n for row in half], [constant * row.n**exponent for row in half], "k--", label=fitted)
    quadratic = [last.seconds * (x / last.n) ** 2 for x in n]
    seconds.plot(n, quadratic, ":", color="gray", label="slope of $n^2$")
    for degree in dict.fromkeys(row.degree for row in rows):
        own = [row for row in rows if row.degree == degree]
        rank.plot([row.n for row in own], [row.rank for row in own], "o-", label=f"degree {degree}")
    rank.plot(n, n, ":", color="gray", label="n")
    error.plot(n, [row.bound for row in rows], "k--", label="asked: 1/n")
    error.plot(n, [row.entry for row in rows], "^-", label="largest entry of any error, at most")
    error.plot(n, [row.gradient for row in rows], "s-", label="worst of dq, dk, dv, relative")
    error.plot(n, [row.errors["out"] for row in rows], "o-", label="out, relative")
    labels = {
        seconds: ("seconds, forward and backward", "time"),
        rank: ("C(d + g, g)", "rank"),
        error: ("error", "error"),
    }
    for axes, (label, name) in labels.items():
        axes.set(xlabel="tokens n", ylabel=label, title=name)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.grid(True, which="both", alpha=0.2)
        axes.legend(fontsize="small")
    figure.savefig(path)


def main() -> None:
    """Prints a table over n = 2^10, 2^11, ..., and draws it."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--most", type=int, default=20, help="log2 of the greatest length (default: %(default)s)")
    parser.add_argument("--score-bound", type=float, default=0.0125, help="no score is greater (default: %(default)s)")
    parser.add_argument("--plot", type=Path, help="draw it there (.png or .svg)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    arguments = parser.parse_args()
    if arguments.most <= LEAST:
        parser.error(f"--most is {arguments.most}; expected at least {LEAST + 1}")
    try:
        if arguments.plot is not None:
            timing.check_plot(arguments.plot)
        for exponent in range(LEAST, arguments.most + 1):
            lg.Polynomial.from_bound(2.0**-exponent, arguments.score_bound)
    except lg.ArgumentError as error:
        parser.error(str(error))
    table = sys.stderr if arguments.json else sys.stdout
    print(timing.machine(), file=table)
    print("\n| n | d | degree | rank | time | out | worst of dq, dk, dv | any entry, at most | 1/n |", file=table)
    print("|---" * 9 + "|", file=table)
    rows: list[Row] = []
    for exponent in range(LEAST, arguments.most + 1):
        row = measured(2**exponent, arguments.score_bound)
        rows.append(row)
        errors = " | ".join(f"{x:.1e}" for x in (row.errors["out"], row.gradient, row.entry, row.bound))
        print(
            f"| 2^{exponent} | {row.d} | {row.degree} | {row.rank:,} | {row.seconds:,.3f} s | {errors} |",
            file=table,
            flush=True,
        )
    exponents = {}
    for name, some in (("larger half", larger_half(rows)), ("all", rows)):
        exponents[name] = {
            "time": power(some, lambda row: row.seconds)[0],
            "work": power(some, lambda row: row.work)[0],
        }
    texts = (f"{name}: time n^{e['time']:.2f}, work n^{e['work']:.2f}" for name, e in exponents.items())
    print(f"\nGrowth over the lengths, {'; '.join(texts)}.", file=table)
    if arguments.plot is not None:
        plot(rows, arguments.plot, f"causal, d = log2 n, scores within {arguments.score_bound:g}\n{timing.machine()}")
    if arguments.json:
        result = {
            "machine": timing.machine(),
            "score_bound": arguments.score_bound,
            "rows": [dataclasses.asdict(row) for row in rows],
            "exponents": exponents,
        }
        print(json.dumps(result, allow_nan=False))


if __name__ == "__main__":
    main()
