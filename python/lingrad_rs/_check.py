"""Checks of what users hand in: each returns the value as the library uses it, or raises one of its errors."""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import ArgumentError, DeviceError, DtypeError, ShapeError, ToleranceError

__all__ = [
    "array",
    "choice",
    "flag",
    "floats",
    "integer",
    "number",
    "positive",
    "same_dtype",
    "shape",
    "token_ids",
    "tolerance",
]

_FLOATS = (np.dtype(np.float32), np.dtype(np.float64))


def array(name: str, value: object) -> NDArray[Any]:
    """``value`` as a plain NumPy array: a view of the same memory, never a copy."""
    if isinstance(value, np.ma.MaskedArray):
        raise DtypeError(f"{name} is a masked array, whose mask would be ignored; expected a plain NumPy array")
    if isinstance(value, np.ndarray):
        return np.asarray(value)
    kind = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
    if hasattr(value, "__cuda_array_interface__"):
        raise DeviceError(
            f"{name} is a {kind} on a GPU; this version computes on the CPU only and copies nothing between devices; "
            "expected a NumPy array"
        )
    raise DtypeError(f"{name} is a {kind}; expected a NumPy array")


def floats(**arrays: object) -> list[NDArray[Any]]:
    """The arrays, once they are known to be float32 or float64, all of the dtype of the first."""
    checked: list[NDArray[Any]] = []
    first = next(iter(arrays))
    for name, value in arrays.items():
        x = array(name, value)
        if x.dtype not in _FLOATS:
            raise DtypeError(f"{name} has dtype {_dtype_name(x.dtype)}; expected float32 or float64")
        if checked:
            same_dtype(name, x, checked[0].dtype, match=first)
        steps = [step for step, length in zip(x.strides, x.shape, strict=True) if length > 1]
        if not x.flags.aligned or any(step % x.itemsize for step in steps):
            raise DtypeError(
                f"{name} is not aligned to its item size of {x.itemsize} bytes (strides {x.strides}); "
                "expected an aligned array (a copy is one)"
            )
        checked.append(x)
    return checked


def same_dtype(name: str, x: NDArray[Any], dtype: np.dtype[Any], match: str) -> None:
    """Raise unless ``x`` is of ``dtype``."""
    if x.dtype != dtype:
        raise DtypeError(f"{name} has dtype {x.dtype}; expected {dtype} to match {match}")


def _dtype_name(dtype: np.dtype[Any]) -> str:
    return str(dtype) if dtype.isnative else f"{dtype} (not in this machine's byte order)"


def shape(name: str, x: NDArray[Any], expected: Sequence[int | str], match: str = "") -> None:
    """Raise unless ``x`` has the expected shape: a number must be met, a name stands for any length.

    A leading ``"..."`` stands for any number of axes.
    """
    wanted = list(expected)
    got = list(x.shape)
    if wanted and wanted[0] == "...":
        wanted = wanted[1:]
        got = got[max(len(got) - len(wanted), 0) :]
    if len(got) != len(wanted) or any(isinstance(w, int) and w != g for w, g in zip(wanted, got, strict=True)):
        comma = "," if len(expected) == 1 else ""
        text = f"({', '.join(map(str, expected))}{comma})"
        raise ShapeError(f"{name} has shape {x.shape}; expected {text}{match and f' to match {match}'}")


def token_ids(name: str, value: object, below: int) -> NDArray[np.uint32]:
    """Integer tokens ``0 <= t < below`` of any integer dtype, as a new array of contiguous 32-bit ones."""
    x = array(name, value)
    if x.dtype.kind not in "iu":
        raise DtypeError(f"{name} has dtype {x.dtype}; expected an integer dtype")
    if x.ndim == 0:
        raise ShapeError(f"{name} has shape (); expected (..., n)")
    if x.size:
        low, high = int(x.min()), int(x.max())
        if low < 0 or high >= below:
            raise ArgumentError(f"{name} holds {low if low < 0 else high}; expected 0 <= token < {below}")
    return np.array(x, dtype=np.uint32, order="C")


def flag(name: str, value: object) -> bool:
    """True or False, and nothing that merely counts as one."""
    if not isinstance(value, bool | np.bool_):
        raise ArgumentError(f"{name} is {value!r}; expected True or False")
    return bool(value)


def integer(name: str, value: object, least: int) -> int:
    """An integer of at least ``least``; neither a bool nor a float counts as one."""
    if isinstance(value, bool | np.bool_) or not isinstance(value, numbers.Integral):
        raise ArgumentError(f"{name} is {value!r}; expected an integer >= {least}")
    result = operator.index(value)
    if result < least:
        raise ArgumentError(f"{name} is {result}; expected an integer >= {least}")
    if result >= 2**63:
        raise ArgumentError(f"{name} is {result}; expected an integer below 2**63")
    return result


def number(name: str, value: object) -> float:
    """A finite real number."""
    if isinstance(value, bool | np.bool_) or not isinstance(value, numbers.Real):
        raise ArgumentError(f"{name} is {value!r}; expected a finite number")
    result = float(value)
    if not math.isfinite(result):
        raise ArgumentError(f"{name} is {result}; expected a finite number")
    return result


def positive(name: str, value: object) -> float:
    """A finite number above 0."""
    result = number(name, value)
    if result <= 0:
        raise ArgumentError(f"{name} is {result}; expected a number above 0")
    return result


def tolerance(name: str, value: object) -> float:
    """A number in (0, 1)."""
    result = number(name, value)
    if not 0 < result < 1:
        raise ToleranceError(f"{name} is {result}; expected a number in (0, 1)")
    return result


def choice(name: str, value: object, options: Sequence[str]) -> str:
    """One of ``options``."""
    if not isinstance(value, str) or value not in options:
        raise ArgumentError(f"{name} is {value!r}; expected one of {', '.join(map(repr, options))}")
    return value
