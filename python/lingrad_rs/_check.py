"""Checks of what users hand in: each returns the value as the library uses it, or raises one of its errors."""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from .backends import select
from .errors import ArgumentError, DeviceError, DtypeError, NonFiniteError, ShapeError, ToleranceError

__all__ = [
    "array",
    "choice",
    "dtype_name",
    "flag",
    "floats",
    "has",
    "integer",
    "is_float",
    "is_integer",
    "is_text",
    "number",
    "of_kind",
    "overflow",
    "positive",
    "real",
    "reals",
    "same_device",
    "same_dtype",
    "shape",
    "shown",
    "token_ids",
    "token_range",
    "tolerance",
    "type_name",
]

_FLOATS = ("float32", "float64")
_ALL_FLOATS = (*_FLOATS, "float16", "bfloat16")
_NUMPY_FLOATS = frozenset((np.dtype(np.float32), np.dtype(np.float64)))
_LONGEST_TEXT = 500


def array(name: str, value: object) -> Any:
    """``value`` as a plain array of a library that a backend computes with: the same memory, never a copy."""
    if isinstance(value, np.ma.MaskedArray):
        raise DtypeError(f"{name} is a masked array, whose mask would be ignored; expected a plain NumPy array")
    if isinstance(value, np.ndarray):
        return np.asarray(value)
    kind = type_name(value)
    library = select.kind(value)
    if library is not None:
        if not library.is_plain(value):
            raise DeviceError(f"{name} is a {kind}; expected a plain {library.library} array, not one of a subclass")
        return value
    if _is_on_gpu(value):
        raise DeviceError(
            f"{name} is a {kind} on a GPU; expected a CuPy array: lingrad_rs.from_dlpack({name}) is one, of the same "
            f"memory (of PyTorch's with a gradient, lingrad_rs.from_dlpack({name}.detach()))"
        )
    raise DtypeError(f"{name} is a {kind}; expected a NumPy array, or a CuPy array")


def _is_on_gpu(value: object) -> bool:
    try:
        return hasattr(value, "__cuda_array_interface__")
    except RuntimeError:  # PyTorch's tensors on a GPU that require a gradient
        return True
    except Exception:  # of whatever kind its class raises
        return False


def same_device(name: str, x: Any, other: Any, match: str) -> None:
    """Raise unless both arrays are of one library and on one device."""
    if select.kind(x) != select.kind(other):
        raise DeviceError(
            f"{name} is a {type_name(x)} and {match} is a {type_name(other)}; expected arrays of one library: "
            "nothing is copied between devices"
        )
    if _device(x) != _device(other):
        raise DeviceError(
            f"{name} is on {_device(x)} and {match} is on {_device(other)}; expected arrays on one device: nothing is "
            "copied between devices"
        )


def floats(half: bool = False, /, **arrays: object) -> list[Any]:
    """The arrays, once they are known to be float32 or float64, all of the dtype and on the device of the first.

    With ``half`` they may be float16 or bfloat16 too.
    """
    if _are_plain(arrays.values()):
        return list(arrays.values())
    checked: list[Any] = []
    first = next(iter(arrays))
    for name, value in arrays.items():
        x = array(name, value)
        if dtype_name(x) not in (_ALL_FLOATS if half else _FLOATS):
            others = ", float16 or bfloat16" if half else ""
            raise DtypeError(f"{name} has dtype {dtype_name(x)}; expected float32 or float64{others}")
        if checked:
            same_device(name, x, checked[0], match=first)
            same_dtype(name, x, checked[0].dtype, match=first)
        if hasattr(x, "strides"):
            _aligned(name, x)
        checked.append(x)
    return checked


def _are_plain(arrays: Iterable[Any]) -> bool:
    """Whether these are NumPy arrays of one of its own dtypes, and aligned: nothing is to be said of them."""
    dtype, size = None, 1
    for x in arrays:
        if type(x) is not np.ndarray or not x.flags.aligned:
            return False
        if dtype is None:
            dtype, size = x.dtype, x.itemsize
            if dtype not in _NUMPY_FLOATS:
                return False
        elif x.dtype != dtype:
            return False
        for step in x.strides:
            if step % size:
                return False
    return True


def of_kind(name: str, value: object, like: Any, kind: str) -> Any:
    """An array of bool, or of any integer dtype, on the device of ``like``, which is q."""
    x = array(name, value)
    if kind == "bool" and dtype_name(x) != "bool":
        other = "; numbers that are added to the scores are the argument bias" if name == "mask" else ""
        raise DtypeError(f"{name} has dtype {dtype_name(x)}; expected bool{other}")
    if kind == "integer" and not is_integer(x):
        raise DtypeError(f"{name} has dtype {dtype_name(x)}; expected an integer dtype")
    same_device(name, x, like, match="q")
    return x


def _aligned(name: str, x: Any) -> None:
    start = x.flags.aligned if isinstance(x, np.ndarray) else x.data.ptr % x.itemsize == 0
    steps = [step for step, length in zip(x.strides, x.shape, strict=True) if length > 1]
    if not start or any(step % x.itemsize for step in steps):
        raise DtypeError(
            f"{name} is not aligned to its item size of {x.itemsize} bytes (strides {x.strides}); "
            "expected an aligned array (a copy is one)"
        )


def same_dtype(name: str, x: Any, dtype: Any, match: str) -> None:
    """Raise unless ``x`` is of ``dtype``."""
    if x.dtype != dtype:
        raise DtypeError(f"{name} has dtype {dtype_name(x)}; expected {_plain_name(dtype)} to match {match}")


def dtype_name(x: Any) -> str:
    """What the dtype of an array is called, without its library."""
    if isinstance(x.dtype, np.dtype) and not x.dtype.isnative:
        return f"{x.dtype} (not in this machine's byte order)"
    return _plain_name(x.dtype)


def _plain_name(dtype: Any) -> str:
    return str(dtype).rpartition(".")[2]


def is_integer(x: Any) -> bool:
    """Whether an array is of an integer dtype, in any byte order."""
    return x.dtype.kind in "iu" if isinstance(x.dtype, np.dtype) else dtype_name(x).startswith(("int", "uint"))


def is_float(x: Any) -> bool:
    """Whether an array is float32 or float64."""
    return dtype_name(x) in _FLOATS


def _device(x: Any) -> object:
    return getattr(x, "device", "cpu")


def overflow(name: str) -> NonFiniteError:
    """The error where a result is not finite: the arguments are, so something overflowed."""
    return NonFiniteError(
        f"{name} overflows: the arguments are too large for their dtype; scale them down, or use float64"
    )


def shown(value: object) -> str:
    """A value as messages have it: the beginning of its repr; of what has none, such as a huge integer, the type."""
    try:
        text = repr(value)
    except Exception:  # of whatever kind its class raises
        return f"<{type_name(value)}>"
    return text if len(text) <= _LONGEST_TEXT else f"{text[:_LONGEST_TEXT]}..."


def has(value: object, attribute: str) -> bool:
    """Whether a value has an attribute; what cannot be asked has none."""
    try:
        return hasattr(value, attribute)
    except Exception:  # of whatever kind its class raises
        return False


def type_name(value: object) -> str:
    """What the type of a value is called, with its module."""
    return f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")


def shape(name: str, x: Any, expected: Sequence[int | str], match: str = "") -> None:
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


def token_ids(name: str, value: object, below: int, like: Any) -> Any:
    """Tokens ``0 <= t < below`` of any integer dtype, on the device of ``like``: a new array of contiguous integers."""
    x = array(name, value)
    if not is_integer(x):
        raise DtypeError(f"{name} has dtype {dtype_name(x)}; expected an integer dtype")
    same_device(name, x, like, match="the parameters")
    if x.ndim == 0:
        raise ShapeError(f"{name} has shape (); expected (..., n)")
    return select.of(x).token_ids(name, x, below)


def token_range(name: str, low: int, high: int, below: int) -> None:
    """Raise unless the least and the greatest token are in ``0 <= t < below``."""
    if low < 0 or high >= below:
        raise ArgumentError(f"{name} holds {low if low < 0 else high}; expected 0 <= token < {below}")


def flag(name: str, value: object) -> bool:
    """True or False, and nothing that merely counts as one."""
    if not isinstance(value, bool | np.bool_):
        raise ArgumentError(f"{name} is {shown(value)}; expected True or False")
    return bool(value)


def integer(name: str, value: object, least: int) -> int:
    """An integer of at least ``least``; neither a bool nor a float counts as one."""
    if isinstance(value, bool | np.bool_) or not isinstance(value, numbers.Integral):
        raise ArgumentError(f"{name} is {shown(value)}; expected an integer >= {least}")
    result = operator.index(value)
    if result < least:
        raise ArgumentError(f"{name} is {shown(result)}; expected an integer >= {least}")
    if result >= 2**63:
        raise ArgumentError(f"{name} is {shown(result)}; expected an integer below 2**63")
    return result


def real(name: str, value: object, expected: str = "a number") -> float:
    """Any real number, NaN and infinity too."""
    if isinstance(value, bool | np.bool_) or not isinstance(value, numbers.Real):
        raise ArgumentError(f"{name} is {shown(value)}; expected {expected}")
    try:
        return float(value)
    except OverflowError:  # an integer or a fraction beyond all floats
        raise ArgumentError(f"{name} is larger in size than any float; expected {expected}") from None


def is_text(value: object) -> bool:
    """Whether a value is text without halves of characters, which neither files nor the compiled module take."""
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False


def number(name: str, value: object) -> float:
    """A finite real number."""
    result = real(name, value, "a finite number")
    if not math.isfinite(result):
        raise ArgumentError(f"{name} is {result}; expected a finite number")
    return result


def reals(values: Iterable[object]) -> tuple[float, ...] | None:
    """Real numbers, NaN and infinity too; None where one is none, or is larger in size than any float."""
    if isinstance(values, np.ma.MaskedArray | bytes | bytearray | memoryview):
        return None
    if isinstance(values, np.ndarray) and values.ndim != 1:
        return None
    try:
        return tuple(real("a number", x) for x in values)
    except ArgumentError:
        return None


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
        raise ArgumentError(f"{name} is {shown(value)}; expected one of {', '.join(map(repr, options))}")
    return value
