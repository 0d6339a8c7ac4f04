"""CUDA kernels for what plain array code would move too many bytes for.

Each function is the twin of plain code in `monomials` or `tiles`, which says what it computes; the kernels are in
``cuda/monomials.cu`` and ``cuda/tiles.cu``. They are launched on the current stream of the current device, which is
that of the arrays; nothing waits, but the first call with other monomials. Inputs that are no contiguous arrays are
copied into some; results always are.

All kernels are deterministic: no atomics, and sums in an order that only the shapes decide.
"""

from __future__ import annotations

import functools
import math
import sys
from dataclasses import dataclass
from importlib import resources
from typing import Any

import numpy as np

from .libraries import is_cupy, library_of

__all__ = [
    "exponentials",
    "forget_tables",
    "gaussian",
    "monomial_features",
    "monomial_pullback",
    "score_gradients",
    "usable",
]

Array = Any

_WARP = 32
# Shared memory that every device gives a block without being asked for more.
_SHARED_BYTES = 48 * 1024
# Threads of a block where nothing else limits them: two blocks or more fit on a multiprocessor with any registers.
_THREADS = 256
_MOST_THREADS = 1024
# The second number of a grid is no greater; the first may be 2^31 - 1, for more tokens or rows than fit in memory.
_MOST_SECOND = 65535
# Numbers of a row that a thread takes in a pass; HELD of tiles.cu.
_HELD = 8
# Threads that keep a device busy: about what an H100 holds.
_BUSY = 1 << 18
# A slice of the monomials is at least so many times as long as a token, which is read again for each slice.
_SLICE = 16


@dataclass(frozen=True)
class Kernel:
    """A kernel: the file that it is in, its name there, and how the file is compiled."""

    file: str
    name: str
    options: tuple[str, ...]

    def source(self) -> str:
        """The text of the file."""
        return (
            resources.files("lingrad_rs.backends.array")
            .joinpath("cuda")
            .joinpath(self.file)
            .read_text(encoding="utf-8")
        )


def usable(x: Array) -> bool:
    """Whether the kernels take an array: one of CuPy."""
    return is_cupy(x)


def monomial_features(x: Array, coordinates: np.ndarray[Any, Any]) -> Array:
    """``phi`` of tokens ``x (..., d, tokens)``: ``(..., r, tokens)``.

    ``coordinates (r, degree)`` is that of `Monomials` of d coordinates, up to a degree.
    """
    library = library_of(x)
    r, degree = coordinates.shape
    *batch, d, tokens = x.shape
    if degree == 0:
        return library.ones((*batch, r, tokens), dtype=x.dtype)
    phi = library.empty((*batch, r, tokens), dtype=x.dtype)
    if phi.size:
        x = library.ascontiguousarray(x)
        threads, shared, slices, slice_ = _by_tokens(x, r, arrays=1)
        args = (x, _table(x, coordinates), phi, *_sizes(x), np.int64(r), np.int64(slice_), np.int32(shared > 0))
        _launch(_kernel("monomial_features", x, degree), _blocks(x.size // d, threads, slices), threads, args, shared)
    return phi


def monomial_pullback(x: Array, u: Array, coordinates: np.ndarray[Any, Any]) -> Array:
    """``J_phi(x)^T u``: ``(..., d, tokens)``, of ``u (..., r, tokens)``.

    ``coordinates`` is that of `monomial_features`.
    """
    library = library_of(x)
    r, degree = coordinates.shape
    d = x.shape[-2]
    if degree == 0 or not x.size:
        return library.zeros(x.shape, dtype=x.dtype)
    x, u = library.ascontiguousarray(x), _fitted(u, (*x.shape[:-2], r, x.shape[-1]), x.dtype)
    threads, shared, slices, slice_ = _by_tokens(x, r, arrays=2)
    parts = library.empty((slices, *x.shape), dtype=x.dtype)
    args = (x, u, _table(x, coordinates), parts, *_sizes(x), np.int64(r), np.int64(slice_), np.int32(shared > 0))
    _launch(_kernel("monomial_pullback", x, degree), _blocks(x.size // d, threads, slices), threads, args, shared)
    if slices == 1:
        return parts[0]
    dx = library.empty(x.shape, dtype=x.dtype)
    args = (parts, dx, np.int64(x.size), np.int64(slices))
    _launch(_kernel("sum_slices", x, degree), _blocks(x.size, (_THREADS, 1)), (_THREADS, 1), args)
    return dx


def exponentials(
    s: Array, most: Array, bias: Array | None, first: Array | None, last: Array | None
) -> tuple[Array, Array, Array]:
    """``e^(s + bias - M)`` in place of ``s``, the rows' M and their sums."""
    library = library_of(s)
    s, most = library.ascontiguousarray(s), _fitted(most, s.shape[:-1], s.dtype)
    greatest, sums = library.empty(most.shape, dtype=s.dtype), library.empty(most.shape, dtype=s.dtype)
    if most.size:
        keys = s.shape[-1]
        across = min(max(_power_of_two(-(-keys // _HELD)), _WARP), _MOST_THREADS)
        threads = (across, _THREADS // _WARP if across == _WARP else 1)
        shared = across // _WARP * s.dtype.itemsize if across > _WARP else 0
        args = (s, most, *_seen(s, bias, first, last), greatest, sums, *_row_sizes(s))
        _launch(_kernel("exponentials", s), (-(-most.size // threads[1]), 1), threads, args, shared)
    return s, greatest, sums


def score_gradients(
    s: Array,
    e: Array,
    most: Array,
    scale: Array,
    delta: Array,
    bias: Array | None,
    first: Array | None,
    last: Array | None,
) -> tuple[Array, Array]:
    """``f = e^(s + bias - M) scale`` in place of ``s``, and ``f (e - delta)`` in place of ``e``."""
    library = library_of(s)
    s, e = library.ascontiguousarray(s), library.ascontiguousarray(e)
    if s.size:
        rows = [_fitted(x, s.shape[:-1], s.dtype) for x in (most, scale, delta)]
        args = (s, e, *rows, *_seen(s, bias, first, last), *_row_sizes(s))
        _launch(_kernel("score_gradients", s), *_by_rows(s), args)
    return s, e


def gaussian(products: Array, offsets: Array, norms: Array) -> Array:
    """``e^(products + offsets - norms)`` in place of ``products``, of exponents no greater than 0."""
    products = library_of(products).ascontiguousarray(products)
    if products.size:
        batch, blocks, r, tokens = products.shape
        offsets = _fitted(offsets, (batch, r), products.dtype)
        norms = _fitted(norms, (batch, blocks, tokens), products.dtype)
        args = (products, offsets, norms, *_row_sizes(products))
        _launch(_kernel("gaussian", products), *_by_rows(products), args)
    return products


def _by_tokens(x: Array, r: int, arrays: int) -> tuple[tuple[int, int], int, int, int]:
    """For one thread a token: a block's threads and shared bytes, the slices of the monomials, and how long they are.

    Shared memory holds so many arrays as long as a token for each thread; none where a warp's do not fit.
    """
    d = x.shape[-2]
    token_bytes = arrays * d * x.dtype.itemsize
    threads = min(_SHARED_BYTES // token_bytes // _WARP * _WARP, 4 * _WARP)
    shared = threads * token_bytes
    # Few tokens with many monomials each would leave most of the device idle.
    slices = max(1, min(_BUSY // (x.size // d), r // (_SLICE * d), _MOST_SECOND))
    slice_ = -(-r // slices)
    return (threads or 4 * _WARP, 1), shared, -(-r // slice_), slice_


def _by_rows(x: Array) -> tuple[tuple[int, int], tuple[int, int]]:
    """Grid and block for entries of rows ``(batch, blocks, rows, keys)``, a few a thread."""
    keys = x.shape[-1]
    across = min(max(_power_of_two(keys), _WARP), _THREADS)
    threads = (across, _THREADS // across if across == _WARP else 1)
    chunks = min(-(-keys // (across * _HELD)), _MOST_SECOND)
    return (-(-(x.size // keys) // threads[1]), chunks), threads


def _blocks(count: int, threads: tuple[int, int], slices: int = 1) -> tuple[int, int]:
    return -(-count // threads[0]), slices


def _power_of_two(n: int) -> int:
    """The smallest that is no less than n."""
    return 1 << max(n - 1, 0).bit_length()


def _sizes(x: Array) -> tuple[np.int64, np.int64, np.int32]:
    """All tokens, those of an element of the batch, and their coordinates."""
    d, tokens = x.shape[-2:]
    return np.int64(x.size // d), np.int64(tokens), np.int32(d)


def _row_sizes(x: Array) -> tuple[np.int64, ...]:
    """All rows, blocks, the rows of a block, and keys."""
    return tuple(np.int64(n) for n in (math.prod(x.shape[:-1]), *x.shape[1:]))


def _seen(s: Array, bias: Array | None, first: Array | None, last: Array | None) -> tuple[Array, Array, Array]:
    batch, blocks, rows, keys = s.shape
    nothing = np.int64(0)  # a null pointer
    given = first is not None and last is not None
    return (
        nothing if bias is None else _fitted(bias, (batch, blocks, keys), s.dtype),
        _fitted(first, (blocks, rows), np.int32) if given else nothing,
        _fitted(last, (blocks, rows), np.int32) if given else nothing,
    )


def _fitted(x: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    """``x`` as a contiguous array of a shape; itself where it is one."""
    library = library_of(x)
    return library.ascontiguousarray(library.broadcast_to(x, shape), dtype=dtype)


_tables: dict[tuple[int, int, int], Array] = {}
"""Coordinates of monomials on devices, by the device, d, and the degree: ``4 r degree`` bytes of each."""


def _table(x: Array, coordinates: np.ndarray[Any, Any]) -> Array:
    library = library_of(x)
    key = (library.cuda.Device().id, x.shape[-2], coordinates.shape[1])
    if (table := _tables.get(key)) is None:
        # This once the host waits: afterwards any stream may read it.
        table = _tables.setdefault(key, library.asarray(np.ascontiguousarray(coordinates), blocking=True))
    return table


def forget_tables(cupy: Any) -> None:
    """Lets go of all memory that is kept on the current device, once nothing there reads it any more."""
    device = cupy.cuda.Device()
    device.synchronize()
    for key in list(_tables):
        if key[0] == device.id:
            _tables.pop(key, None)


def _kernel(name: str, x: Array, degree: int | None = None) -> Kernel:
    options = ("-std=c++17", f"-DREAL={'float' if x.dtype.itemsize == 4 else 'double'}")
    if degree is None:
        return Kernel("tiles.cu", name, options)
    return Kernel("monomials.cu", name, (*options, f"-DDEGREE={degree}"))


def _launch(
    kernel: Kernel, grid: tuple[int, int], block: tuple[int, int], args: tuple[Any, ...], shared: int = 0
) -> None:
    _compiled(kernel)(grid, block, args, shared_mem=shared)


@functools.cache
def _compiled(kernel: Kernel) -> Any:
    # CuPy compiles a file once for all kernels with the same options, and keeps the result on disk.
    return sys.modules["cupy"].RawKernel(kernel.source(), kernel.name, kernel.options)
