"""Prints the README's tables: times and errors of the engines against exact attention, on this machine.

Engines take turns within every round, and medians over the rounds are printed, so that a change in the machine's speed
meets all alike.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

import lingrad_rs as lg

FITTED = "fitted"
# (n, d, causal, engines)
CASES = [
    (
        40_960,
        12,
        False,
        {
            "degree 2, closed form": lg.Polynomial(coefficients=FITTED),
            "degree 2, consistent": lg.Polynomial(gradient="consistent"),
        },
    ),
    (
        40_960,
        16,
        True,
        {
            "degree 2, closed form": lg.Polynomial(coefficients=FITTED),
            "degree 2, consistent": lg.Polynomial(gradient="consistent"),
        },
    ),
    (16_384, 64, True, {"degree 2, consistent": lg.Polynomial(gradient="consistent")}),
    (16_384, 16, False, {"degree 3, closed form": lg.Polynomial(degree=3)}),
]


def machine() -> str:
    """The processor, the vector instructions and the threads in use."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    info = lg.build_info()
    return f"{model}, {info['threads']} threads, {info['simd']}, lingrad_rs {lg.__version__}"


def medians(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """The median time of each call, in seconds; the calls take turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(t) for name, t in times.items()}


def relative_error(x: np.ndarray, exact: np.ndarray) -> float:
    """Relative Frobenius error, computed in float64."""
    wide = exact.astype(np.float64)
    return float(np.linalg.norm(x - wide) / np.linalg.norm(wide))


def attention_table(rounds: int) -> None:
    """One head, float32, scores of standard deviation ``1/sqrt(d)``."""
    print("| n | d | causal | engine | forward | forward + backward | against exact | out | dq | dk | dv |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for n, d, causal, engines in CASES:
        rng = np.random.default_rng(0)
        q, k = (rng.standard_normal((n, d), np.float32) / np.float32(d**0.25) for _ in range(2))
        v, dout = (rng.standard_normal((n, d), np.float32) for _ in range(2))
        both = {"exact": lg.Exact()} | engines

        def forward(engine: lg.Engine) -> np.ndarray:
            return lg.attention(q, k, v, engine=engine, causal=causal)  # noqa: B023

        def gradients(engine: lg.Engine) -> tuple[np.ndarray, ...]:
            out, vjp = lg.attention_vjp(q, k, v, engine=engine, causal=causal)  # noqa: B023
            return out, *vjp(dout)  # noqa: B023

        exact = gradients(both["exact"])
        errors = {
            name: [relative_error(a, b) for a, b in zip(gradients(e), exact, strict=True)] for name, e in both.items()
        }
        one = medians({name: lambda e=e: forward(e) for name, e in both.items()}, rounds)
        two = medians({name: lambda e=e: gradients(e) for name, e in both.items()}, rounds)
        for name in both:
            texts = ["exact"] * 4 if name == "exact" else [f"{e:.1e}" for e in errors[name]]
            ratio = "1" if name == "exact" else f"{two['exact'] / two[name]:.0f}x"
            times = f"{one[name] * 1e3:.1f} ms | {two[name] * 1e3:.1f} ms"
            causality = "yes" if causal else "no"
            print(f"| {n:,} | {d} | {causality} | {name} | {times} | {ratio} | {' | '.join(texts)} |", flush=True)


def model_table(rounds: int) -> None:
    """The whole model of ``lingrad grad``: loss and the gradient of every weight."""
    print("| tokens | exact | degree 2, fitted | speed-up | worst gradient error |")
    print("|---|---|---|---|---|")
    rng = np.random.default_rng(0)
    for n in (4096, 16_384):
        tokens = rng.integers(0, 256, n + 1)
        config = {"n_layers": 4, "d_model": 64, "n_heads": 4, "d_ff": 256, "vocab_size": 256}
        models = {
            "exact": lg.Transformer(lg.TransformerConfig(**config, engine=lg.Exact())),
            "fitted": lg.Transformer(lg.TransformerConfig(**config, engine=lg.Polynomial(coefficients=FITTED))),
        }

        def gradients(model: lg.Transformer, text: np.ndarray = tokens) -> dict[str, np.ndarray]:
            return model.value_and_grad(text[:-1], text[1:])[1]

        calls = {name: lambda m=m: gradients(m) for name, m in models.items()}
        exact, fitted = calls["exact"](), calls["fitted"]()
        worst = max(relative_error(fitted[name], exact[name]) for name in exact)
        t = medians(calls, rounds)
        print(
            f"| {n:,} | {t['exact']:.2f} s | {t['fitted']:.2f} s | {t['exact'] / t['fitted']:.1f}x | {worst:.1e} |",
            flush=True,
        )


def main() -> None:
    """Prints both tables."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    print(machine(), "\n")
    attention_table(rounds)
    print()
    model_table(rounds)


if __name__ == "__main__":
    main()
