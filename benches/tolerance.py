"""What a tolerance costs and keeps, beside exact attention, over the distributions of the tests.

Two cases where low rank pays, with planning and with a plan that is used again; then every distribution: the engine
that was chosen, the largest error, and the time over that of the exact engine, with the median and the most of those
that came out as exact. Calls take turns within every round, and
medians are printed. Errors are relative to exact attention in float64.

``--rare-tokens N`` counts, over N cases of each family of heads of which a few tokens carry much, how many results of
low-rank engines were over their tolerance, and how many above the upper end of the interval of their measured error.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import lingrad_rs as lg
from lingrad_rs.backends import select
from lingrad_rs.cli import timing
from lingrad_rs.cli.timing import interleaved, relative_error

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from distributions import DISTRIBUTIONS
from rare_tokens import FAMILIES, judge

Array = NDArray[Any]
Results = tuple[Array, ...]
PAYS = {"near a curve, d 64, score std 1": False, "isotropic, d 16, score std 0.3": True}


def drawn(name: str, n: int) -> tuple[Array, ...]:
    rng = np.random.default_rng(1)
    q, k, v = DISTRIBUTIONS[name](rng, n)
    return tuple(x.astype(np.float32) for x in (q, k, v, rng.standard_normal(v.shape)))


def call(
    attend: Callable[..., object], arrays: tuple[Array, ...], gradients: bool, **options: object
) -> Callable[[], Results]:
    """The results of ``attend(q, k, v, **options)``, and of its pullback where there are gradients."""
    *inputs, dout = arrays

    def run() -> Results:
        result = attend(*inputs, **options)
        if not gradients:
            return (result,)
        out, vjp = result
        return (out, *vjp(dout))

    return run


def worst(got: Results, exact: Results) -> float:
    return max(relative_error(x, y) or 0.0 for x, y in zip(got, exact, strict=True))


def pays(n: int, tol: float, rounds: int) -> None:
    """Prints the cases where low rank pays, without a mask."""
    print(f"n = {n:,}, tolerance {tol:g}, no mask:\n")
    print("| distribution | results | engine | exact | with planning | plan used again | error |")
    print("|---|---|---|---|---|---|---|")
    for name, gradients in PAYS.items():
        arrays = drawn(name, n)
        attend = lg.attention_vjp if gradients else lg.attention
        plan = lg.plan_attention(*arrays[:3], tol=tol, gradients=gradients)
        again = plan.attention_vjp if gradients else plan.attention
        calls = {
            "exact": call(attend, arrays, gradients, engine=lg.Exact()),
            "planned": call(attend, arrays, gradients, tol=tol),
            "again": call(again, arrays, gradients),
        }
        times = {name: t.median for name, t in interleaved(calls, rounds).items()}
        error = worst(calls["again"](), calls["exact"]())
        ratio = {name: f"{1e3 * t:,.0f} ms, {times['exact'] / t:.1f} times as fast" for name, t in times.items()}
        print(
            f"| {name} | {'out, dq, dk, dv' if gradients else 'out'} | {plan.heads[0].engine_name} "
            f"| {1e3 * times['exact']:,.0f} ms | {ratio['planned']} | {ratio['again']} | {error:.1e} |",
            flush=True,
        )
    print()


def sweep(n: int, tol: float, rounds: int) -> None:
    """Prints every distribution, and the time over that of the exact engine where that came out."""
    print(f"n = {n:,}, tolerance {tol:g} for out, dq, dk and dv:\n")
    print("| distribution | mask | engine | time over exact | largest error |")
    print("|---|---|---|---|---|")
    exact_chosen: list[tuple[float, str]] = []
    for name in DISTRIBUTIONS:
        arrays = drawn(name, n)
        for causal in (False, True):
            calls = {
                "exact": call(lg.attention_vjp, arrays, True, engine=lg.Exact(), causal=causal),
                "tol": call(lg.attention_vjp, arrays, True, tol=tol, causal=causal),
            }
            times = interleaved(calls, rounds)
            ratio = times["tol"].median / times["exact"].median
            wide = tuple(x.astype(np.float64) for x in arrays)
            exact = call(lg.attention_vjp, wide, True, engine=lg.Exact(), causal=causal)()
            out, vjp = lg.attention_vjp(*arrays[:3], tol=tol, causal=causal)
            error = worst((out, *vjp(arrays[3])), exact)
            head = vjp.heads[0]
            mask = "causal" if causal else "full"
            print(f"| {name} | {mask} | {head.engine_name} | {ratio:.2f} | {error:.1e} |", flush=True)
            if head.engine == lg.Exact():
                exact_chosen.append((ratio, f"{name}, {mask}"))
    most, where = max(exact_chosen)
    median, count = np.median([ratio for ratio, _ in exact_chosen]), len(exact_chosen)
    print(f"\nTime over exact in the {count} cases that came out as exact: {median:.2f} in the median,")
    print(f"at most {most:.2f} ({where}).")


def rare_tokens(cases: int, seed: int, n: int, array_path: bool) -> None:
    """Prints the counts of every family, for results within a tolerance and for those of engines that nobody chose."""
    from conftest import GPU_NUMPY, RUST  # which need the tests' packages

    backend = GPU_NUMPY if array_path else RUST
    select.KINDS[:0] = backend.kinds
    engines = (lg.Polynomial(degree=2), lg.Polynomial(degree=1, gradient="consistent"), lg.Landmark(rank=64))
    print(f"n = {n:,}, {cases} cases of each family, seeds from {seed} on, {backend.name}:\n")
    print("| family | results within a tolerance | over it | above | results of any engine | above |")
    print("|---|---|---|---|---|---|")
    total = np.zeros(5, int)
    for family in FAMILIES:
        counts = np.zeros(5, int)
        for case in range(seed, seed + cases):
            tol, results = judge(backend, family, case, n)
            counts[:3] += len(results), sum(x.error > tol for x in results), sum(x.error > x.high for x in results)
            _, results = judge(backend, family, case, n, engine=engines[case % len(engines)])
            counts[3:] += len(results), sum(x.error > x.high for x in results)
        print(f"| {family} | {' | '.join(map(str, counts))} |", flush=True)
        total += counts
    print(f"| all | {' | '.join(map(str, total))} |\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tol", type=float, default=1e-2)
    parser.add_argument("--n", type=int, default=65536, help="tokens where low rank pays")
    parser.add_argument("--sweep", type=int, default=8192, help="tokens of the sweep")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--rare-tokens", type=int, metavar="CASES", help="count, instead, where a few tokens carry much"
    )
    parser.add_argument("--rare-n", type=int, default=4096, help="tokens of those")
    parser.add_argument("--seed", type=int, default=0, help="the first seed of those")
    parser.add_argument("--array-path", action="store_true", help="on the GPU's path, under NumPy")
    args = parser.parse_args()
    print(f"{timing.machine()}\n")
    if args.rare_tokens:
        rare_tokens(args.rare_tokens, args.seed, args.rare_n, args.array_path)
        return
    pays(args.n, args.tol, args.rounds)
    sweep(args.sweep, args.tol, args.rounds)


if __name__ == "__main__":
    main()
