"""What needs more memory than there is, or than there can be, ends in an error, and the library goes on."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import short_of_memory
from limits import HANG_SECONDS, SAME_MODEL, STARVED_STEPS

import lingrad_rs as lg
from lingrad_rs import Exact, Landmark, Polynomial

HUGE = 2**58


def strided(*shape, dtype=np.float32):
    """Ones that are all the same one in memory."""
    return np.lib.stride_tricks.as_strided(np.ones(1, dtype), shape, (0,) * len(shape))


ONE = np.ones((1, 1), np.float32)
MANY = strided(HUGE, 1, 1, 1)
NONE = strided(HUGE, 0, 1)
WIDE = np.ones((1, 64), np.float32)

# Shapes that fit each other, of views, or of results, that no memory can hold.
NO_ARRAYS = {
    "exact": lambda: lg.attention(MANY, MANY, MANY, engine=Exact()),
    "exact with a bias": lambda: lg.attention(MANY, MANY, MANY, key_bias=strided(HUGE, 1, 1), engine=Exact()),
    "polynomial": lambda: lg.attention_vjp(MANY, MANY, MANY, engine=Polynomial()),
    "landmarks": lambda: lg.attention_vjp(MANY, MANY, MANY, engine=Landmark(4)),
    "a tolerance": lambda: lg.attention(MANY, MANY, MANY, tol=1e-2),
    "a plan": lambda: lg.plan_attention(MANY, MANY, MANY),
    "a measured error": lambda: lg.measure_error(MANY, MANY, MANY, MANY),
    "wide values": lambda: lg.attention(strided(HUGE, 1), ONE, WIDE, engine=Exact()),
    "no queries": lambda: lg.attention(NONE, strided(1, 1, 1), strided(1, 1, 64), engine=Exact()),
    "no tokens": lambda: lg.attention(NONE, strided(1, 0, 1), strided(1, 0, 64), engine=Exact()),
    "activation": lambda: lg.Activation("relu").vjp(MANY),
    "norm": lambda: lg.RMSNorm(gain=ONE[0]).vjp(MANY),
    "linear": lambda: lg.Linear(w=ONE).vjp(MANY),
    "a wide linear": lambda: lg.Linear(w=WIDE).vjp(strided(HUGE, 1)),
    "feed-forward": lambda: lg.FeedForward(w_in=ONE, w_out=ONE, activation="relu").vjp(MANY),
    "embedding": lambda: lg.Embedding(embed=WIDE).vjp(np.zeros((HUGE, 0), np.uint32)),
    "self-attention": lambda: lg.SelfAttention(w_q=ONE, w_k=ONE, w_v=ONE, w_o=ONE, n_heads=1).vjp(MANY),
    "a model": lambda: small_model().vjp(np.zeros((HUGE, 0), np.uint32)),
}


def small_model():
    return lg.Transformer(lg.TransformerConfig(n_layers=1, d_model=8, n_heads=2, d_ff=8, vocab_size=16))


def small_call_is_right():
    q, k, v = np.random.default_rng(0).standard_normal((3, 300, 4))
    weights = np.exp(q @ k.T / 2)
    want = weights @ v / weights.sum(axis=1, keepdims=True)
    return np.abs(lg.attention(q, k, v, engine=Exact()) - want).max() <= SAME_MODEL


@pytest.mark.parametrize("call", NO_ARRAYS.values(), ids=NO_ARRAYS.keys())
def test_a_shape_that_no_memory_can_hold_is_a_shape_error(call):
    with pytest.raises(lg.ShapeError, match="shape"):
        call()
    assert small_call_is_right()


# The same where memory could be as large, but is not.
NO_ROOM = {
    "views": lambda: lg.measure_error(*[strided(2**40, 1, 1)] * 4),
    "a result": lambda: lg.attention(strided(2**50, 1), ONE, WIDE, engine=Exact()),
    "tokens": lambda: small_model().value_and_grad(*[strided(2**50, 2, dtype=np.int64)] * 2),
    "embedded tokens": lambda: lg.Embedding(embed=ONE).vjp(strided(2**50, dtype=np.uint16)),
}


@pytest.mark.parametrize("call", NO_ROOM.values(), ids=NO_ROOM.keys())
def test_a_shape_that_this_machine_has_no_memory_for_is_a_memory_error(call):
    with pytest.raises(MemoryError, match=r"\d bytes|\d\.? [KMGTPE]iB"):
        call()
    assert small_call_is_right()


STARVED = [(name, 2) for name in short_of_memory.CALLS] + [(name, 1) for name in ("exact", "polynomial", "a tolerance")]


@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit of the address space that holds")
@pytest.mark.parametrize(("name", "threads"), STARVED)
def test_a_call_with_little_memory_succeeds_or_says_what_there_was_none_for(name, threads):
    command = [sys.executable, short_of_memory.__file__, name, str(threads), str(STARVED_STEPS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANG_SECONDS, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_compiled_function_goes_through_the_entry_that_catches_panics():
    sources = [path.read_text() for path in (Path(__file__).parent.parent / "rust/py/src").rglob("*.rs")]
    functions = [function for text in sources for function in re.findall(r"#\[pyfunction\].*?\{\n.*?\n", text, re.S)]
    assert len(functions) == text_count("#[pyfunction]", sources) > 30
    assert [f for f in functions if "-> Outcome<" not in f or "    entry(|| " not in f] == []
    methods = [block for text in sources for block in re.findall(r"#\[pymethods\].*?\n\}", text, re.S)]
    assert [m for m in methods if m.count("\n    fn ") != m.count("-> Outcome<")] == []


def text_count(text, sources):
    return sum(source.count(text) for source in sources)
