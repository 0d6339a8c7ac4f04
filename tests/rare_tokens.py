"""Heads of which a few tokens carry much of a result: what a sample of even draws does not see.

`FAMILIES` maps a name to a function of a generator and a number of tokens, which draws one head: float64 ``q``, ``k``,
``v`` and ``dout``, each ``(n, d)``. Every call draws another case: sizes, numbers of rare tokens and their strength are
drawn too. `judge` holds what the library says of one such case against what is so.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from helpers import relative_error, run_attention

import lingrad_rs as lg

Case = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def plain(rng, n, *, d=None, std=None):
    """Isotropic, scores with a standard deviation of 0.05 to 0.5."""
    d = int(rng.choice([8, 16, 32])) if d is None else d
    std = math.exp(rng.uniform(math.log(0.05), math.log(0.5))) if std is None else std
    q, k, v, dout = rng.standard_normal((4, n, d))
    return q * math.sqrt(std), k * math.sqrt(std), v, dout


def few(rng, n, most=6):
    """One to `most` of the tokens."""
    return rng.choice(n, int(rng.integers(1, most + 1)), replace=False)


def planted(rng, n):
    """Tokens alike, with large values."""
    q, k, v, dout = plain(rng, n)
    i = few(rng, n)
    q[i] = k[i] = rng.uniform(1.5, 3) * k[0]
    v[i] *= math.exp(rng.uniform(1, 5))
    return q, k, v, dout


def blind(rng, n):
    """Keys long in a direction that some queries of ordinary length alone look in."""
    q, k, v, dout = plain(rng, n, std=0.3)
    q[:, 0] = 0
    k[:, 0] *= rng.uniform(5, 40)
    i = few(rng, n)
    q[i] = 0
    q[i, 0] = rng.uniform(1, 5) * math.sqrt(0.3)
    return q, k, v, dout


def blind_keys(rng, n):
    """Queries long in a direction in which some keys of ordinary length alone lie."""
    q, k, v, dout = blind(rng, n)
    return k, q, v, dout


def upstream_of_few(rng, n):
    """The gradient of a few tokens is nearly all there is, whose queries are longer than others too."""
    q, k, v, dout = plain(rng, n)
    i = few(rng, n)
    dout[i] *= math.exp(rng.uniform(2, 7))
    q[i] *= rng.uniform(1, 4)
    return q, k, v, dout


def one_value(rng, n):
    """One short key with an enormous value."""
    q, k, v, dout = plain(rng, n)
    j = few(rng, n, most=1)
    k[j] *= rng.uniform(0, 1)
    v[j] *= math.exp(rng.uniform(3, 9))
    return q, k, v, dout


def log_normal_sizes(rng, n):
    """Log-normal sizes of values and gradients, nothing planted."""
    q, k, v, dout = plain(rng, n)
    sigma = rng.uniform(0.5, 2.5)
    return q, k, v * rng.lognormal(0, sigma, (n, 1)), dout * rng.lognormal(0, sigma, (n, 1))


def student_sizes(rng, n):
    """Sizes of values and gradients by Student's t, nothing planted."""
    q, k, v, dout = plain(rng, n)
    degrees = rng.uniform(1, 4)
    return q, k, v * rng.standard_t(degrees, (n, 1)), dout * rng.standard_t(degrees, (n, 1))


def heavy_tokens(rng, n):
    """Lengths of queries and keys with heavy tails."""
    q, k, v, dout = plain(rng, n)
    sigma = rng.uniform(0.2, 0.8)
    return q * rng.lognormal(0, sigma, (n, 1)), k * rng.lognormal(0, sigma, (n, 1)), v, dout


def pairs(rng, n):
    """Pairs of tokens that see each other alone: their score is that of most of a row."""
    q, k, v, dout = plain(rng, n)
    d = q.shape[1]
    for _ in range(int(rng.integers(1, 5))):
        i, j = rng.choice(n, 2, replace=False)
        score = math.log(n) + rng.uniform(-2, 3)
        direction = rng.standard_normal(d)
        direction /= np.linalg.norm(direction)
        share = rng.uniform(0.3, 0.7)
        length = score * math.sqrt(d)
        q[i] = q[j] = length**share * direction
        k[i] = k[j] = length ** (1 - share) * direction
    return q, k, v, dout


def off_curve(rng, n):
    """A smooth curve with a few tokens elsewhere."""
    d = int(rng.choice([32, 64]))
    time = np.arange(n) / n
    phases = 2 * math.pi * np.outer(time, [1, 2, 3])
    points = np.concatenate([np.cos(phases), np.sin(phases)], axis=1)
    q, k, v = (points @ rng.standard_normal((6, d)) / math.sqrt(3) for _ in range(3))
    size = math.sqrt(rng.uniform(0.3, 1.2) * math.sqrt(d) / np.std(q[::16] @ k[::16].T))
    q, k = q * size, k * size
    i = few(rng, n)
    elsewhere = rng.standard_normal((len(i), d)) * rng.uniform(0.5, 2.5) * size
    q[i], k[i] = elsewhere, elsewhere
    v[i] *= math.exp(rng.uniform(0, 3))
    return q, k, v + 0.1 * rng.standard_normal((n, d)), rng.standard_normal((n, d))


def one_hot(rng, n):
    """Some rows are nearly one-hot: their queries lie along single keys, with a large score."""
    q, k, v, dout = plain(rng, n)
    d = q.shape[1]
    i = rng.choice(n, int(rng.integers(1, 40)), replace=False)
    j = rng.choice(n, len(i), replace=False)
    score = math.log(n) + rng.uniform(-1, 4)
    q[i] = k[j] / np.sum(k[j] ** 2, axis=1, keepdims=True) * score * math.sqrt(d)
    return q, k, v, dout


FAMILIES: dict[str, Callable[[np.random.Generator, int], Case]] = {
    f.__name__: f
    for f in (
        planted, blind, blind_keys, upstream_of_few, one_value, log_normal_sizes, student_sizes, heavy_tokens, pairs,
        off_curve, one_hot,
    )
}  # fmt: skip


def with_mask(rng, case, *, group, dtype):
    """A case with ``group`` query heads, perhaps a key bias, in some dtype: a dict of arguments, and `dout`."""
    q, k, v, dout = case
    if group > 1:
        turns = [rng.permutation(len(q)) if h else np.arange(len(q)) for h in range(group)]
        q, dout = np.stack([q[t] for t in turns]), np.stack([dout[t] for t in turns])
        k, v = k[None], v[None]
    arrays = {"q": q, "k": k, "v": v}
    if rng.random() < 0.4:
        bias = 0.5 * rng.standard_normal(k.shape[:-1])
        bias[..., rng.random(k.shape[-2]) < rng.choice([0, 0.3])] = -math.inf
        bias[..., 0] = 0.0
        arrays["key_bias"] = bias
    return {name: x.astype(dtype) for name, x in arrays.items()}, dout.astype(dtype)


TOLERANCES = (3e-1, 1e-1, 3e-2, 1e-2)
NAMES = ("out", "dq", "dk", "dv", "dkey_bias")


@dataclass(frozen=True)
class Judged:
    """One result of a low-rank engine: its error, and the upper end of the interval that was claimed."""

    name: str
    engine: lg.Engine
    error: float
    high: float


def judge(backend, family, seed, n, *, engine=None) -> tuple[float | None, list[Judged]]:
    """One drawn case of a family, by a drawn tolerance or by an engine: the tolerance and every low-rank result.

    Errors are relative to exact attention in float64. Masks, biases, grouped heads and dtypes are drawn too. By an
    engine, the pullback measures errors on 64 rows, and `measure_error` those of all heads together; no result where
    scores are too large for it, which it says.
    """
    rng = np.random.default_rng([seed, list(FAMILIES).index(family)])
    group = int(rng.choice([1, 1, 2]))
    inputs, dout = with_mask(rng, FAMILIES[family](rng, n), group=group, dtype=rng.choice([np.float32, np.float64]))
    causal = bool(rng.random() < 0.4)
    tol = float(rng.choice(TOLERANCES)) if engine is None else None
    wide = {name: x.astype(np.float64) for name, x in (inputs | {"dout": dout}).items()}
    want = run_attention(backend, wide, engine=lg.Exact(), causal=causal)
    arrays = {name: backend.array(x) for name, x in inputs.items()}
    options = {"causal": causal} | ({"tol": tol} if engine is None else {"engine": engine})
    try:
        out, vjp = lg.attention_vjp(**arrays, **options)
    except lg.DenominatorError:
        if engine is None:
            raise
        return tol, []
    got = dict(
        zip(NAMES, (out, *vjp(backend.array(dout), **({} if engine is None else {"samples": 64}))), strict=False)
    )
    got = {name: backend.numpy(x) for name, x in got.items()}
    judged = list(_of_heads(vjp.heads, got, want))
    if engine is not None:
        claimed = lg.measure_error(*[arrays[x] for x in "qkv"], out, key_bias=arrays.get("key_bias"), causal=causal)
        judged.append(Judged("measure_error", engine, relative_error(got["out"], want["out"]), claimed.high))
    return tol, judged


def _of_heads(heads, got, want) -> Iterator[Judged]:
    for i, head in enumerate(heads):
        if head.engine == lg.Exact():
            continue
        for name, claimed in head.errors.items():
            own = [x[name] for x in (got, want)]
            if len(heads) > 1:
                # The gradients of keys are those of all query heads that share them.
                own = [x[min(i, len(x) - 1)] for x in own]
            if name in ("out", "dq") or i == 0:
                yield Judged(name, head.engine, relative_error(*own), claimed.high)
