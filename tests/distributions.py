"""Queries, keys and values of many kinds, drawn for sweeps over tolerances.

`DISTRIBUTIONS` maps a name to a function of a generator and a number of tokens, at least two, which draws one head:
float64 ``q (n, d)``, ``k (n, d)`` and ``v (n, dv)``. A name that ends in "score std s" promises that all the scores
``q k^T / sqrt(d)`` together have the standard deviation s; after "centred" this is so once the means of `q` and of `k`
are taken off.
"""

import functools
import math
from collections.abc import Callable

import numpy as np

import lingrad_rs as lg
from lingrad_rs.cli.grad import library_sources

Head = tuple[np.ndarray, np.ndarray, np.ndarray]


def score_std(q, k):
    """The standard deviation of all scores, in time linear in the tokens."""
    q_mean, k_mean = q.mean(axis=0), k.mean(axis=0)
    q, k = q - q_mean, k - k_mean
    crossed = np.sum((q.T @ q) * (k.T @ k)) / (len(q) * len(k))
    variance = crossed + np.mean((q @ k_mean) ** 2) + np.mean((k @ q_mean) ** 2)
    return math.sqrt(variance / q.shape[1])


def scaled(q, k, std):
    """`q` and `k` times one number, so that scores have the standard deviation `std`."""
    factor = math.sqrt(std / score_std(q, k))
    return factor * q, factor * k


def isotropic(rng, n, *, d=16, std=0.3):
    q, k, v = rng.standard_normal((3, n, d))
    return *scaled(q, k, std), v


def anisotropic(rng, n, *, d, power, std):
    """The i-th eigenvalue of the covariance, of queries as of keys, is as ``i^-power``, in axes turned at random."""
    axes, _ = np.linalg.qr(rng.standard_normal((d, d)))
    root = np.arange(1, d + 1)[:, None] ** (-power / 2) * axes
    q, k, v = rng.standard_normal((3, n, d))
    return *scaled(q @ root, k @ root, std), v


def on_manifold(rng, phases, *, d, std=1.0):
    """Random linear maps of the sines and cosines of `phases` (n, f): to queries, to keys and, noisier, to values."""
    points = np.concatenate([np.cos(phases), np.sin(phases)], axis=1)
    maps = rng.standard_normal((3, points.shape[1], d)) / math.sqrt(phases.shape[1])
    q, k, v = points @ maps
    noise = rng.standard_normal((3, *q.shape))
    q, k = scaled(q, k, std)
    return q + 1e-3 * noise[0], k + 1e-3 * noise[1], v + 0.1 * noise[2]


def near_curve(rng, n):
    """One turn of a closed curve, token after token."""
    time = np.arange(n) / n
    return on_manifold(rng, 2 * math.pi * np.outer(time, [1, 2, 3]), d=64)


def near_surface(rng, n):
    """A torus, at places drawn evenly."""
    place = rng.random((n, 2))
    return on_manifold(rng, 2 * math.pi * place @ [[1, 0, 1, 1, 2, 1], [0, 1, 1, -1, 1, 2]], d=32)


def clustered(rng, n, *, d=16, clusters=8, spread=0.05, std=1.0):
    """Queries, and keys, each near one of the centres, which queries and keys do not share."""
    centres = rng.standard_normal((2, clusters, d))
    q, k = (c[rng.integers(clusters, size=n)] + spread * rng.standard_normal((n, d)) for c in centres)
    return *scaled(q, k, std), rng.standard_normal((n, d))


def student_t(rng, n, *, degrees):
    """Isotropic with score std 0.3, then every row times its own draw of Student's t."""
    q, k, v = isotropic(rng, n)
    return q * rng.standard_t(degrees, (n, 1)), k * rng.standard_t(degrees, (n, 1)), v


def log_normal(rng, n, *, std):
    q, k, v = isotropic(rng, n)
    return *scaled(q * rng.lognormal(size=(n, 1)), k * rng.lognormal(size=(n, 1)), std), v


def attention_sink(rng, n, *, std=0.03, length=30.0):
    """The first key is long and along the mean of the queries.

    Its score is ``log n + 2``, give or take ``length * std``, and the others are near 0: its weight is about 0.9.
    """
    q, k, v = isotropic(rng, n, std=std)
    d, size = q.shape[1], math.sqrt(std)
    direction = rng.standard_normal(d)
    direction /= np.linalg.norm(direction)
    k[0] = length * size * math.sqrt(d) * direction
    return q + (math.log(n) + 2) / (length * size) * direction, k, v


def huge_query(rng, n, *, length=30.0):
    """The query in the middle is long; its scores have a standard deviation of 9."""
    q, k, v = isotropic(rng, n)
    q[n // 2] *= length
    return q, k, v


def repeated_keys(rng, n, *, distinct, std):
    q, k, v = isotropic(rng, n)
    return *scaled(q, k[rng.integers(min(distinct, n), size=n)], std), v


def nearly_degenerate(rng, n, *, d=16, rank=2, std=1.0):
    """Queries lie in a plane and keys in another, but for noise of 1e-6."""
    q, k = (rng.standard_normal((n, rank)) @ rng.standard_normal((rank, d)) for _ in range(2))
    q, k = scaled(q, k, std)
    noise = 1e-6 * rng.standard_normal((2, n, d))
    return q + noise[0], k + noise[1], rng.standard_normal((n, d))


def large_means(rng, n, *, std):
    """Queries have a common mean, and keys another, of about 3 in each entry."""
    q, k, v = isotropic(rng, n, std=std)
    q_mean, k_mean = 3 * rng.standard_normal((2, q.shape[1]))
    return q + q_mean, k + k_mean, v


def values_with_mean(rng, n, *, std):
    q, k, v = isotropic(rng, n, std=std)
    return q, k, v + 100


def smooth_values(rng, n, *, std):
    """Each column of the values is a sine of the position, of one to four turns."""
    q, k, v = isotropic(rng, n, std=std)
    turns, offset = rng.integers(1, 5, v.shape[1]), rng.random(v.shape[1])
    return q, k, np.sin(2 * math.pi * (np.arange(n)[:, None] / n * turns + offset))


# The text that the small transformer reads, in bytes: it is trained on the first half, and its heads are those of the
# second.
TEXT = 1 << 20
N_LAYERS, N_HEADS, WINDOW, BATCH = 2, 2, 256, 4
# About five seconds on one core; the loss falls from 5.5 to 2 nats a byte.
STEPS, RATE = 400, 1e-2


@functools.lru_cache
def library_text():
    return np.frombuffer(library_sources(TEXT), np.uint8)


@functools.lru_cache
def trained_model(seed=0):
    """A small causal transformer after some hundred steps of Adam on Python's own library, the same in every call."""
    config = lg.TransformerConfig(
        n_layers=N_LAYERS, d_model=32, n_heads=N_HEADS, d_ff=128, vocab_size=256, engine=lg.Exact()
    )
    model, rng = lg.Transformer(config, seed=seed), np.random.default_rng(seed)
    mean, square = ({name: np.zeros_like(x) for name, x in model.params.items()} for _ in range(2))
    for step in range(1, STEPS + 1):
        starts = rng.integers(TEXT // 2 - WINDOW, size=(BATCH, 1))
        rows = library_text()[starts + np.arange(WINDOW + 1)]
        _, grads = model.value_and_grad(rows[:, :-1], rows[:, 1:])
        for name, grad in grads.items():
            mean[name] += 0.1 * (grad - mean[name])
            square[name] += 0.01 * (grad**2 - square[name])
            root = np.sqrt(square[name] / (1 - 0.99**step)) + 1e-8
            model.params[name] -= RATE / (1 - 0.9**step) * mean[name] / root
    return model


def rms_norm(x, gain):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-5) * gain


def silu(x):
    return x * (0.5 + 0.5 * np.tanh(x / 2))


def rope(x):
    """Rows of heads (h, n, d) turned by their positions."""
    n, d = x.shape[-2:]
    angles = np.outer(np.arange(n), 10000.0 ** (-2 * np.arange(d // 2) / d))
    cos, sin = np.cos(angles).astype(x.dtype), np.sin(angles).astype(x.dtype)
    x1, x2 = np.split(x, 2, axis=-1)
    return np.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1)


@functools.lru_cache(maxsize=2)
def trained_heads(n, start, seed=0):
    """``q, k, v`` of all heads of the trained model on `n` bytes of the text, each (layers, heads, n, d) in float32.

    Queries and keys have been turned by their positions. From the second 256 tokens on, positions are beyond those of
    training.
    """
    params = trained_model(seed).params
    x = params["embed"][library_text()[start : start + n]]
    layers = []
    for i in range(N_LAYERS):
        own = {name.removeprefix(f"layers.{i}."): w for name, w in params.items() if name.startswith(f"layers.{i}.")}
        y = rms_norm(x, own["attn_norm.gain"])
        q, k, v = ((y @ own[f"attn.w_{c}"]).reshape(n, N_HEADS, -1).swapaxes(0, 1) for c in "qkv")
        layers.append((rope(q), rope(k), v))
        if i + 1 < N_LAYERS:
            out = lg.attention(*layers[-1], engine=lg.Exact(), causal=True)
            x = x + out.swapaxes(0, 1).reshape(n, -1) @ own["attn.w_o"]
            x = x + silu(rms_norm(x, own["ffn_norm.gain"]) @ own["ffn.w_in"]) @ own["ffn.w_out"]
    return tuple(np.stack(arrays) for arrays in zip(*layers, strict=True))


def trained_head(rng, n, *, layer, head):
    """One head of the trained model, on text from a place that is drawn; equal generators draw the same text."""
    start = int(rng.integers(TEXT // 2, TEXT - n + 1))
    q, k, v = (x[layer, head].astype(np.float64) for x in trained_heads(n, start))
    return q, k, v


DISTRIBUTIONS: dict[str, Callable[[np.random.Generator, int], Head]] = {
    **{
        f"isotropic, d {d}, score std {std}": functools.partial(isotropic, d=d, std=std)
        for std in (0.05, 0.3, 1, 3)
        for d in (4, 16, 64)
    },
    **{
        f"eigenvalues like i^-{power}, d {d}, score std {std}": functools.partial(
            anisotropic, d=d, power=power, std=std
        )
        for power, d, std in ((1, 16, 0.3), (1, 64, 1), (2, 64, 0.3), (2, 64, 1))
    },
    "near a curve, d 64, score std 1": near_curve,
    "near a surface, d 32, score std 1": near_surface,
    "eight clusters, score std 1": clustered,
    "lengths like Student's t of 2 degrees": functools.partial(student_t, degrees=2),
    "lengths like Student's t of 3 degrees": functools.partial(student_t, degrees=3),
    "log-normal lengths, score std 0.3": functools.partial(log_normal, std=0.3),
    "log-normal lengths, score std 1": functools.partial(log_normal, std=1),
    "one huge key that every query attends to": attention_sink,
    "one huge query": huge_query,
    "ten distinct keys, score std 1": functools.partial(repeated_keys, distinct=10, std=1),
    "constant keys, score std 1": functools.partial(repeated_keys, distinct=1, std=1),
    "rank 2 but for noise, score std 1": nearly_degenerate,
    "large means, centred score std 0.1": functools.partial(large_means, std=0.1),
    "large means, centred score std 1": functools.partial(large_means, std=1),
    "values with a large mean, score std 0.3": functools.partial(values_with_mean, std=0.3),
    "values with a large mean, score std 1": functools.partial(values_with_mean, std=1),
    "smooth values, score std 0.3": functools.partial(smooth_values, std=0.3),
    **{
        f"a trained head, layer {layer}, head {head}": functools.partial(trained_head, layer=layer, head=head)
        for layer in range(N_LAYERS)
        for head in range(N_HEADS)
    },
}
