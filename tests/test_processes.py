"""Ctrl-C and fork, each in a process of its own."""

import os
import signal
import subprocess
import sys
import time

import pytest
from limits import HANG_SECONDS, INTERRUPT_SECONDS, SAME_MODEL

PREPARE = f"""
import os, sys, time
import numpy as np
import lingrad_rs as lg

rng = np.random.default_rng(0)

def small_call_is_right():
    q, k, v = rng.standard_normal((3, 300, 4))
    weights = np.exp(q @ k.T / 2)
    want = weights @ v / weights.sum(axis=1, keepdims=True)
    return bool(np.abs(lg.attention(q, k, v, engine=lg.Exact()) - want).max() <= {SAME_MODEL})

def calls_are_right():
    # A gradient of many entries, too.
    x, dy = rng.standard_normal((2, 20, 300))
    dx, grads = lg.Linear(w=np.eye(300)).vjp(x)[1](dy)
    error = max(np.abs(dx - dy).max(), np.abs(grads["w"] - x.T @ dy).max())
    return small_call_is_right() and bool(error <= {SAME_MODEL})
"""

# Calls that take many seconds, each stopped from outside, and what comes before them.
ATTENTION = "q = rng.standard_normal((400_000, 16)).astype(np.float32) / 4"
EXACT_VJP = "q = rng.standard_normal((25_000, 16)); _, vjp = lg.attention_vjp(q, q, q, engine=lg.Exact())"
POLYNOMIAL_VJP = f"{ATTENTION}; _, vjp = lg.attention_vjp(q, q[:9], q[:9], engine=lg.Polynomial(degree=4))"
MODEL = """
config = lg.TransformerConfig(n_layers=2, d_model=64, n_heads=4, d_ff=128, vocab_size=256, engine=lg.Exact())
model, tokens = lg.Transformer(config), rng.integers(0, 256, 200_000)
"""
LONG_CALLS = {
    "exact": (ATTENTION, "lg.attention(q, q, q, engine=lg.Exact())"),
    "exact gradient": (EXACT_VJP, "vjp(q)"),
    "polynomial": (ATTENTION, "lg.attention(q, q, q, engine=lg.Polynomial(degree=6))"),
    "causal polynomial": (ATTENTION, "lg.attention(q, q, q, engine=lg.Polynomial(degree=6), causal=True)"),
    "polynomial gradient": (POLYNOMIAL_VJP, "vjp(q)"),
    "measured error": (ATTENTION, "lg.measure_error(q, q, q, q, samples=400_000)"),
    "model": (MODEL, "model.value_and_grad(tokens, tokens)"),
}

INTERRUPTED = """
BEFORE
assert small_call_is_right()
print("ready", flush=True)
try:
    CALL
except KeyboardInterrupt:
    print(time.monotonic(), small_call_is_right(), flush=True)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT for one process")
@pytest.mark.parametrize(("before", "call"), LONG_CALLS.values(), ids=LONG_CALLS.keys())
def test_ctrl_c_stops_a_long_call_within_a_second_and_leaves_the_library_sound(before, call):
    code = PREPARE + INTERRUPTED.replace("BEFORE", before).replace("CALL", call)
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "ready\n"
            time.sleep(0.5)
            assert process.poll() is None
            sent = time.monotonic()
            process.send_signal(signal.SIGINT)
            printed, _ = process.communicate(timeout=HANG_SECONDS)
        finally:
            process.kill()
    assert process.returncode == 0
    caught, is_right = printed.split()
    assert float(caught) - sent <= INTERRUPT_SECONDS
    assert is_right == "True"


FORKED = """
assert calls_are_right()
child = os.fork()
if child == 0:
    os._exit(0 if calls_are_right() and calls_are_right() else 1)
_, status = os.waitpid(child, 0)
print(os.waitstatus_to_exitcode(status), calls_are_right())
"""

POOL = """
import multiprocessing
assert calls_are_right()
with multiprocessing.get_context("fork").Pool(2) as pool:
    print(sum(pool.starmap(calls_are_right, [()] * 8)), calls_are_right())
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.parametrize(("code", "printed"), [(FORKED, ["0", "True"]), (POOL, ["8", "True"])], ids=["fork", "pool"])
def test_a_forked_process_computes_as_its_parent(code, printed):
    # Python itself warns of forks beside threads, from 3.12 on.
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", PREPARE + code]
    assert subprocess.check_output(command, timeout=HANG_SECONDS, text=True).split() == printed
