"""Times and errors of lingrad_rs beside other ways to compute attention and its gradient, on this machine.

Peers: PyTorch's fused kernel (SDPA); the method of the paper's authors, with full tensor powers as features, written
from its description; random features of the softmax kernel, as in Performers (arXiv 2009.14794); both of these in
PyTorch with its own gradients; and softmax in plain NumPy. Those that need PyTorch are left out where it is missing.

Methods take turns within every round, and medians are printed.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import itertools
import math
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

import lingrad_rs as lg
from lingrad_rs.cli import timing
from lingrad_rs.cli.timing import Case, Method, Results, interleaved, of_engine, relative_error

Array = NDArray[np.float32]
RANDOM_FEATURES = 256
NUMPY_ROWS = 1024


def numpy_softmax() -> Method:
    """Softmax attention by blocks of queries, forward and backward."""

    def blocks(q: Array, k: Array, causal: bool) -> Iterator[tuple[slice, Array]]:
        for start in range(0, len(q), NUMPY_ROWS):
            rows = slice(start, start + NUMPY_ROWS)
            s = q[rows] @ k.T / np.float32(math.sqrt(q.shape[1]))
            if causal:
                s[np.arange(len(k)) > np.arange(len(q))[rows, None]] = -np.inf
            s -= s.max(axis=1, keepdims=True)
            np.exp(s, out=s)
            s /= s.sum(axis=1, keepdims=True)
            yield rows, s

    def prepare(
        q: Array, k: Array, v: Array, dout: Array, causal: bool
    ) -> tuple[Callable[[], object], Callable[[], Results]]:
        def forward() -> Array:
            return np.stack(
                [
                    np.concatenate([f @ v_ for _, f in blocks(q_, k_, causal)])
                    for q_, k_, v_ in zip(q, k, v, strict=True)
                ]
            )

        def both() -> Results:
            out, dq, dk, dv = (np.zeros_like(x) for x in (v, q, k, v))
            scale = np.float32(1 / math.sqrt(q.shape[-1]))
            for h in range(len(q)):
                for rows, f in blocks(q[h], k[h], causal):
                    out[h, rows] = f @ v[h]
                    dv[h] += f.T @ dout[h, rows]
                    ds = dout[h, rows] @ v[h].T
                    ds -= (dout[h, rows] * out[h, rows]).sum(axis=1, keepdims=True)
                    ds *= f
                    dq[h, rows] = scale * (ds @ k[h])
                    dk[h] += scale * (ds.T @ q[h, rows])
            return out, dq, dk, dv

        return forward, both

    return Method("NumPy softmax", prepare, 2)


def torch_features(name: str, features: Callable[..., object]) -> Method:
    """``D^-1 phi(q) phi(k)^T v`` without a mask, in PyTorch with its own gradients."""
    import torch

    def prepare(
        q: Array, k: Array, v: Array, dout: Array, causal: bool
    ) -> tuple[Callable[[], object], Callable[[], Results]]:
        torch.set_num_threads(lg.get_num_threads())
        leaves = [torch.from_numpy(x).requires_grad_() for x in (q, k, v)]
        upstream = torch.from_numpy(dout)

        def attend(q: object, k: object, v: object) -> object:
            phi_q, phi_k = features(q), features(k)
            numerators = phi_q @ (phi_k.transpose(1, 2) @ v)
            return numerators / (phi_q @ phi_k.sum(1, keepdim=True).transpose(1, 2))

        def forward() -> object:
            with torch.no_grad():
                return attend(*leaves)

        def both() -> Results:
            for leaf in leaves:
                leaf.grad = None
            out = attend(*leaves)
            out.backward(upstream)
            return tuple(x.detach().numpy() for x in (out, *(leaf.grad for leaf in leaves)))

        return forward, both

    return Method(name, prepare, 1)


def tensor_powers(x: object) -> object:
    """``1, x, x (x) x / sqrt(2)`` of ``x / d^(1/4)``: ``1 + d + d^2`` features, each product twice."""
    import torch

    x = x / x.shape[-1] ** 0.25
    pairs = (x[..., :, None] * x[..., None, :]).flatten(-2)
    return torch.cat([torch.ones_like(x[..., :1]), x, pairs / math.sqrt(2)], dim=-1)


def random_features(x: object) -> object:
    """``exp(w.x - |x|^2 / 2)`` of ``x / d^(1/4)``, for fixed normal ``w``: positive random features."""
    import torch

    x = x / x.shape[-1] ** 0.25
    w = torch.randn(x.shape[-1], RANDOM_FEATURES, generator=torch.Generator().manual_seed(0))
    return torch.exp(x @ w - (x * x).sum(-1, keepdim=True) / 2) / math.sqrt(RANDOM_FEATURES)


def methods(case: Case, low_rank: bool) -> list[Method]:
    """Every method that has to do with a case."""
    own = [of_engine("**exact**", lg.Exact())]
    peers = [numpy_softmax()]
    sdpa = timing.torch_sdpa()
    peers += [] if sdpa is None else [sdpa]
    if low_rank:
        own += [
            of_engine("**degree 2, consistent**", lg.Polynomial(gradient="consistent")),
            of_engine("**degree 2, closed form**", lg.Polynomial()),
            of_engine("**degree 2, fitted**", lg.Polynomial(coefficients="fitted")),
        ]
        if sdpa is not None and not case.causal:
            peers += [
                torch_features("tensor powers, degree 2", tensor_powers),
                torch_features(f"{RANDOM_FEATURES} random features", random_features),
            ]
    return own + peers


# What is compared, and whether low-rank methods take part.
CASES = [
    (Case(n=40_960, d=12, heads=1, causal=False), True),
    (Case(n=40_960, d=16, heads=1, causal=True), True),
    (Case(n=8192, d=16, heads=1, causal=False), False),
    (Case(n=8192, d=16, heads=1, causal=True), False),
    (Case(n=8192, d=64, heads=1, causal=False), False),
    (Case(n=8192, d=64, heads=1, causal=True), False),
]
SCORE_STD = 0.3


def attention_table(rounds: int) -> None:
    """Every method on every case: float32, and errors against exact attention in float64."""
    print("| n | d | causal | method | forward | forward + backward | out | worst of dq, dk, dv |")
    print("|---|---|---|---|---|---|---|---|")
    for case, low_rank in CASES:
        q, k, v, dout = timing.inputs(case, SCORE_STD, "float32")
        exact, vjp = lg.attention_vjp(*(x.astype(np.float64) for x in (q, k, v)), engine=lg.Exact(), causal=case.causal)
        exact_grads = vjp(dout.astype(np.float64))
        calls = {method.name: method.prepare(q, k, v, dout, case.causal) for method in methods(case, low_rank)}
        errors = {}
        for name, (_, both) in calls.items():
            out, *grads = both()
            worst = max(relative_error(x, y) for x, y in zip(grads, exact_grads, strict=True))
            errors[name] = f"{relative_error(out, exact):.1e} | {worst:.1e}"
        # One after the other, so that a peer's allocator is in the same state before both.
        passes = {(name, i): call for name, both in calls.items() for i, call in enumerate(both)}
        seconds = {name: times.median for name, times in interleaved(passes, rounds).items()}
        for name in calls:
            times = " | ".join(f"{seconds[name, i] * 1e3:,.1f} ms" for i in range(2))
            causal = "yes" if case.causal else "no"
            print(f"| {case.n:,} | {case.d} | {causal} | {name} | {times} | {errors[name]} |", flush=True)


def scaling_table(rounds: int) -> None:
    """Forward and backward of degree 2 over the number of tokens: causal, d = 16, one head, float32."""
    sizes = [32_768, 131_072, 524_288]
    print("| gradient | " + " | ".join(f"n = {n:,}" for n in sizes) + " |")
    print("|---" * (len(sizes) + 1) + "|")
    for gradient in ("consistent", "closed_form"):
        calls = {}
        for n in sizes:
            arrays = timing.inputs(Case(n=n, d=16, heads=1, causal=True), SCORE_STD, "float32")
            _, both = of_engine("", lg.Polynomial(gradient=gradient)).prepare(*arrays, causal=True)
            both()
            calls[str(n)] = both
        times = [t.median for t in interleaved(calls, rounds).values()]
        ratios = ["", *(f", {b / a:.2f} times as long" for a, b in itertools.pairwise(times))]
        cells = (f"{t * 1e3:,.0f} ms{ratio}" for t, ratio in zip(times, ratios, strict=True))
        print(f"| {gradient.replace('_', ' ')} | {' | '.join(cells)} |", flush=True)


def model_table(rounds: int) -> None:
    """The whole model of ``lingrad grad``: loss and the gradient of every weight."""
    print("| tokens | exact | degree 2, fitted | speed-up | worst gradient error |")
    print("|---|---|---|---|---|")
    rng = np.random.default_rng(0)
    for n in (4096, 16_384):
        text = rng.integers(0, 256, n + 1)
        config = {"n_layers": 4, "d_model": 64, "n_heads": 4, "d_ff": 256, "vocab_size": 256}
        models = {
            "exact": lg.Transformer(lg.TransformerConfig(**config, engine=lg.Exact())),
            "fitted": lg.Transformer(lg.TransformerConfig(**config, engine=lg.Polynomial(coefficients="fitted"))),
        }

        def gradients(model: lg.Transformer, text: NDArray[np.int64] = text) -> dict[str, Array]:
            return model.value_and_grad(text[:-1], text[1:])[1]

        calls = {name: functools.partial(gradients, model) for name, model in models.items()}
        exact, fitted = calls["exact"](), calls["fitted"]()
        worst = max(relative_error(fitted[name], exact[name]) for name in exact)
        t = {name: times.median for name, times in interleaved(calls, rounds).items()}
        print(
            f"| {n:,} | {t['exact']:.2f} s | {t['fitted']:.2f} s | {t['exact'] / t['fitted']:.1f}x | {worst:.1e} |",
            flush=True,
        )


def main() -> None:
    """Prints the README's tables."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    print(timing.machine())
    if importlib.util.find_spec("torch") is None:
        print("PyTorch is not installed: its kernel, tensor powers and random features are left out.")
    for table in (attention_table, scaling_table, model_table):
        print()
        table(rounds)


if __name__ == "__main__":
    main()
