"""What a tolerance costs and keeps, beside exact attention, over the distributions of the tests.

Two cases where low rank pays, with planning and with a plan that is used again; then every distribution: the engine that
was chosen, the largest error, and the time over that of the exact engine. Calls take turns within every round, and
medians are printed. Errors are relative to exact attention in float64.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import lingrad_rs as lg
from lingrad_rs import _bench
from lingrad_rs._bench import interleaved, relative_error

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from distributions import DISTRIBUTIONS  # noqa: E402 (from the tests)

Array = NDArray[np.float32]
SAMPLED = 256
PAYS = {"near a curve, d 64, score std 1": False, "isotropic, d 16, score std 0.3": True}


def drawn(name: str, n: int) -> tuple[Array, Array, Array, Array]:
    rng = np.random.default_rng(1)
    q, k, v = DISTRIBUTIONS[name](rng, n)
    return tuple(x.astype(np.float32) for x in (q, k, v, rng.standard_normal(v.shape)))  # type: ignore[return-value]


def call(attend: Callable[[], object], dout: Array, gradients: bool) -> Callable[[], object]:
    """The results of a call, and of its pullback where there are gradients."""

    def run() -> object:
        if not gradients:
            return (attend(),)
        out, vjp = attend()  # type: ignore[misc]
        return (out, *vjp(dout))

    return run


def pays(n: int, tol: float, rounds: int) -> None:
    """Prints the cases where low rank pays, without a mask."""
    print(f"n = {n:,}, tolerance {tol:g}, no mask:\n")
    print("| distribution | results | engine | exact | with planning | plan used again | error |")
    print("|---|---|---|---|---|---|---|")
    for name, gradients in PAYS.items():
        q, k, v, dout = drawn(name, n)
        attend = lg.attention_vjp if gradients else lg.attention
        plan = lg.plan_attention(q, k, v, tol=tol, gradients=gradients)
        again = plan.attention_vjp if gradients else plan.attention
        calls = {
            "exact": call(lambda: attend(q, k, v, engine=lg.Exact()), dout, gradients),
            "planned": call(lambda: attend(q, k, v, tol=tol), dout, gradients),
            "again": call(lambda: again(q, k, v), dout, gradients),
        }
        times = {name: t.median for name, t in interleaved(calls, rounds).items()}
        exact, got = calls["exact"](), calls["again"]()
        error = max(relative_error(x, y) or 0.0 for x, y in zip(got, exact, strict=True))  # type: ignore[call-overload]
        ratio = {name: f"{1e3 * t:,.0f} ms, {times['exact'] / t:.1f} times as fast" for name, t in times.items()}
        print(
            f"| {name} | {'out, dq, dk, dv' if gradients else 'out'} | {plan.heads[0].engine_name} "
            f"| {1e3 * times['exact']:,.0f} ms | {ratio['planned']} | {ratio['again']} | {error:.1e} |",
            flush=True,
        )
    print()


def sweep(n: int, tol: float, rounds: int) -> None:
    """Prints every distribution, and the worst time over that of the exact engine."""
    print(f"n = {n:,}, tolerance {tol:g} for out, dq, dk and dv:\n")
    print("| distribution | mask | engine | time over exact | largest error |")
    print("|---|---|---|---|---|")
    worst = (0.0, "")
    for name in DISTRIBUTIONS:
        q, k, v, dout = drawn(name, n)
        for causal in (False, True):
            options = {"causal": causal}
            calls = {
                "exact": call(lambda o=options: lg.attention_vjp(q, k, v, engine=lg.Exact(), **o), dout, True),
                "tol": call(lambda o=options: lg.attention_vjp(q, k, v, tol=tol, **o), dout, True),
            }
            times = interleaved(calls, rounds)
            ratio = times["tol"].median / times["exact"].median
            wide = [x.astype(np.float64) for x in (q, k, v, dout)]
            want = call(lambda o=options: lg.attention_vjp(*wide[:3], engine=lg.Exact(), **o), wide[3], True)()
            out, vjp = lg.attention_vjp(q, k, v, tol=tol, causal=causal)
            got = (out, *vjp(dout))
            head = vjp.heads[0]
            error = max(relative_error(x, y) or 0.0 for x, y in zip(got, want, strict=True))  # type: ignore[call-overload]
            mask = "causal" if causal else "full"
            print(f"| {name} | {mask} | {head.engine_name} | {ratio:.2f} | {error:.1e} |", flush=True)
            worst = max(worst, (ratio, f"{name}, {mask}"))
    print(f"\nThe most time over exact: {worst[0]:.2f} ({worst[1]}).")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tol", type=float, default=1e-2)
    parser.add_argument("--n", type=int, default=65536, help="tokens where low rank pays")
    parser.add_argument("--sweep", type=int, default=8192, help="tokens of the sweep")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    print(f"{_bench.machine()}\n")
    pays(args.n, args.tol, args.rounds)
    sweep(args.sweep, args.tol, args.rounds)


if __name__ == "__main__":
    main()
