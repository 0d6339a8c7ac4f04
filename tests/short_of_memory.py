"""Makes a call again and again with more and more memory, from none to enough: `short_of_memory.py CALL THREADS STEPS`.

Every call succeeds, or raises a `MemoryError` that says what there was no room for and how much that is; and after it a
small call is right. The steps lie evenly between nothing and what is enough, moved on by the fraction SHIFT of one.
"""

import ctypes
import os
import re
import resource
import sys

import numpy as np

import lingrad_rs as lg
from lingrad_rs import Exact, Landmark, Polynomial

MIB = 2**20
# What the text of an error holds: lingrad's own, or NumPy's.
TEXT = re.compile(r"^no memory for .+: \d+ bytes$|^Unable to allocate [\d.]+ \w+ for an array")


def arrays(*shape, dtype=np.float32):
    rng = np.random.default_rng(0)
    return [rng.standard_normal(shape, dtype) * dtype(0.3) for _ in range(4)]


def forward(q, k, v, _, **options):
    lg.attention(q, k, v, **options)


def backward(q, k, v, dout, **options):
    _, pullback = lg.attention_vjp(q, k, v, **options)
    pullback(dout)


def measured(q, k, v, dout, **options):
    _, pullback = lg.attention_vjp(q, k, v, **options)
    pullback(dout, samples=200)


def self_attention():
    weights = dict(zip(("w_q", "w_k", "w_v", "w_o"), arrays(64, 64), strict=True))
    module = lg.SelfAttention(**weights, n_heads=2, rope=True, engine=Exact())
    x, dy = arrays(256, 128, 64)[:2]

    def call():
        _, pullback = module.vjp(x)
        pullback(dy)

    return call


def transformer(*, loss):
    config = lg.TransformerConfig(n_layers=2, d_model=128, n_heads=2, d_ff=512, vocab_size=4096, engine=Exact())
    model = lg.Transformer(config)
    tokens = np.random.default_rng(0).integers(0, 4096, (2, 1024))

    def call():
        if loss:
            model.value_and_grad(tokens, tokens)
        else:
            y, pullback = model.vjp(tokens)
            pullback(y)

    return call


def many_threads():
    x = np.ones((300, 4))

    def call():
        threads = lg.get_num_threads()
        lg.set_num_threads(64)
        try:
            lg.attention(x, x, x, engine=Exact())
        finally:
            lg.set_num_threads(threads)

    return call


def of_attention(call, inputs, **options):
    return lambda: call(*inputs, **options)


MANY = (1024, 128, 32)
LONG = (2, 2**17, 8)
PLANNED = (1, 2**15, 8)
CALLS = {
    "attention": lambda: of_attention(forward, arrays(*MANY), engine=Exact()),
    "exact": lambda: of_attention(backward, arrays(*MANY), engine=Exact()),
    "exact, one head": lambda: of_attention(backward, arrays(1500, 900), engine=Exact()),
    "polynomial": lambda: of_attention(backward, arrays(*LONG), engine=Polynomial()),
    "consistent": lambda: of_attention(backward, arrays(*LONG), engine=Polynomial(gradient="consistent", shift="mean")),
    "causal": lambda: of_attention(backward, arrays(1, 2**11, 16), engine=Polynomial(4), causal=True),
    "a wide polynomial": lambda: of_attention(backward, arrays(100, 24), engine=Polynomial(4)),
    "landmarks": lambda: of_attention(backward, arrays(*LONG), engine=Landmark(32)),
    "causal landmarks": lambda: of_attention(backward, arrays(1, 2**14, 16), engine=Landmark(256), causal=True),
    "measured": lambda: of_attention(measured, arrays(1, 2**15, 16), engine=Polynomial()),
    "a tolerance": lambda: of_attention(backward, arrays(*PLANNED), tol=1e-2),
    "a causal tolerance": lambda: of_attention(backward, arrays(*PLANNED), tol=1e-2, causal=True),
    "a plan": lambda: of_attention(lambda q, k, v, _: lg.plan_attention(q, k, v, tol=1e-2), arrays(1, 2**17, 8)),
    "a measured error": lambda: of_attention(
        lambda q, k, v, out: lg.measure_error(q, k, v, out, samples=50), arrays(1, 2**17, 16)
    ),
    "self-attention": self_attention,
    "many threads": many_threads,
    "a model": lambda: transformer(loss=False),
    "a model's loss": lambda: transformer(loss=True),
}


def small_call_is_right():
    q, k, v = np.random.default_rng(0).standard_normal((3, 300, 4))
    weights = np.exp(q @ k.T / 2)
    want = weights @ v / weights.sum(axis=1, keepdims=True)
    out, pullback = lg.attention_vjp(q, k, v, engine=Exact())
    pullback(out)
    return np.abs(out - want).max() <= 1e-12


def address_space():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


def outcome(call, room):
    """What a call raises with so many bytes of room, or None."""
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (address_space() + room, hard))
    try:
        call()
    except MemoryError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
    return None


def main(name, threads, steps, shift=0.0):
    if "PLAIN" not in os.environ:
        # M_MMAP_THRESHOLD and M_ARENA_MAX: no room beyond a step's is left in freed arrays or in heaps of threads.
        ctypes.CDLL(None).mallopt(-3, 2**16)
        ctypes.CDLL(None).mallopt(-8, 1)
    lg.set_num_threads(int(threads))
    call = CALLS[name]()
    assert small_call_is_right()
    enough = 8 * MIB
    while outcome(call, enough) is not None:
        assert small_call_is_right(), enough
        enough *= 2
    failed = 0
    for step in range(int(steps)):
        room = int((step + float(shift)) / int(steps) * enough)
        print(room, end=" ", flush=True)
        text = outcome(call, room)
        print(text, flush=True)
        failed += text is not None
        assert text is None or TEXT.match(text), text
        assert small_call_is_right(), room
    assert failed > 0
    print(f"{name}: {failed} of {steps} failed; {enough // MIB} MiB are enough", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
