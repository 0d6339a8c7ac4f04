"""``lingrad bench``: the table, the plot and what the times are of."""

import json
import subprocess
import sys
import time
import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import GPU_NUMPY
from limits import CLI_COMPARE, FLOAT32_MODEL, HANG_SECONDS, NOT_EXACT

import lingrad_rs as lg
from lingrad_rs import cli
from lingrad_rs.backends import select
from lingrad_rs.cli import timing
from lingrad_rs.cli.devices import Gpu, Host

COMMAND = Path(sys.executable).with_name("lingrad" + (".exe" if sys.platform == "win32" else ""))
SMALL = ("--tokens", "2048", "--d", "8", "--rounds", "1")


def bench(*arguments):
    command = [COMMAND, "bench", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=HANG_SECONDS, check=False)


def rows(*arguments):
    done = bench(*SMALL, *arguments, "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result.keys() == {"machine", "rows"}
    return result["rows"]


def check_rows(rows):
    """Those of two lengths, and of degrees 1 and 2."""
    own = [row for row in rows if "PyTorch" not in row["method"]]
    names = ["exact", *(f"degree {g}{kind}" for g in (1, 2) for kind in ("", " fitted", " consistent"))]
    assert [(row["n"], row["method"]) for row in own] == [(n, name) for n in (1024, 2048) for name in names]
    for row in own:
        assert row.keys() == {"method", "n", "forward", "both", "errors"}
        for times in (row["forward"], row["both"]):
            assert 0 < times["low"] <= times["median"] <= times["high"]
        assert row["errors"].keys() == {"out", "dq", "dk", "dv"}
        errors = row["errors"].values()
        if row["method"] == "exact":
            assert max(errors) <= FLOAT32_MODEL
        elif row["method"] == "degree 2":
            assert min(errors) >= NOT_EXACT
            assert max(errors) <= CLI_COMPARE


DEGREES = ("--degree", "1", "--degree", "2", "--heads", "2")


@pytest.mark.parametrize("mask", ["--causal", "--full"])
def test_every_engine_is_timed_at_every_length_and_its_error_told(mask):
    check_rows(rows(mask, *DEGREES))


def test_what_would_take_too_long_is_left_out():
    kept = rows("--limit", "1e-9")
    assert {row["n"] for row in kept} == {1024}


def test_the_table_names_machine_engines_and_errors():
    done = bench(*SMALL)
    assert done.returncode == 0, done.stderr
    assert "lingrad_rs" in done.stdout
    assert all(word in done.stdout for word in ("exact", "degree 2 fitted", "forward", "worst gradient", "2,048"))


@pytest.mark.parametrize(("suffix", "start"), [("png", b"\x89PNG"), ("svg", b"<?xml")])
def test_the_plot_is_written(suffix, start, tmp_path):
    path = tmp_path / f"plot.{suffix}"
    done = bench(*SMALL, "--plot", path)
    assert done.returncode == 0, done.stderr
    assert path.read_bytes().startswith(start)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--plot", "plot.pdf"), "expected a name that ends in .png or .svg"),
        (("--plot", "nowhere/plot.png"), "there is no directory"),
        (("--tokens", "0"), "--tokens"),
        (("--degree", "0"), "--degree"),
        (("--rounds", "0"), "--rounds"),
        (("--score-std", "-1"), "--score-std"),
        (("--device", "tpu"), "--device"),
        (("--device", "gpu", "--threads", "2"), "--threads needs --device cpu; got gpu"),
    ],
)
def test_bad_options_are_told_at_once(arguments, message):
    done = bench("--tokens", "1048576", *arguments)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert message in " ".join(done.stderr.replace("│", " ").split())


def test_scores_have_the_standard_deviation_that_was_asked_for():
    q, k, _, _ = timing.inputs(timing.Case(n=500, d=16, heads=1, causal=False), 0.3, "float64")
    assert np.std(q[0] @ k[0].T / 4) == pytest.approx(0.3, rel=0.1)


def test_a_turn_of_short_calls_takes_the_mean_of_many_but_the_first():
    calls = []

    def call():
        calls.append(0)
        time.sleep(0.05 if len(calls) == 1 else 0.001)

    times = timing.interleaved({"call": call}, 1)["call"]
    assert len(calls) > 2
    assert times.low == times.median == times.high < 0.04


def test_a_relative_error_is_that_of_frobenius():
    exact = np.array([[3.0, 0.0], [0.0, 4.0]])
    assert timing.relative_error(exact + np.array([[0.0, 0.5], [0.0, 0.0]]), exact) == pytest.approx(0.1)


class FakeStream:
    is_current = False

    def __enter__(self):
        self.is_current = True

    def __exit__(self, *error):
        self.is_current = False


class FakeEvent:
    """A clock that runs a hundred times too fast, and tells the time once it has been waited for."""

    def __init__(self, stream):
        self.stream, self.is_done = stream, False

    def record(self):
        assert self.stream.is_current
        self.seconds = 100 * time.perf_counter()

    def synchronize(self):
        self.is_done = True

    def milliseconds_until(self, end):
        assert end.is_done
        return 1e3 * (end.seconds - self.seconds)


def fake_cupy(free=1 << 34):
    """What the bench asks of CuPy, with arrays of NumPy."""
    stream = FakeStream()
    runtime = SimpleNamespace(
        getDevice=lambda: 3,
        getDeviceProperties=lambda i: {"name": b"Fake GPU %d" % i},
        driverGetVersion=lambda: 13020,
        memGetInfo=lambda: (free - free // 2, 2 * free),
    )
    cuda = SimpleNamespace(
        Event=lambda: FakeEvent(stream),
        Stream=SimpleNamespace(null=stream),
        get_elapsed_time=FakeEvent.milliseconds_until,
        runtime=runtime,
    )
    pool = SimpleNamespace(
        free_bytes=lambda: free // 2, get_limit=lambda: 0, used_bytes=lambda: 0, free_all_blocks=lambda: None
    )
    return SimpleNamespace(__version__="14.9", cuda=cuda, asarray=np.copy, get_default_memory_pool=lambda: pool)


@pytest.fixture
def on_gpu(monkeypatch, capsys):
    """Runs ``lingrad bench --device gpu`` on the GPU path under NumPy: its exit code and what it writes."""
    monkeypatch.setattr(select, "KINDS", [*GPU_NUMPY.kinds, *select.KINDS])

    def run(cupy, *arguments):
        monkeypatch.setattr(select, "cupy", cupy)
        monkeypatch.setattr(sys, "argv", ["lingrad", "bench", *SMALL, "--limit", "1e4", "--device", "gpu", *arguments])
        with pytest.raises(SystemExit) as done:
            cli.main()
        written = capsys.readouterr()
        return done.value.code, written.out, written.err

    return run


def test_a_gpu_is_timed_by_its_own_clock_and_named(on_gpu):
    code, out, err = on_gpu(fake_cupy, "--json", *DEGREES)
    assert code == 0
    assert err == ""
    result = json.loads(out)
    assert result["machine"] == f"Fake GPU 3, driver for CUDA 13.2, CuPy 14.9, lingrad_rs {lg.__version__}"
    check_rows(result["rows"])
    # PyTorch would need a GPU of its own.
    assert {row["method"] for row in result["rows"]} == {row["method"] for row in result["rows"] if row["errors"]}


def test_the_table_of_a_gpu_names_it(on_gpu):
    code, out, _ = on_gpu(fake_cupy)
    assert code == 0
    assert all(words in out for words in ("Fake GPU 3", "CuPy 14.9", "degree 2 fitted", "2,048"))
    assert "PyTorch with CUDA is not installed" in out


def test_seconds_of_a_gpu_are_those_between_its_events():
    calls = []
    seconds = Gpu(fake_cupy()).seconds(lambda: calls.append(time.sleep(0.01)), 3)
    assert len(calls) == 3
    assert 3 <= seconds < 30


def test_lengths_that_do_not_fit_a_gpu_s_memory_are_left_out_and_told(on_gpu):
    # In float32 four inputs and sixteen results, in float64 four of each, of 16,384 numbers at 2048 tokens.
    code, out, err = on_gpu(lambda: fake_cupy(free=3 << 19), "--json")
    assert code == 0
    assert {row["n"] for row in json.loads(out)["rows"]} == {1024}
    assert err == "lingrad: n = 2,048 is left out: its arrays take 2.2 MiB, and there is room for 1.5 MiB\n"


def scaled(methods, sizes, **options):
    """Every method at every size, however long it takes."""
    return timing.scaling(
        methods,
        sizes,
        timing.Case(64, 4, 1, True),
        score_std=0.3,
        dtype="float32",
        rounds=1,
        limit=1e4,
        progress=lambda n: None,
        **options,
    )


@pytest.mark.parametrize("error", [lg.DeviceError, MemoryError])
def test_a_method_without_the_memory_that_it_needs_is_left_out_and_told(error):
    def prepare(q, k, v, dout, causal):
        def both():
            raise error("too little memory on the device")

        return lambda: None, both

    told = []
    methods = [timing.Method("greedy", prepare, 1), *timing.engines([1], 4)]
    measured = scaled(methods, [64], tell=told.append, device=Gpu(fake_cupy()))
    assert [row.method for row in measured] == ["exact", "degree 1", "degree 1 fitted", "degree 1 consistent"]
    assert told == ["greedy is left out at n = 64: too little memory on the device"]


@pytest.mark.parametrize("error", [lg.DeviceError, MemoryError])
def test_a_length_whose_methods_do_not_fit_side_by_side_is_left_out_and_told(error):
    calls, told = [], []

    def prepare(q, k, v, dout, causal):
        def both():
            calls.append(len(q[0]))
            if calls == [64, 64]:
                raise error("too little memory on the device")
            return ()

        return lambda: None, both

    measured = scaled([timing.Method("greedy", prepare, 1)], [64, 128], tell=told.append, device=Gpu(fake_cupy()))
    assert [row.n for row in measured] == [128]
    assert told == ["n = 64 is left out: too little memory on the device"]


class NoMemory(Exception):
    """As PyTorch has one."""


@pytest.mark.parametrize("enough", [False, True])
def test_pytorch_without_memory_is_tried_again_after_what_others_keep_is_given_back(enough):
    torch, done = SimpleNamespace(cuda=SimpleNamespace(OutOfMemoryError=NoMemory)), []

    def call():
        done.append("called")
        if not (enough and "released" in done):
            raise NoMemory
        return 3

    device = SimpleNamespace(release=lambda: done.append("released"))
    telling = timing._telling_of_memory(torch, call, device)
    if enough:
        assert telling() == 3
    else:
        with pytest.raises(lg.DeviceError, match="too little memory"):
            telling()
    assert done == ["called", "released", "called"]


def test_a_gpu_is_given_back_what_both_libraries_keep(monkeypatch):
    cupy, done = fake_cupy(), []
    cupy.get_default_memory_pool = lambda: SimpleNamespace(free_all_blocks=lambda: done.append("cupy"))
    torch = SimpleNamespace(cuda=SimpleNamespace(empty_cache=lambda: done.append("torch")))
    monkeypatch.setitem(sys.modules, "torch", torch)
    Gpu(cupy).release()
    assert done == ["cupy", "torch"]


@pytest.mark.parametrize("error", [lg.DeviceError, MemoryError])
def test_a_length_whose_arrays_cannot_be_made_is_left_out_and_told(error):
    made, told = [], []

    class Tight(Host):
        """Has no room for the second length, nor for arrays of two lengths."""

        def array(self, x):
            assert not [n for n, array in made if array() is not None and n != x.shape[1]]
            if x.shape[1] == 128 and made[-1][0] == 128:
                raise error("too little memory on the device")
            made.append((x.shape[1], weakref.ref(x)))
            return x

    measured = scaled(timing.engines([1], 4), [64, 128, 256], tell=told.append, device=Tight())
    assert [row.n for row in measured] == [64] * 4 + [256] * 4
    assert told == ["n = 128 is left out: too little memory on the device"]


def test_without_a_gpu_its_bench_exits_with_2_and_says_why(on_gpu):
    def no_cupy():
        raise lg.DeviceError("there is no GPU: none")

    assert on_gpu(no_cupy) == (2, "", "lingrad: there is no GPU: none\n")


def test_the_bench_of_a_gpu_finds_out_by_itself_that_there_is_none():
    try:
        select.cupy()
    except lg.DeviceError as error:
        reason = str(error)
    else:
        pytest.skip("there is one")
    done = bench(*SMALL, "--device", "gpu")
    assert done.returncode == 2
    assert done.stderr == f"lingrad: {reason}\n"


@pytest.mark.gpu
def test_every_engine_is_timed_on_a_gpu():
    check_rows(rows("--device", "gpu", *DEGREES))
