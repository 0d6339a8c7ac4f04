"""``lingrad bench``: the table, the plot and what the times are of."""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from limits import CLI_COMPARE, FLOAT32_MODEL, HANG_SECONDS, NOT_EXACT

from lingrad_rs import _bench

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


@pytest.mark.parametrize("mask", ["--causal", "--full"])
def test_every_engine_is_timed_at_every_length_and_its_error_told(mask):
    own = [
        row for row in rows(mask, "--degree", "1", "--degree", "2", "--heads", "2") if "PyTorch" not in row["method"]
    ]
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
    ],
)
def test_bad_options_are_told_at_once(arguments, message):
    done = bench("--tokens", "1048576", *arguments)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert message in " ".join(done.stderr.replace("│", " ").split())


def test_scores_have_the_standard_deviation_that_was_asked_for():
    q, k, _, _ = _bench.inputs(_bench.Case(n=500, d=16, heads=1, causal=False), 0.3, "float64")
    assert np.std(q[0] @ k[0].T / 4) == pytest.approx(0.3, rel=0.1)


def test_a_turn_of_short_calls_takes_the_mean_of_many_but_the_first():
    calls = []

    def call():
        calls.append(0)
        time.sleep(0.05 if len(calls) == 1 else 0.001)

    times = _bench.interleaved({"call": call}, 1)["call"]
    assert len(calls) > 2
    assert times.low == times.median == times.high < 0.04


def test_a_relative_error_is_that_of_frobenius():
    exact = np.array([[3.0, 0.0], [0.0, 4.0]])
    assert _bench.relative_error(exact + np.array([[0.0, 0.5], [0.0, 0.0]]), exact) == pytest.approx(0.1)
