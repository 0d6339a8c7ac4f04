"""Threads: the bits do not depend on their number, and calls may run beside others."""

import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from conftest import RUST
from helpers import assert_same_bits, cast, draw, run_attention, small_config
from limits import HANG_SECONDS, STEPS_BESIDE_A_CALL

import lingrad_rs as lg
from lingrad_rs import Exact, Landmark, Polynomial

THREADS = (1, 2, 5)
ENGINES = {
    "exact": Exact(),
    "polynomial": Polynomial(),
    "consistent": Polynomial(gradient="consistent"),
    "degree 4, fitted": Polynomial(degree=4, coefficients="fitted"),
    "landmarks": Landmark(rank=300),
}


def with_each_number_of_threads(compute):
    for n in THREADS:
        lg.set_num_threads(n)
        assert lg.get_num_threads() == n
        yield compute()


@pytest.mark.usefixtures("restore_threads")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("engine", ENGINES.values(), ids=ENGINES.keys())
def test_one_thread_equals_many_bitwise(engine, causal, dtype, rng):
    inputs = cast(draw(rng, n=3000, heads=(2,), key_heads=(1,), d=8, bias=True, size=0.5), dtype)
    one, *others = with_each_number_of_threads(lambda: run_attention(RUST, inputs, engine=engine, causal=causal))
    for many in others:
        assert_same_bits(many, one)


@pytest.mark.usefixtures("restore_threads")
@pytest.mark.parametrize("engine", ENGINES.values(), ids=ENGINES.keys())
def test_one_thread_equals_many_bitwise_for_a_model(engine, dtype, rng):
    config = small_config(engine=engine)
    model = lg.Transformer(config, dtype=dtype)
    tokens, targets = rng.integers(0, config.vocab_size, (2, 2000))

    def compute():
        loss, grads = model.value_and_grad(tokens, targets)
        return {"loss": np.array(loss)} | grads

    one, *others = with_each_number_of_threads(compute)
    for many in others:
        assert_same_bits(many, one)


def test_threads_by_default_are_those_of_the_environment():
    code = "import lingrad_rs as lg; print(lg.get_num_threads(), lg.build_info()['threads'])"
    environment = os.environ | {"RAYON_NUM_THREADS": "3"}
    printed = subprocess.check_output([sys.executable, "-c", code], env=environment, timeout=HANG_SECONDS, text=True)
    assert printed.split() == ["3", "3"]


def test_two_python_threads_at_once_get_the_right_results(rng):
    several = [draw(np.random.default_rng(seed), n=2000, d=8) for seed in range(2)]
    calls = [lambda x=x: lg.attention_vjp(x["q"], x["k"], x["v"], causal=True)[1](x["dout"]) for x in several]
    want = [call() for call in calls]
    got, barrier = [[], []], threading.Barrier(2)

    def work(i):
        barrier.wait()
        got[i] = [calls[i]() for _ in range(5)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(2):
        assert len(got[i]) == 5
        assert all(np.array_equal(a, b) for result in got[i] for a, b in zip(result, want[i], strict=True))


def test_a_call_lets_other_python_threads_go_on(rng):
    q, k, v = rng.standard_normal((3, 20_000, 32)).astype(np.float32)
    call = threading.Thread(target=lg.attention, args=(q, k, v), kwargs={"engine": Exact()})
    steps = 0
    call.start()
    while call.is_alive():
        time.sleep(0.001)
        steps += 1
    assert steps >= STEPS_BESIDE_A_CALL


def test_build_info_tells_version_simd_and_threads():
    info = lg.build_info()
    assert info.keys() == {"version", "simd", "threads"}
    assert info["version"] == lg.__version__
    assert info["simd"] in ("avx512", "avx2", "neon", "scalar")
    assert info["threads"] == lg.get_num_threads()
