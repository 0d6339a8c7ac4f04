"""Checks that numbers are finite, and what is said where they are not. Each waits for the device, once."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from .... import _check
from ....errors import NonFiniteError
from ..device import Space

__all__ = ["check_arguments", "check_heads", "check_overflow", "check_results", "first_bad"]

Array = Any


def first_bad(sp: Space, good: Mapping[str, Array]) -> str | None:
    """The first name whose flags do not all hold."""
    all_good = {name: sp.xp.all(flags) for name, flags in good.items()}
    if not all_good or bool(sp.xp.all(sp.xp.stack(list(all_good.values())))):
        return None
    return next(name for name, flag in all_good.items() if not bool(flag))


def check_arguments(sp: Space, **arrays: Array | None) -> None:
    """Raise where an argument of a module holds NaN or infinity."""
    bad = first_bad(sp, {name: sp.xp.isfinite(x) for name, x in arrays.items() if x is not None})
    if bad is not None:
        raise NonFiniteError(f"{bad} holds NaN or infinity; expected finite numbers")


def check_overflow(sp: Space, results: Mapping[str, Array]) -> None:
    """Raise where a result by name is not finite: the arguments are, so something overflowed."""
    bad = first_bad(sp, {name: sp.xp.isfinite(x) for name, x in results.items()})
    if bad is not None:
        raise _check.overflow(bad)


def check_heads(sp: Space, key_bias: Array | None = None, **arrays: Array) -> None:
    """Raise where an array ``(..., rows, columns)`` holds NaN or infinity.

    Of ``key_bias (..., m)``, minus infinity is allowed.
    """
    good = {name: sp.xp.isfinite(x) for name, x in arrays.items()}
    if key_bias is not None:
        good["key_bias"] = sp.xp.isfinite(key_bias) | (key_bias == -math.inf)
    bad = first_bad(sp, good)
    if bad is None:
        return
    if bad == "key_bias":
        at = int(np.flatnonzero(~sp.host(good[bad]).reshape(-1))[0])
        held = "NaN" if np.isnan(sp.host(key_bias).reshape(-1)[at]) else "inf"
        j = at % good[bad].shape[-1]
        raise NonFiniteError(f"key_bias holds {held} at key {j}; expected finite numbers or -inf")
    h = _first_bad_head(sp.host(good[bad]))
    raise NonFiniteError(f"{bad} holds NaN or infinity (in head {h}, counting from 0); expected finite numbers")


def check_results(sp: Space, **arrays: Array) -> None:
    """Raise where a result ``(..., rows, columns)`` is not finite: its inputs were, so something overflowed."""
    good = {name: sp.xp.isfinite(x) for name, x in arrays.items()}
    bad = first_bad(sp, good)
    if bad is not None:
        h = _first_bad_head(sp.host(good[bad]))
        raise NonFiniteError(
            f"{bad} overflows in head {h} (counting from 0): its inputs are too large for their dtype; scale them "
            "down, or use float64"
        )


def _first_bad_head(good: np.ndarray[Any, Any]) -> int:
    heads = good.reshape(math.prod(good.shape[:-2]), -1)
    return int(np.flatnonzero(~heads.all(axis=1))[0])
