"""Attention in PyTorch: this library's function beside PyTorch's own, forward and backward, and one query and a cache.

Both run in one process, turn about, on as many threads; a figure is a ratio of medians. It prints the README's table.
"""

import argparse
import statistics
import time

import torch
import torch.nn.functional as F

import lingrad_rs as lg
import lingrad_rs.torch as lgt
from lingrad_rs.torch.tensors import array_of

HEADS = 8
WINDOW = 512


def medians(calls, rounds):
    """The median seconds of each call, made in turn, after one that is not counted."""
    times = [[] for _ in calls]
    for turn in range(rounds + 1):
        for call, own in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            if turn:
                own.append(time.perf_counter() - start)
    return [statistics.median(own) for own in times]


def training(dtype, n, d, window, rounds):
    """Seconds of forward and backward: this library's, and PyTorch's."""
    leaves = [torch.randn(1, HEADS, n, d).to(dtype).requires_grad_() for _ in range(3)]
    dout = torch.randn(1, HEADS, n, d).to(dtype)
    if window:
        i = torch.arange(n)
        mask = (i <= i[:, None]) & (i > i[:, None] - WINDOW)
        attend = [
            lambda: lgt.attention(*leaves, causal=True, window=(WINDOW - 1, None)),
            lambda: F.scaled_dot_product_attention(*leaves, attn_mask=mask),
        ]
    else:
        attend = [
            lambda: lgt.scaled_dot_product_attention(*leaves, is_causal=True),
            lambda: F.scaled_dot_product_attention(*leaves, is_causal=True),
        ]
    return medians([lambda f=f: torch.autograd.grad(f(), leaves, dout) for f in attend], rounds)


def decoding(dtype, m, d):
    """Seconds of one query against so many keys: this library's, PyTorch's, and this library's outside of PyTorch."""
    q, k, v = (torch.randn(1, HEADS, tokens, d).to(dtype) for tokens in (1, m, m))
    calls = [lgt.scaled_dot_product_attention, F.scaled_dot_product_attention]

    def repeated(call, *arrays, **options):
        return lambda: [call(*arrays, **options) for _ in range(100)]

    with torch.no_grad():
        ours, theirs = medians([repeated(call, q, k, v) for call in calls], 11)
    arrays = [array_of(x) for x in (q, k, v)]
    (bare,) = medians([repeated(lg.attention, *arrays, engine=lg.Exact())], 11)
    return ours / 100, theirs / 100, bare / 100


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=lg.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    lg.set_num_threads(options.threads)
    torch.manual_seed(0)
    print(
        f"PyTorch {torch.__version__}, {options.threads} threads, {HEADS} heads, medians of {options.rounds} rounds\n"
    )
    print("| forward + backward | n | d | lingrad_rs | PyTorch | times as fast |")
    print("|---|---|---|---|---|---|")
    for dtype in (torch.float32, torch.bfloat16):
        for window in (False, True):
            for n in (2048, 8192):
                for d in (64, 128):
                    ours, theirs = training(dtype, n, d, window, options.rounds)
                    kind = f"{str(dtype)[6:]}, {f'window of {WINDOW}' if window else 'causal'}"
                    row = f"{n:,} | {d} | {1e3 * ours:.1f} ms | {1e3 * theirs:.1f} ms | {theirs / ours:.2f}"
                    print(f"| {kind} | {row} |", flush=True)
    print("\n| one query, 1,024 keys | d | lingrad_rs.torch | PyTorch | times as fast | lg.attention alone |")
    print("|---|---|---|---|---|---|")
    for dtype in (torch.float32, torch.bfloat16):
        ours, theirs, bare = decoding(dtype, 1024, 64)
        row = f"{1e6 * ours:.0f} µs | {1e6 * theirs:.0f} µs | {theirs / ours:.2f} | {1e6 * bare:.0f} µs"
        print(f"| {str(dtype)[6:]} | 64 | {row} |", flush=True)


if __name__ == "__main__":
    main()
