"""Runs the package's CUDA kernels on NumPy arrays: the same sources, compiled for the CPU (see cuda_on_cpu.h)."""

import ctypes
import functools
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

from lingrad_rs.backends.array import kernels

HEADER = Path(__file__).with_name("cuda_on_cpu.h")
# The header switches stacks as Linux lets it.
COMPILER = shutil.which("c++") if sys.platform == "linux" else None
NEEDS_COMPILER = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler (c++), or not Linux")
# Numbers on either side of an array that a kernel must leave alone.
GUARD = 64


class Launch(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint) for name in ("grid_x", "grid_y", "block_x", "block_y", "shared")] + [
        ("descending", ctypes.c_int)
    ]


def names(source: str) -> list[str]:
    """The kernels of a file."""
    return re.findall(r'extern "C" __global__ void (?:__launch_bounds__\(\d+\) )?(\w+)\(', source)


@functools.cache
def compiled(file: str, source: str, options: tuple[str, ...]) -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as folder:
        cpp, library = Path(folder, "kernels.cpp"), Path(folder, "kernels.so")
        exports = [f"KERNEL({name})" for name in names(source)]
        cpp.write_text("\n".join([f'#include "{HEADER}"', f'#line 1 "{file}"', source, *exports]))
        command = [COMPILER, *options, "-O1", "-shared", "-fPIC", "-w", "-o", library, cpp]
        subprocess.run(command, check=True)
        return ctypes.CDLL(str(library))


def check_limits(grid: tuple[int, int], block: tuple[int, int], shared: int) -> None:
    """What every device can do."""
    assert 1 <= grid[0] < 2**31
    assert 1 <= grid[1] <= 65535
    assert block[0] % 32 == 0
    assert 1 <= block[0] * block[1] <= 1024
    assert 0 <= shared <= 48 * 1024


def launch(kernel, grid, block, args, shared=0, descending=False):
    """`kernels._launch` without a GPU."""
    check_limits(grid, block, shared)
    library = compiled(kernel.file, kernel.source(), kernel.options)
    guarded = [_guarded(x) if isinstance(x, np.ndarray) else None for x in args]
    values = [
        np.array(x if copy is None else copy.ctypes.data + GUARD * x.itemsize)
        for x, copy in zip(args, guarded, strict=True)
    ]
    pointers = (ctypes.c_void_p * len(args))(*[value.ctypes.data for value in values])
    how = Launch(*grid, *block, shared, descending)
    result = getattr(library, f"run_{kernel.name}")(ctypes.byref(how), pointers)
    assert result == 0, {1: "threads wait at different barriers", 2: "written beyond the shared memory"}[result]
    for x, copy in zip(args, guarded, strict=True):
        if copy is not None:
            assert (copy[:GUARD].tobytes(), copy[-GUARD:].tobytes()) == (_guard(x).tobytes(),) * 2
            if x.flags.writeable:
                x[...] = copy[GUARD:-GUARD].reshape(x.shape)


def _guard(x):
    return np.frombuffer(b"\xff" * x.itemsize * GUARD, x.dtype)  # NaN, if they are no integers


def _guarded(x):
    assert x.flags.c_contiguous
    return np.concatenate([_guard(x), x.reshape(-1), _guard(x)])


def run_on_cpu(patch, **options):
    """Has kernels take NumPy's arrays."""
    patch.setattr(kernels, "_launch", functools.partial(launch, **options))
    patch.setattr(kernels, "_table", lambda x, coordinates: np.ascontiguousarray(coordinates))
