"""Where a few tokens carry much of a result, a tolerance is kept too, and an interval covers what it should."""

import pytest
from conftest import FAST_BACKENDS, GPU_NUMPY
from limits import ABOVE_THE_INTERVAL, OVER_AT_ALL
from rare_tokens import FAMILIES, judge

from lingrad_rs import Landmark, Polynomial

pytestmark = pytest.mark.sweep
N = 4096
CASES = 6
# Engines that nobody chose for the data: they may err by much, and the interval must say so.
ENGINES = [Polynomial(degree=2), Polynomial(degree=1, gradient="consistent"), Landmark(rank=64)]


def judged(backend, seeds, n, engines):
    """All results of all families, and a tolerance or None for each."""
    results = []
    for family in FAMILIES:
        for seed in seeds:
            tol, some = judge(backend, family, seed, n, engine=engines[seed % len(engines)])
            results += [(family, seed, tol, result) for result in some]
    return results


def hold_to_intervals(results, record_property):
    assert len(results) > len(FAMILIES), "hardly anything was served by a low-rank engine"
    above = [case for case in results if not case[3].error <= case[3].high]
    record_property("results", len(results))
    record_property("above", len(above))
    assert len(above) <= ABOVE_THE_INTERVAL * len(results), above


@pytest.mark.parametrize("backend", FAST_BACKENDS, indirect=True, ids=lambda backend: backend.name)
def test_results_within_a_tolerance_are(backend, record_property):
    results = judged(backend, range(100, 100 + CASES), N, [None])
    assert len(results) > 10 * CASES, "hardly anything was served by a low-rank engine"
    over = [case for case in results if not case[3].error <= case[2]]
    assert len(over) <= OVER_AT_ALL * len(results), over
    hold_to_intervals(results, record_property)


@pytest.mark.parametrize("backend", FAST_BACKENDS, indirect=True, ids=lambda backend: backend.name)
def test_measured_errors_cover_what_nobody_chose(backend, record_property):
    hold_to_intervals(judged(backend, range(200, 200 + CASES), N, ENGINES), record_property)


@pytest.mark.parametrize("backend", [GPU_NUMPY], indirect=True, ids=lambda backend: backend.name)
def test_the_gpu_path_keeps_its_tolerances_too(backend, record_property):
    results = judged(backend, range(300, 300 + CASES // 2), N // 2, [None])
    assert [case for case in results if not case[3].error <= case[2]] == []
    hold_to_intervals(results, record_property)


@pytest.mark.parametrize("backend", [GPU_NUMPY], indirect=True, ids=lambda backend: backend.name)
def test_the_gpu_path_measures_what_nobody_chose(backend, record_property):
    hold_to_intervals(judged(backend, range(400, 400 + CASES // 2), N // 2, ENGINES), record_property)
