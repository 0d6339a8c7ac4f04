"""Fixtures. A test that takes `backend` runs on each of BACKENDS; `pytest -m gpu` runs those of a GPU alone."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the cores already; before NumPy is imported
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import array_api_strict as strict
import numpy as np
import pytest
from hypothesis import settings
from pairs import cover

import lingrad_rs as lg
from lingrad_rs import _lingrad_rs as core
from lingrad_rs.backends import select
from lingrad_rs.backends.array.plan import rates

# The same examples in every run, however slow the machine.
settings.register_profile("deterministic", derandomize=True, deadline=None, database=None, max_examples=60)
settings.load_profile("deterministic")


@dataclass(frozen=True)
class Backend:
    """Where arrays live and what computes with them: how a NumPy array gets there and back."""

    name: str
    array: Callable[[np.ndarray], Any]
    numpy: Callable[[Any], np.ndarray]
    kinds: tuple[select.Kind, ...] = ()

    @property
    def is_rust(self) -> bool:
        return self.name == "rust"


def _itself(x: np.ndarray) -> np.ndarray:
    assert type(x) is np.ndarray
    return x


# Not the device where arrays lie unless one says otherwise.
STRICT_DEVICE = strict.Device("device1")


def _to_strict(x: np.ndarray) -> Any:
    return strict.asarray(x, device=STRICT_DEVICE)


def _from_strict(x: Any) -> np.ndarray:
    assert x.device == STRICT_DEVICE
    return np.asarray(x.to_device(strict.Device("CPU_DEVICE")))


def memory_of(x: np.ndarray) -> tuple[np.ndarray, int]:
    """All of the memory that an array is a view of, as it lies there, and where in it the array begins, in bytes."""
    owner = x
    while isinstance(owner.base, np.ndarray):
        owner = owner.base
    return owner.ravel(order="K"), x.ctypes.data - owner.ctypes.data


def _to_cupy(x: np.ndarray) -> Any:
    cupy = select.cupy()
    memory, offset = memory_of(x)
    return cupy.ndarray(x.shape, x.dtype, cupy.asarray(memory).data + offset, x.strides)


def _from_cupy(x: Any) -> np.ndarray:
    assert isinstance(x, select.cupy().ndarray)
    return x.get()


RUST = Backend("rust", _itself, _itself)
GPU_NUMPY = Backend("gpu path under NumPy", _itself, _itself, (select.Kind("numpy", "ndarray", "array"),))
GPU_STRICT = Backend(
    "gpu path under array-api-strict",
    _to_strict,
    _from_strict,
    (select.Kind("array_api_strict._array_object", "Array", "array"),),
)
CUPY = Backend("cupy", _to_cupy, _from_cupy)
ON_CUPY = pytest.param(CUPY, marks=pytest.mark.gpu)
BACKENDS = [RUST, GPU_NUMPY, GPU_STRICT, ON_CUPY]
# For tests of large numbers of tokens, where array-api-strict takes long and would tell nothing new.
NUMERIC_BACKENDS = [RUST, GPU_NUMPY, ON_CUPY]
# For tests of many large cases: not the code of a GPU on a CPU.
FAST_BACKENDS = [RUST, ON_CUPY]


# All pairs of options, or all combinations: see `pairs`.
EVERY = "--every-combination"


def pytest_addoption(parser):
    parser.addoption(EVERY, action="store_true", help="run every combination of options, not every pair of them")


def pytest_report_header(config):
    """Says what is left out, and why."""
    lines = ["array-api-strict: in float32 alone, as it tells of calls and not of numbers"]
    if not _asks_for(config, "sweep"):
        lines.append("sweeps over distributions are left out: nox -s sweep, or pytest -m sweep, runs them alone")
    if not config.getoption(EVERY):
        lines.append(f"tests of many options: every pair of options is run ({EVERY} runs all)")
    if _asks_for(config, "gpu") or (reason := _why_no_gpu()) is None:
        return lines
    return [*lines, f"tests on a GPU are left out: {reason}"]


def _asks_for(config, mark):
    return mark in config.getoption("markexpr", "")


def _why_no_gpu():
    """What a user is told who asks for a GPU: no CuPy, no driver, or no device. None where there is one."""
    try:
        select.cupy()
    except lg.DeviceError as error:
        return str(error)
    return None


def pytest_collection_modifyitems(config, items):
    """Leaves out what tells nothing new (the header says what), and the tests that need a GPU where there is none.

    Who asks for those by ``-m gpu`` sees them skipped, with the reason.
    """
    items[:] = [item for item in items if not _is_strict_float64(item)]
    if not _asks_for(config, "sweep"):
        items[:] = [item for item in items if item.get_closest_marker("sweep") is None]
    reason = _why_no_gpu()
    if reason is not None and not _asks_for(config, "gpu"):
        items[:] = [item for item in items if item.get_closest_marker("gpu") is None]
    elif reason is not None:
        for item in items:
            if item.get_closest_marker("gpu") is not None:
                item.add_marker(pytest.mark.skip(reason=reason))
    if not config.getoption(EVERY):
        items[:] = _pairs_of_options(items)


def _pairs_of_options(items):
    """Of every test, cases enough for every pair of options; those on a GPU by themselves."""
    groups = {}
    for item in items:
        on_gpu = item.get_closest_marker("gpu") is not None
        groups.setdefault((item.nodeid.partition("[")[0], on_gpu), []).append(item)
    kept = set()
    for group in groups.values():
        # Options are told apart by their identity: all cases have the same objects.
        cases = [tuple(map(id, item.callspec.params.values())) if hasattr(item, "callspec") else () for item in group]
        kept.update(id(group[i]) for i in cover(cases))
    return [item for item in items if id(item) in kept]


def _is_strict_float64(item):
    """Whether array-api-strict would compute in float64 what it computes in float32 too: it tells of calls alone."""
    params = item.callspec.params if hasattr(item, "callspec") else {}
    return params.get("backend") is GPU_STRICT and params.get("dtype") == np.float64


@pytest.fixture(autouse=True)
def _rates_of_one_machine():
    """Plans choose by these rates, which are those of a fast core, and not by what else this machine does."""
    core.set_rates(4, flops=1.2e11, exps=4e9)
    core.set_rates(8, flops=6e10, exps=1.5e9)
    rates.set_rates(rates.Rates(flops=3e11, exps=2e9, moved=5e9, call=1e-6), flops=1e11)


@pytest.fixture(params=BACKENDS, ids=lambda backend: backend.name.replace(" ", "-"))
def backend(request, monkeypatch):
    monkeypatch.setattr(select, "KINDS", [*request.param.kinds, *select.KINDS])
    return request.param


@pytest.fixture(params=[np.float32, np.float64], ids=lambda dtype: dtype.__name__)
def dtype(request):
    return np.dtype(request.param)


@pytest.fixture
def rng():
    return np.random.default_rng(20240813)


@pytest.fixture
def restore_threads():
    before = lg.get_num_threads()
    yield
    lg.set_num_threads(before)
