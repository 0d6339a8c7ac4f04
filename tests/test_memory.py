"""What a gradient of a long sequence adds to the memory that a process holds."""

import subprocess
import sys

import pytest
from limits import HANG_SECONDS, MEMORY_GROWTH

MEASURE = """
import pathlib
import resource
import numpy as np
import lingrad_rs as lg

n, d = 1_048_576, 16
rng = np.random.default_rng(0)
q, k, v, dout = (rng.standard_normal((n, d), dtype=np.float32) / 2 for _ in range(4))
engine = lg.Polynomial(gradient=GRADIENT)
warm, vjp = lg.attention_vjp(q[:2048], k[:2048], v[:2048], engine=engine, causal=True)
vjp(dout[:2048])

def peak():
    status = pathlib.Path("/proc/self/status")
    if status.exists():  # of this program alone: getrusage tells of the one that started it too
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if "VmHWM" in line) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

before = peak()
out, vjp = lg.attention_vjp(q, k, v, engine=engine, causal=True)
dq, dk, dv = vjp(dout)
print((peak() - before) / sum(x.nbytes for x in (out, dq, dk, dv)))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no getrusage")
@pytest.mark.parametrize("gradient", ["consistent", "closed_form"])
def test_a_million_tokens_take_little_more_memory_than_their_results(gradient):
    code = MEASURE.replace("GRADIENT", repr(gradient))
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=HANG_SECONDS, check=True
    )
    # The results themselves are new, so less than 1 would mean that nothing was measured.
    assert 1 <= float(done.stdout) <= MEMORY_GROWTH
