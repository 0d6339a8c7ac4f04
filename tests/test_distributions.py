"""The drawn inputs are what their names say."""

import re

import numpy as np
import pytest
from distributions import DISTRIBUTIONS

N = 1000
# Most families are scaled to their standard deviation; noise and means that are added later move it by some percent.
NAMED_STD = 0.15


@pytest.mark.sweep
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_a_distribution_is_what_its_name_says(name):
    q, k, v = DISTRIBUTIONS[name](np.random.default_rng(1), N)
    again = DISTRIBUTIONS[name](np.random.default_rng(1), N)
    assert q.shape == k.shape == (N, q.shape[1])
    assert v.shape == (N, v.shape[1])
    for x, y in zip((q, k, v), again, strict=True):
        assert x.dtype == np.float64
        assert np.isfinite(x).all()
        assert np.array_equal(x, y)
    if named := re.search(r"(centred )?score std ([\d.]+)$", name):
        if named[1]:
            q, k = q - q.mean(axis=0), k - k.mean(axis=0)
        std = np.std(q @ k.T) / np.sqrt(q.shape[1])
        assert abs(std / float(named[2]) - 1) <= NAMED_STD
    if named := re.search(r"\bd (\d+),", name):
        assert q.shape[1] == int(named[1])
