"""Fixtures. A further backend is one more entry of BACKENDS."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import settings

import lingrad_rs as lg

# The same examples in every run, however slow the machine.
settings.register_profile("deterministic", derandomize=True, deadline=None, database=None, max_examples=60)
settings.load_profile("deterministic")


@dataclass(frozen=True)
class Backend:
    """Where arrays live: how a NumPy array gets there and back."""

    name: str
    array: Callable[[np.ndarray], Any]
    numpy: Callable[[Any], np.ndarray]


def _itself(x: np.ndarray) -> np.ndarray:
    assert type(x) is np.ndarray
    return x


BACKENDS = [Backend("numpy", _itself, _itself)]


@pytest.fixture(params=BACKENDS, ids=lambda backend: backend.name)
def backend(request):
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
