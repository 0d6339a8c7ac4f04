"""What a gradient of a long sequence adds to the memory that a process holds."""

import subprocess
import sys

import pytest
from limits import HANG_SECONDS, MEMORY_GROWTH

START = """
import pathlib
import resource
import numpy as np
import lingrad_rs as lg

def peak():
    status = pathlib.Path("/proc/self/status")
    if status.exists():  # of this program alone: getrusage tells of the one that started it too
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if "VmHWM" in line) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

rng = np.random.default_rng(0)
"""
ATTENTION = """
n, d = 1_048_576, 16
q, k, v, dout = (rng.standard_normal((n, d), dtype=np.float32) / 2 for _ in range(4))
engine = lg.Polynomial(gradient=GRADIENT)
warm, vjp = lg.attention_vjp(q[:2048], k[:2048], v[:2048], engine=engine, causal=True)
vjp(dout[:2048])

before = peak()
out, vjp = lg.attention_vjp(q, k, v, engine=engine, causal=True)
dq, dk, dv = vjp(dout)
print((peak() - before) / sum(x.nbytes for x in (out, dq, dk, dv)))
"""


# The weights of a language model's last layer; a sum in float64 for each part of the tokens would take 1 GB each.
HEAD = """
x, dy = rng.standard_normal((700, 2048), dtype=np.float32), rng.standard_normal((700, 64_000), dtype=np.float32)
w = rng.standard_normal((2048, 64_000), dtype=np.float32)
_, pullback = lg.Linear(w=w).vjp(x)
before = peak()
dx, grads = pullback(dy)
print((peak() - before) / sum(x.nbytes for x in (dx, grads["w"])))
"""
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no getrusage")


def growth(code):
    """How much memory a piece of code adds, over that of its results."""
    command = [sys.executable, "-c", START + code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANG_SECONDS, check=True)
    return float(done.stdout)


@pytest.mark.parametrize("gradient", ["consistent", "closed_form"])
def test_a_million_tokens_take_little_more_memory_than_their_results(gradient):
    # The results themselves are new, so less than 1 would mean that nothing was measured.
    assert 1 <= growth(ATTENTION.replace("GRADIENT", repr(gradient))) <= MEMORY_GROWTH


def test_the_gradient_of_a_large_vocabulary_s_head_takes_little_more_memory_than_its_results():
    assert 1 <= growth(HEAD) <= MEMORY_GROWTH
