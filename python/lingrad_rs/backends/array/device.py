"""Where arrays are, how much room there is, and what the array API standard leaves to each library.

Everything in this package goes through a `Space`: the namespace of the arrays at hand (CuPy's; NumPy's and
array-api-strict's in tests), their device, and the size of temporary arrays. Only what the Python array API standard
promises is used, but for what this file holds.
"""

from __future__ import annotations

import contextlib
import sys
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np

from ...errors import DeviceError
from . import kernels
from .libraries import is_cupy, library_of

try:
    import array_api_compat
except ImportError as error:
    raise DeviceError(
        "arrays other than NumPy's need array-api-compat: pip install 'lingrad_rs[cuda12]', or 'lingrad_rs[cuda13]'"
    ) from error

__all__ = ["Space", "free_bytes", "run", "space_of"]

Array = Any
_R = TypeVar("_R")

# Numbers of a temporary array: at least, at most (beyond it nothing is gained), and where memory cannot be asked for.
_LEAST = 1 << 12
_MOST = 1 << 26
_USUAL = 1 << 22
# Temporary arrays of one step together are about so many of the largest one.
_ARRAYS = 16
# Bytes that are left to the libraries of CUDA.
_LIBRARIES = 1 << 28
# After running out of memory, a step is tried again with its temporaries so many times smaller.
_SHRINK = (1, 8, 64, 512)


@dataclass(frozen=True)
class Space:
    """A namespace, a device, and how many numbers a temporary array may hold."""

    xp: Any
    device: Any
    numbers: int

    def zeros(self, shape: tuple[int, ...], dtype: Any) -> Array:
        """Zeros."""
        return self.xp.zeros(shape, dtype=dtype, device=self.device)

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Array:
        """Room for numbers that will be written."""
        return self.xp.empty(shape, dtype=dtype, device=self.device)

    def full(self, shape: tuple[int, ...], value: float, dtype: Any) -> Array:
        """One number everywhere."""
        return self.xp.full(shape, value, dtype=dtype, device=self.device)

    def arange(self, start: int, stop: int) -> Array:
        """Integers (64 bits)."""
        return self.xp.arange(start, stop, dtype=self.xp.int64, device=self.device)

    def asarray(self, values: Any, dtype: Any) -> Array:
        """Numbers of the host, on the device: for constants and samples."""
        return self.xp.asarray(np.asarray(values), dtype=dtype, device=self.device)

    def astype(self, x: Array, dtype: Any) -> Array:
        """``x`` in another dtype; itself where it has that one."""
        return self.xp.astype(x, dtype, copy=False)

    def wide(self, x: Array) -> Array:
        """``x`` in float64."""
        return self.astype(x, self.xp.float64)

    def host(self, x: Array) -> np.ndarray[Any, Any]:
        """A copy on the host, for samples and for what errors say; waits for the device."""
        if hasattr(x, "get"):
            return x.get()
        cpu = getattr(self.xp, "Device", None)  # array-api-strict's other devices are not NumPy's
        return np.array(x if cpu is None else x.to_device(cpu("CPU_DEVICE")))

    def synchronize(self) -> None:
        """Wait until the device has done what it was given: for timing alone."""
        cupy = sys.modules.get("cupy")
        if cupy is not None and isinstance(self.device, cupy.cuda.Device):
            cupy.cuda.get_current_stream().synchronize()

    def contiguous(self, x: Array) -> Array:
        """``x`` in C order; itself where it is so already."""
        make = getattr(library_of(x), "ascontiguousarray", None)
        return x if make is None else make(x)

    def tiles(self, count: int, width: int) -> Iterable[tuple[int, int]]:
        """Starts and ends of ranges of so many rows of so many numbers each that fit in temporary arrays."""
        step = max(1, self.numbers // max(width, 1))
        return ((start, min(start + step, count)) for start in range(0, count, step))


def space_of(x: Array) -> Space:
    """The space of an array."""
    xp = array_api_compat.array_namespace(x)
    numbers = _USUAL
    if is_cupy(x):
        cupy = sys.modules["cupy"]
        if cupy.cuda.runtime.is_hip:
            raise DeviceError("the arrays are on an AMD GPU; expected one with CUDA")
        with x.device:
            free = max(free_bytes(cupy) - _LIBRARIES, 0)
        numbers = min(max(free // (_ARRAYS * x.dtype.itemsize), _LEAST), _MOST)
    return Space(xp, array_api_compat.device(x), numbers)


def free_bytes(cupy: Any) -> int:
    """How much memory of the current device arrays may still take: what is free, and what CuPy keeps for them."""
    pool = cupy.get_default_memory_pool()
    free = cupy.cuda.runtime.memGetInfo()[0] + pool.free_bytes()
    limit = pool.get_limit()
    return max(min(free, limit - pool.used_bytes()) if limit else free, 0)


def _is_out_of_memory(error: Exception) -> bool:
    """Whether CuPy's pool, the CUDA runtime or driver, or cuBLAS has found no memory."""
    # cuBLAS that finds no memory when it starts says that it has not been initialised: 1.
    statuses = {"CUDARuntimeError": (2,), "CUDADriverError": (2,), "CUBLASError": (1, 3)}
    return isinstance(error, MemoryError) or getattr(error, "status", None) in statuses.get(type(error).__name__, ())


def _is_missing_library(error: Exception) -> bool:
    """Whether CuPy has not found a library of CUDA, the compiler of its kernels, or the headers for that."""
    missing = isinstance(error, ImportError) or type(error).__name__ == "DynamicLibNotFoundError"
    return missing or (isinstance(error, RuntimeError) and "CUDA headers" in str(error))


def run(x: Array, compute: Callable[[Space], _R]) -> _R:
    """``compute(space)`` on the device of ``x``; where memory runs out, again with smaller temporary arrays.

    Raises
    ------
    DeviceError
        There is too little memory with the smallest temporary arrays too; all of them are gone then.
    """
    space = space_of(x)
    on_device = x.device if is_cupy(x) else contextlib.nullcontext()
    for shrink in _SHRINK:
        try:
            # What is not finite is found by checks of inputs, rows and results; -inf - (-inf) is no news.
            with on_device, np.errstate(all="ignore"):
                return compute(replace(space, numbers=max(space.numbers // shrink, _LEAST)))
        except Exception as error:
            if is_cupy(x) and _is_missing_library(error):
                raise DeviceError(
                    f"a library of CUDA does not load: {error}; install them: pip install 'cupy-cuda12x[ctk]', or "
                    "'cupy-cuda13x[ctk]'"
                ) from error
            if not _is_out_of_memory(error):
                raise
            # Its frames hold the arrays of the attempt.
            traceback.clear_frames(error.__traceback__)
        if is_cupy(x):
            with on_device:
                cupy = sys.modules["cupy"]
                kernels.forget_tables(cupy)
                cupy.get_default_memory_pool().free_all_blocks()
    raise DeviceError(
        f"too little memory on {space.device}, even in small steps; free some, use fewer tokens or heads, or compute "
        "with NumPy arrays"
    )
