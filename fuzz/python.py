"""Hostile inputs for the Python entry points: ``python fuzz/python.py --seconds 60``, with NumPy's arrays.

``--array-path`` computes with them by the code that is for arrays on GPUs.

Input ``i`` of a seed is always the same: ``--seed S --only I`` computes it alone, and tells what it is. A find is

- an exception that is neither a `LingradError` nor named in the docstring under Raises (`MemoryError` aside),
- a `LingradError` itself, which stands for a panic, or a warning,
- a result of another shape or dtype than promised, one that is not finite, or one that shares memory with an argument,
- an argument that has been changed,
- more than 10 seconds, or the end of the process.

A child process computes, and its parent watches: what kills or hangs the child is reported with its number, and the
next child goes on behind it.
"""

from __future__ import annotations

import argparse
import builtins
import contextlib
import copy
import faulthandler
import inspect
import io
import json
import math
import mmap
import os
import pickle
import random
import re
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

import lingrad_rs as lg
from lingrad_rs.backends import select

LIMIT = 10.0  # seconds that an input may take
ROOM = 8 << 30  # bytes of addresses that a child may have

# Files in memory, where there is such a folder.
MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None

F32, F64 = np.dtype(np.float32), np.dtype(np.float64)


class Find(Exception):
    """What should not be."""


# Values -----------------------------------------------------------------------------------------------------------


class RaisingArray:
    """No array, and says so by an error."""

    def __array__(self, *args: object, **kwargs: object) -> Any:
        raise RuntimeError("no array")

    def __len__(self) -> int:
        raise RuntimeError("no length")


class RaisingAttributes:
    """Whatever is asked of it is an error."""

    def __getattr__(self, name: str) -> Any:
        raise KeyError(name)


class RaisingRepr:
    """Cannot even be told."""

    def __repr__(self) -> str:
        raise RuntimeError("no text")


class OnGpu:
    """What arrays on a GPU have."""

    __cuda_array_interface__ = {"shape": (4, 4), "typestr": "<f8", "data": (0, True), "version": 3}  # noqa: RUF012


class OfNumPy(np.ndarray):
    """A subclass with its own idea of what arrays do."""

    def __array_finalize__(self, other: object) -> None:
        self.note = "mine"

    def __add__(self, other: object) -> Any:
        raise RuntimeError("not to be added to")

    def __array_function__(self, *args: object, **kwargs: object) -> Any:
        raise RuntimeError("no functions")


class DerivedPolynomial(lg.Polynomial):
    """An engine that only its author knows."""


class Endless:
    """A sequence that claims more than there is."""

    def __len__(self) -> int:
        return 10**6

    def __getitem__(self, i: int) -> float:
        if i > 10**6:
            raise IndexError
        return 0.5


class Number(float):
    """A number of a derived class."""


class Text(str):
    """A text of a derived class."""


class Path_(os.PathLike):
    """A path that is none."""

    def __fspath__(self) -> Any:
        return 5


class Draw:
    """All that is drawn for one input."""

    def __init__(self, seed: int, index: int, folder: Path) -> None:
        self.r = random.Random((seed << 64) + index)
        self.index = index
        self.folder = folder
        self._g: np.random.Generator | None = None
        self.held: list[tuple[np.ndarray, bytes]] = []
        # How often a thing is not as it should be.
        self.odd = self.r.choice((0.0, 0.0, 0.01, 0.04, 0.2))

    @property
    def g(self) -> np.random.Generator:
        if self._g is None:
            self._g = np.random.Generator(np.random.SFC64(self.r.getrandbits(64)))
        return self._g

    def oddly(self) -> bool:
        return self.r.random() < self.odd

    def pick(self, *options: Any) -> Any:
        return self.r.choice(options)

    def size(self, least: int = 0) -> int:
        """How many tokens: few, and at times some more."""
        r = self.r
        x = r.random()
        if x < 0.03:
            return max(least, r.choice((0, 63, 64, 65, 96, 112, 113, 127, 128, 129, 200)))
        if x < 0.032:
            return r.choice((1024, 1025, 1030, 1300))
        return r.randint(least if x > 0.1 else 0, 12 if x < 0.8 else 40)

    def hostile(self) -> Any:
        """Anything at all."""
        return self.pick(*HOSTILE)()

    def number(self, *usual: Any) -> Any:
        """One of the usual values, or something odd."""
        if not self.oddly():
            return self.pick(*usual)
        return self.pick(*NUMBERS) if self.r.random() < 0.7 else self.hostile()

    def choice(self, *usual: Any) -> Any:
        return self.hostile() if self.oddly() else self.pick(*usual)

    def dtype(self) -> np.dtype:
        return self.pick(F32, F64)

    def numbers(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """Contents: mostly plain, and at times of any size."""
        r = self.r
        dtype = dtype if dtype in (F32, F64) else F32  # results of user's arrays may be of any
        info = np.finfo(dtype)
        kind = r.random()
        if kind < 0.75 or not self.odd:
            x = self.g.standard_normal(shape) * r.choice((0.1, 0.5, 1.0, 1.0, 3.0))
        elif kind < 0.85:
            scales = (info.max, info.max / 4, np.sqrt(info.max), 1e30, 1e3, info.tiny, info.tiny / 8, 1e-30)
            x = self.g.uniform(-1, 1, shape) * float(r.choice(scales))
        elif kind < 0.9:
            x = np.full(shape, float(r.choice((0.0, -0.0, 1.0, -1.0, info.tiny / 4, info.max, -info.max))))
        elif kind < 0.95:
            some = [0.0, -0.0, 1.0, 1e-40, 1e20, -1e20, float(info.max), float(info.smallest_subnormal)]
            x = self.g.choice(some, shape)
        else:
            x = self.g.integers(-3, 4, shape).astype(np.float64)
        with np.errstate(all="ignore"):
            x = np.asarray(x, np.float64).astype(dtype)
        if x.size and r.random() < 0.3 * self.odd:
            x.flat[r.randrange(x.size)] = r.choice((np.nan, np.inf, -np.inf))
        return x

    def laid_out(self, x: np.ndarray) -> np.ndarray:
        """The same numbers, in other places."""
        r = self.r
        if x.size == 0 and max(x.shape) > 1000:
            return x
        kind = r.random()
        if kind < 0.4:
            result = base = x
        elif kind < 0.5:
            result = base = np.asfortranarray(x)
        elif kind < 0.6 and x.ndim:
            axes = tuple(slice(None, None, -1) if r.random() < 0.5 else slice(None) for _ in x.shape)
            base = np.ascontiguousarray(x[axes])
            result = base[axes]
        elif kind < 0.7 and x.ndim:
            steps = [r.choice((1, 2, 3)) for _ in x.shape]
            base = np.full([n * s + r.randint(0, 1) for n, s in zip(x.shape, steps, strict=True)], 7, x.dtype)
            result = base[tuple(slice(0, n * s, s) for n, s in zip(x.shape, steps, strict=True))]
            result[...] = x
        elif kind < 0.78 and x.ndim:
            axis = r.randrange(x.ndim)
            if x.shape[axis] == 0:
                result = base = x
            else:
                base = np.ascontiguousarray(np.take(x, [0], axis))
                result = np.broadcast_to(base, x.shape)
        elif kind < 0.9:
            base = x.copy()
            base.flags.writeable = False
            result = base
        elif x.ndim >= 2:
            base = np.ascontiguousarray(np.swapaxes(x, -1, -2))
            result = np.swapaxes(base, -1, -2)
        else:
            result = base = x
        self.held.append((base, base.tobytes()))
        return result

    def array(self, shape: tuple[int, ...], dtype: np.dtype, *, bias: bool = False) -> Any:
        """An array as it should be, or anything but."""
        if self.oddly():
            return self.odd_array(shape, dtype)
        x = self.numbers(shape, dtype)
        if bias and x.size and self.r.random() < 0.5:
            self.pad(x)
        return self.laid_out(x)

    def pad(self, bias: np.ndarray) -> None:
        """What callers give keys that are not to be seen, or alone: here and there, or at one end."""
        r = self.r
        if r.random() < 0.5:
            bias[...] = 0
        at = r.randint(0, bias.shape[-1])
        where = r.choice((slice(None, None, r.randint(1, 4)), slice(at), slice(at, None)))
        bias[..., where] = r.choice((-np.inf, -np.inf, np.finfo(bias.dtype).min, -1e9, -5e9, 1e10))

    def odd_array(self, shape: tuple[int, ...], dtype: np.dtype) -> Any:
        r = self.r
        x = self.numbers(shape, dtype)
        kind = r.randrange(24)
        if kind == 0:
            return x.astype(dtype.newbyteorder())
        if kind == 1:
            raw = np.zeros(x.nbytes + 8, np.uint8)
            start = r.randint(1, 7)
            raw[start : start + x.nbytes] = np.frombuffer(x.tobytes(), np.uint8)
            return raw[start : start + x.nbytes].view(dtype).reshape(shape)
        if kind == 2:
            record = np.zeros(
                shape, np.dtype({"names": ["x"], "formats": [dtype], "offsets": [r.randint(0, 5)], "itemsize": 17})
            )
            record["x"] = x
            return record["x"]
        if kind == 3:
            return x.view(OfNumPy)
        if kind == 4:
            return np.ma.array(x, mask=r.random() < 0.5)
        if kind == 5:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return x.view(np.matrix) if x.ndim == 2 else x.view(np.recarray)
        if kind == 6:
            with np.errstate(all="ignore"), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                other = r.choice(
                    (np.float16, np.longdouble, np.complex64, np.int64, np.uint8, np.bool_, object, "S4", "U3")
                )
                return x.astype(other)
        if kind == 7:
            return np.zeros(shape, np.dtype([("a", dtype), ("b", np.int8)]))
        if kind == 8:
            return np.zeros(shape, r.choice(("datetime64[s]", "timedelta64[ns]", "V5", "V0", "S0")))
        if kind == 9:
            return x.tolist()
        if kind == 10:
            return memoryview(np.ascontiguousarray(x))
        if kind == 11:
            return np.asarray(x).ravel()[0] if x.size else np.float64(1)
        if kind == 12:
            return np.array(1.0, dtype)
        if kind == 13:  # of any size at all, without any memory
            axes = list(shape) or [1]
            axes[r.randrange(len(axes))] = r.choice((1 << 8, 1 << 40, 1 << 50, (1 << 59) // max(math.prod(axes), 1)))
            try:
                return np.lib.stride_tricks.as_strided(np.ones(1, dtype), axes, [0] * len(axes), writeable=False)
            except ValueError:
                return np.ones(1, dtype)
        if kind == 14:
            return x[..., None]
        if kind == 15:
            return x[None]
        if kind == 16:
            return x.reshape(-1)
        if kind == 17 and x.ndim:
            axes = list(shape)
            axes[r.randrange(len(axes))] += r.choice((-1, 1))
            return self.numbers(tuple(max(n, 0) for n in axes), dtype)
        if kind == 18:
            return self.numbers(shape, F64 if dtype == F32 else F32)
        if kind == 19 and x.ndim:
            axes = list(shape)
            axes[r.randrange(len(axes))] = 0
            return self.numbers(tuple(axes), dtype)
        if kind == 20:
            return x.reshape((1,) * r.choice((3, 20, 32 - x.ndim)) + x.shape)
        if kind == 21:
            return np.zeros((0, 1 << 40, *(min(size, 8) for size in shape[-2:])), dtype)
        if kind == 22:
            return np.zeros((0, 1 << 50, 8), dtype)
        return self.hostile()

    def tokens(self, shape: tuple[int, ...], below: int) -> Any:
        r = self.r
        if self.oddly():
            return self.odd_array(shape, self.dtype())
        dtype = np.dtype(r.choice(("u1", "i1", "i2", "u4", "i8", "u8", ">i4", ">u8", "<i8", "i8")))
        x = self.g.integers(0, max(below, 1), shape).astype(dtype)
        if self.oddly() and x.size:
            x.flat[r.randrange(x.size)] = r.choice((below, 127, np.iinfo(dtype).max, np.iinfo(dtype).min))
        return self.laid_out(x)


NUMBERS: tuple[Any, ...] = (
    0, 1, -1, 2, 3, 4, 5, 8, 16, 64, 65, 100, 8192, 8193, 2**31, 2**32, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64,
    10**400, -(10**400), 10**5000, 0.0, -0.0, 0.5, 1e-3, 1e-5, 1e-6, 1e-12, 1e-13, 1 - 2**-53, 5e-324, 1e-300, 1e300,
    1.7976931348623157e308, -1e300, math.nan, math.inf, -math.inf, True, False, np.int8(3), np.uint64(2**64 - 1),
    np.float32(0.5), np.float16(0.5), np.longdouble("1e4000"), np.longdouble(0.25), np.float64("nan"), np.bool_(True),
    Fraction(1, 3), Fraction(10**5000), Fraction(1, 10**5000), Decimal("0.1"), 1j, Number(0.1), np.datetime64(1, "s"),
    "1", b"1", None,
)  # fmt: skip

HOSTILE: tuple[Callable[[], Any], ...] = (
    lambda: None, lambda: "", lambda: "exact", lambda: "taylor", lambda: "fitted", lambda: "mean", lambda: "\ud800",
    lambda: "a\0b", lambda: b"", lambda: b"abc", lambda: bytearray(b"abc"), lambda: 0, lambda: 1, lambda: -1,
    lambda: 10**5000, lambda: (10**5000,) * 2, lambda: 2**63, lambda: 0.5, lambda: math.nan, lambda: math.inf,
    lambda: 1j, lambda: True, lambda: [], lambda: {}, lambda: set(), lambda: (), lambda: [[]], lambda: (1.0,),
    lambda: [1, 2, 3], lambda: [1.0, [2.0]], lambda: {"a": 1}, lambda: range(3), lambda: range(10**12),
    lambda: Endless(), lambda: RaisingArray(), lambda: RaisingAttributes(), lambda: RaisingRepr(), lambda: OnGpu(),
    lambda: object, lambda: object(), lambda: len, lambda: lambda x: x, lambda: iter(()), lambda: iter([1, 2]),
    lambda: (x for x in "ab"), lambda: np.float64, lambda: np.dtype("f4"), lambda: np.zeros(0), lambda: np.zeros(3),
    lambda: np.array(2), lambda: np.array(2.5), lambda: np.ones((3, 1)), lambda: np.ones(3, complex),
    lambda: np.array([1, "a"], object), lambda: np.array(["1", "2", "3"]), lambda: np.array([10**400, 1, 2], object),
    lambda: np.ma.array([1.0, 2.0, 3.0], mask=[0, 1, 0]), lambda: np.bool_(False), lambda: np.datetime64("NaT"),
    lambda: np.zeros(3, "V5"), lambda: np.zeros((), [("a", "f8")])[()], lambda: lg.Exact(), lambda: lg.Exact,
    lambda: lg.Auto(0.1), lambda: lg.Polynomial(), lambda: DerivedPolynomial(), lambda: Text("taylor"),
    lambda: Path_(), lambda: NotImplemented, lambda: ..., lambda: type("Meta", (type,), {})("X", (), {}),
    lambda: memoryview(b"abcd"), lambda: slice(3), lambda: sys, lambda: Decimal("NaN"), lambda: Fraction(1, 7),
    lambda: "x" * 100_000, lambda: [None] * 3, lambda: ((1.0, math.nan), (0.0, 1.0)), lambda: ([10**400], [1]),
    lambda: ("ab", "cd"), lambda: (b"ab", b"cd"), lambda: ((1j,), (2j,)), lambda: [RaisingRepr()] * 3,
    lambda: (RaisingRepr(), 1.0),
)  # fmt: skip


# Checks -----------------------------------------------------------------------------------------------------------


def _allowed(function: Any, *, _known: dict[Any, tuple[type, ...]] = {}) -> tuple[type, ...]:  # noqa: B006 (a cache)
    """The errors that a function may raise: the library's, and those that its docstring names."""
    key = getattr(function, "__func__", function)
    if key not in _known:
        text = inspect.getdoc(function) or ""
        names: list[str] = []
        if match := re.search(r"^Raises\n-+\n(.*?)(?=\n\n\w[\w ]*\n-+\n|\Z)", text, re.M | re.S):
            for line in match[1].splitlines():
                if line and not line[0].isspace():
                    names += re.findall(r"\w+", line)
        found = [getattr(lg, name, None) or getattr(builtins, name, None) for name in names]
        _known[key] = (lg.LingradError, MemoryError, *(x for x in found if isinstance(x, type)))
    return _known[key]


def text_of(value: Any, depth: int = 3) -> str:
    """A value in a few words, whatever it is."""
    try:
        if isinstance(value, np.ndarray):
            some = "" if value.size > 12 or value.dtype.hasobject else f" {value.tolist()}"
            aligned = "" if value.flags.aligned else " unaligned"
            return f"<{type(value).__name__} {value.dtype} {value.shape} strides {value.strides}{aligned}{some}>"
        if depth and type(value) in (list, tuple) and len(value) < 12:
            return f"{type(value).__name__}({', '.join(text_of(x, depth - 1) for x in value)})"
        if depth and type(value) is dict and len(value) < 40:
            return "{" + ", ".join(f"{text_of(k, 0)}: {text_of(x, depth - 1)}" for k, x in value.items()) + "}"
        text = repr(value)
        return text if len(text) < 2000 else text[:2000] + " ..."
    except Exception:
        return f"<{type(value).__name__}>"


class Case:
    """One input: calls of the library, and what became of them."""

    def __init__(self, draw: Draw) -> None:
        self.draw = draw

    def call(self, function: Any, *args: Any, of: Any = None, **kwargs: Any) -> Any:
        """The result; `Stop` where the library refuses, as it may."""
        if VERBOSE:
            print(f"  {getattr(function, '__qualname__', function)}({args_text(args, kwargs)})", flush=True)
        self.last = (function, args, kwargs)
        try:
            return function(*args, **kwargs)
        except Exception as error:
            if type(error) is lg.LingradError or not isinstance(error, _allowed(of or function)):
                raise
            raise Stop from None
        finally:
            for base, before in self.draw.held:
                if base.tobytes() != before:
                    raise Find("an argument has been changed")

    def result(self, x: Any, shape: tuple[int, ...], dtype: Any, *others: Any) -> None:
        """A new array, as promised."""
        if type(x) is not np.ndarray:
            raise Find(f"a result is a {type(x)}")
        if x.shape != tuple(shape) or x.dtype != dtype:
            raise Find(f"a result has shape {x.shape} and dtype {x.dtype}; expected {shape} and {dtype}")
        if not x.flags.c_contiguous or not x.flags.writeable:
            raise Find("a result is not a new array in C order")
        if not np.isfinite(x).all():
            raise Find("a result holds NaN or infinity")
        for base, _ in self.draw.held:
            if np.may_share_memory(x, base):
                raise Find("a result shares the memory of an argument")

    def estimate(self, e: Any) -> None:
        if type(e) is not lg.ErrorEstimate:
            raise Find(f"an estimate is a {type(e)}")
        if math.isnan(e.relative) or math.isnan(e.low) or math.isnan(e.high) or not 0 <= e.low <= e.high or e.rows < 0:
            raise Find(f"an estimate is {e}")


class Stop(Exception):
    """The library has refused, as it may."""


VERBOSE = False


def args_text(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    return ", ".join([*map(text_of, args), *(f"{name}={text_of(x)}" for name, x in kwargs.items())])


# Targets ----------------------------------------------------------------------------------------------------------


def engine(case: Case, d: int | None = None) -> Any:
    """An engine, made by calls that are inputs of their own."""
    draw, r = case.draw, case.draw.r
    if draw.r.random() < 0.3 * draw.odd:
        return draw.hostile()
    kind = r.random()
    if kind < 0.2:
        return lg.Exact()
    if kind < 0.6:
        return polynomial(case, d)
    if kind < 0.8:
        constants = None
        if r.random() < 0.2 and d is not None:
            constants = landmark_constants(case, d)
        rank = draw.number(1, 2, 4, 8, 16, 32, 64, 256)
        return case.call(lg.Landmark, rank=rank, seed=draw.number(0, 1, 7), constants=constants)
    return auto(case)


def auto(case: Case) -> Any:
    draw = case.draw
    options = {
        "gradients": draw.choice(True, False),
        "strict_causal": draw.choice(True, False),
        "seed": draw.number(0, 1, 5),
    }
    return case.call(lg.Auto, draw.number(0.5, 0.1, 1e-2, 1e-3, 1e-5, 1e-6, 1e-12, 0.999), **options)


def polynomial(case: Case, d: int | None) -> Any:
    draw, r = case.draw, case.draw.r
    options: dict[str, Any] = {}
    if r.random() < 0.1:
        for name in ("gradient", "shift", "diagonal", "window", "degree", "coefficients"):
            if r.random() < 0.3 * draw.odd:
                options[name] = draw.hostile()
        return case.call(
            lg.Polynomial.from_bound,
            draw.number(0.1, 1e-3, *((1e-9, 1e-16) if d in (1, 2) else ())),
            draw.number(0.1, 1.0, 1e-9, *((5.0,) if d == 1 else ())),
            **options,
        )
    degree = options["degree"] = draw.number(1, 1, 2, 2, 2, 3, 3, 4, 5, 6, 7, 9)
    # What takes memory and time by its sizes alone is left out; still more monomials are refused at once.
    most = 10_000 if d == 1 else 12 if d == 2 else 5 if d is None or d <= 8 else 2
    if isinstance(degree, int) and most < degree < 100_000:
        degree = options["degree"] = 2
    if r.random() < 0.6:
        count = degree + 1 if isinstance(degree, int) and 0 < degree < 100 else 3
        given = [draw.number(1.0, 1.0, 0.5, 0.1, 0.0, -0.2) for _ in range(count)]
        options["coefficients"] = draw.choice("taylor", "fitted", "fitted", given, tuple(given))
    if r.random() < 0.5:
        options["gradient"] = draw.choice("closed_form", "consistent")
    if r.random() < 0.4:
        width = d or 3
        pair = tuple([draw.number(0.0, 0.1, -1.0, 1e3) for _ in range(width + (draw.oddly()))] for _ in range(2))
        options["shift"] = draw.choice("none", "mean", pair)
    if r.random() < 0.4:
        options["diagonal"] = draw.choice("exact", "polynomial")
    if r.random() < 0.5:
        options["window"] = draw.number(0, 1, 2, 5, 16, 64, 1000)
    return case.call(lg.Polynomial, **options)


def landmark_constants(case: Case, d: int) -> Any:
    draw = case.draw
    rank = draw.pick(1, 2, 5)
    return case.call(
        lg.LandmarkConstants,
        scale=draw.number(1.0, 0.5, 1 / math.sqrt(d or 1), -0.5, 0.0),
        query_shift=draw.array((d,), F64),
        key_shift=draw.array((d,), F64),
        balance=draw.number(1.0, 0.5, 2.0),
        landmarks=draw.array((rank, d), F64),
        matrix=draw.array((rank, rank), F64),
    )


def shapes(draw: Draw) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], bool]:
    """Those of q, k and v, which fit together, and whether there is a mask."""
    r = draw.r
    n, d, dv = draw.size(1), r.randint(1, 8), r.randint(1, 5)
    if draw.oddly():
        d, dv = r.choice(((0, 1), (1, 0), (d, 17), (33, 2), (16, 16)))
    causal = r.random() < 0.5
    m = n if causal or r.random() < 0.5 else draw.size(1)
    if n * d > 4000 or m * d > 4000:
        d = min(d, 3)
    heads, key_heads, batch = (), (), ()
    if r.random() < 0.35 and max(n, m) < 300:
        key_heads = (r.randint(0 if draw.oddly() else 1, 3),)
        heads = (key_heads[0] * r.choice((1, 1, 2, 3)),)
        if r.random() < 0.3:
            batch = tuple(r.randint(0 if draw.oddly() else 1, 2) for _ in range(r.randint(1, 2)))
    return (*batch, *heads, n, d), (*batch, *key_heads, m, d), (*batch, *key_heads, m, dv), causal


def options_of_scores(draw: Draw, q: tuple[int, ...], k: tuple[int, ...], dtype: Any) -> dict[str, Any]:
    """Some of the options that need not fit, nor be what engines have."""
    r, n, m = draw.r, q[-2], k[-2]
    side = lambda: r.choice([None, 0, 1, 7, n, m])  # noqa: E731
    given = {
        "query_offset": lambda: r.choice([0, m - n, -1, n, m]),
        "window": lambda: (side(), side()),
        "segment_ids": lambda: np.sort(np.array([r.randint(0, 4) for _ in range(n)], int)),
        "mask": lambda: np.array([r.random() < 0.7 for _ in range(m)], bool),
        "bias": lambda: draw.array((n, 1), dtype, bias=True),
        "softcap": lambda: draw.number(0.5, 30.0),
        "sinks": lambda: draw.array(q[-3:-2] or (1,), dtype, bias=True),
    }
    names = r.sample(sorted(given), r.randint(1, 3))
    return {name: given[name]() for name in names} | {"empty_rows": r.choice(["zero", "error"])}


def attention_arguments(case: Case, *, tol: bool) -> tuple[list[Any], dict[str, Any], tuple[Any, ...]]:
    draw, r = case.draw, case.draw.r
    dtype = draw.dtype()
    q, k, v, causal = shapes(draw)
    arrays = [draw.array(shape, dtype) for shape in (q, k, v)]
    options: dict[str, Any] = {"causal": draw.choice(causal) if causal or draw.oddly() else False}
    if r.random() < 0.3:
        options["scale"] = draw.number(0.5, 1.0, -1.0, 0.0, 3.0)
    if r.random() < 0.4:
        options["key_bias"] = draw.array(k[:-1], dtype, bias=True)
    if tol and r.random() < 0.2:
        options |= options_of_scores(draw, q, k, dtype)
    if tol and r.random() < 0.85:
        options["engine"] = engine(case, q[-1])
    if tol and r.random() < (0.1 if "engine" in options else 0.5) * (draw.odd + ("engine" not in options)):
        options["tol"] = draw.number(0.5, 0.1, 1e-2, 1e-4, 1e-6, 1e-9)
    return arrays, options, (dtype, q, k, v)


def fuzz_attention(case: Case) -> None:
    arrays, options, (_dtype, _q, _, _v) = attention_arguments(case, tol=True)
    out = case.call(lg.attention, *arrays, **options)
    case.result(out, (*arrays[0].shape[:-1], arrays[2].shape[-1]), arrays[0].dtype)


def fuzz_attention_vjp(case: Case) -> None:
    arrays, options, _ = attention_arguments(case, tol=True)
    out, vjp = case.call(lg.attention_vjp, *arrays, **options)
    pull(case, arrays, options, out, vjp)


def pull(case: Case, arrays: list[Any], options: dict[str, Any], out: Any, vjp: Any) -> None:
    """The gradients: the arrays are known to be as they should."""
    draw, r = case.draw, case.draw.r
    dtype = arrays[0].dtype
    case.result(out, (*arrays[0].shape[:-1], arrays[2].shape[-1]), dtype)
    for _ in range(r.choice((1, 1, 1, 2))):
        more = {"samples": draw.number(0, 1, 2, 3, 8, 1000)} if r.random() < 0.4 else {}
        grads = case.call(vjp, draw.array(out.shape, dtype), of=lg.Pullback.__call__, **more)
        biases = [options[name] for name in ("key_bias", "bias", "sinks") if options.get(name) is not None]
        given = [*arrays, *(x for x in biases if x.dtype != np.bool_)]
        if type(grads) is not tuple or len(grads) != len(given):
            raise Find(f"{len(grads)} gradients")
        for x, like in zip(grads, given, strict=True):
            case.result(x, like.shape, dtype)
        check_heads(case, vjp.heads)


def check_heads(case: Case, heads: Any, *, measured: bool = True) -> None:
    for head in heads:
        for e in head.errors.values() if measured else ():
            case.estimate(e)
        if not isinstance(hash(head), int) or not head.engine_name or head != head:
            raise Find(f"a head's plan is {head}")


def fuzz_plan(case: Case) -> None:
    draw, r = case.draw, case.draw.r
    arrays, options, (_dtype, _q, _k, _v) = attention_arguments(case, tol=False)
    more = {"tol": draw.number(0.9, 0.3, 0.1, 1e-2, 1e-4, 1e-6), "gradients": draw.choice(True, False)}
    more |= {"strict_causal": draw.choice(True, False), "seed": draw.number(0, 1, 3)}
    plan = case.call(lg.plan_attention, *arrays, **options, **more)
    check_plan(case, plan, measured=True)
    use(case, plan, arrays, options)
    if r.random() < 0.7:
        mutate_plan(case, json.loads(plan.to_json()), arrays, options)


def check_plan(case: Case, plan: lg.Plan, *, measured: bool) -> None:
    text = case.call(plan.to_json)
    again = case.call(lg.Plan.from_json, text)
    if again.to_json() != text or (measured and (again != plan or hash(again) != hash(plan))):
        raise Find("a plan from JSON is another")
    str(plan)
    repr(plan)
    if pickle.loads(pickle.dumps(plan)) != plan or copy.deepcopy(plan) != plan:
        raise Find("a copy of a plan is another")
    check_heads(case, plan.heads, measured=measured)


def fits(x: Any) -> bool:
    """Whether there can be another array like it."""
    return type(x) is np.ndarray and x.dtype in (F32, F64) and x.ndim >= 2 and x.nbytes < 1 << 20


def use(case: Case, plan: Any, arrays: list[Any], options: dict[str, Any]) -> None:
    draw, r = case.draw, case.draw.r
    others = arrays
    if r.random() < 0.5 and all(fits(x) for x in arrays):
        others = [draw.array(x.shape, x.dtype) for x in arrays]
    bias = {"key_bias": options["key_bias"]} if options.get("key_bias") is not None else {}
    if r.random() < 0.5:
        out = case.call(plan.attention, *others, **bias)
        case.result(out, (*others[0].shape[:-1], others[2].shape[-1]), others[0].dtype)
    else:
        out, vjp = case.call(plan.attention_vjp, *others, **bias)
        pull(case, others, bias, out, vjp)


def head_json(draw: Draw, d: int, m: int) -> dict[str, Any]:
    """A head of a plan that nobody made, of an engine that a small head has not been given by itself."""
    r = draw.r
    kind = r.choice(("Exact", "Polynomial", "Polynomial", "Landmark", "Landmark"))
    made: dict[str, Any] = {"kind": kind}
    if kind == "Polynomial":
        degree = r.randint(1, 4)
        made |= {
            "degree": degree,
            "coefficients": draw.choice("taylor", "fitted", [1.0, 1.0, 0.5, 0.2, 0.1][: degree + 1]),
            "gradient": draw.choice("closed_form", "consistent"),
            "shift": draw.choice("none", "none", "mean", [[0.1] * d, [-0.1] * d]),
            "diagonal": draw.choice("exact", "exact", "polynomial"),
            "window": draw.number(0, 2, 64),
        }
    elif kind == "Landmark":
        rank = r.randint(1, 4)
        made |= {"rank": rank, "seed": draw.number(0, 1)}
        if r.random() < 0.6:
            rows = [[r.gauss(0, 1) for _ in range(d)] for _ in range(rank)]
            unit = [[float(i == j) for j in range(rank)] for i in range(rank)]
            shifts = {"query_shift": [0.0] * d, "key_shift": [0.0] * d}
            constants = {"scale": draw.number(0.5, 1.0), "balance": 1.0, "landmarks": rows, "matrix": unit}
            made["constants"] = shifts | constants
    return {
        "engine": made,
        "predicted_error": draw.number(0.1, None),
        "error_bound": draw.number(None, 0.1),
        "cost": draw.number(1e-3, 1.0),
        "exact_cost": draw.number(1e-2, 1.0),
        "whole_sequence": [],
        "reason": "drawn",
        "missed": None,
        "errors": [["out", [0.1, 0.05, 0.2, 16]]],
    }


def json_value(draw: Draw, near: Any) -> Any:
    """A value of JSON in place of another one."""
    r = draw.r
    if isinstance(near, bool):
        return r.choice((not near, 1, None, "true"))
    if isinstance(near, int) and r.random() < 0.7:
        part = near / 7 if abs(near) < 2**64 else 1.5
        large = (2**31, 2**53, 2**63 - 1, 2**63, 2**64, 10**400)
        return r.choice((near + 1, near - 1, -near, 0, *large, part, str(near % 1000)))
    if isinstance(near, float) and r.random() < 0.7:
        whole = int(near) if abs(near) < 1e9 else 1
        return r.choice((0.0, -near, near * 1e3, 1e308, 5e-324, -1.0, whole, 10**400, None))
    if isinstance(near, list) and r.random() < 0.7:
        return r.choice((near[:-1], near + near[-1:], near[::-1], [near], near * 3, [], [*near, None]))
    if isinstance(near, str) and r.random() < 0.5:
        words = ("Exact", "Polynomial", "Landmark", "Auto", "float32", "float64", "fitted", "mean")
        return r.choice(("", near + "x", near.upper(), *words))
    plain = (None, True, False, 0, -1, 1, 2**64, 0.5, -1.5, 1e308, "", "x", "NaN", "\ud800")
    return r.choice((*plain, [], {}, [[]], [0.5], [1, 2], {"kind": "Exact"}, [None]))


def plain(value: Any) -> Any:
    """What JSON can hold of a value, as new lists and dicts."""
    try:
        return json.loads(json.dumps(value, default=lambda x: None))
    except (ValueError, TypeError, RecursionError):
        raise Stop from None


def mutated(draw: Draw, value: Any) -> Any:
    """JSON with a few places changed."""
    r = draw.r
    places: list[tuple[Any, Any]] = []

    def walk(x: Any) -> None:
        if isinstance(x, dict):
            for key in x:
                places.append((x, key))
                walk(x[key])
        elif isinstance(x, list):
            for i in range(min(len(x), 40)):
                places.append((x, i))
                walk(x[i])

    value = plain(value)
    walk(value)
    for _ in range(r.choice((0, 1, 1, 1, 2, 3))):
        holder, key = r.choice(places)
        if (isinstance(holder, dict) and key not in holder) or (isinstance(holder, list) and key >= len(holder)):
            continue
        kind = r.random()
        if kind < 0.1 and isinstance(holder, dict):
            del holder[key]
        elif kind < 0.15 and isinstance(holder, dict):
            holder[r.choice(("", "x", "kind", "causal", "rows"))] = holder[key]
        elif kind < 0.2:
            holder[key] = r.choice(places)[0].__class__()
        else:
            holder[key] = json_value(draw, holder[key])
    return value


def spoilt_text(draw: Draw, text: str) -> Any:
    """A text with some characters changed, now and then no text at all."""
    r = draw.r
    if r.random() < 0.3 * draw.odd:
        return draw.hostile()
    if r.random() < 0.1 and text:
        at = r.randrange(len(text))
        kind = r.random()
        if kind < 0.3:
            return text[:at]
        if kind < 0.6:
            return text[:at] + r.choice('0123456789{}[]",:.eE-+nN\\u\0\ud800') + text[at + 1 :]
        if kind < 0.8:
            wrong = ("NaN", "Infinity", "1e999", "-1e999", "9" * 5000, "[" * 3000, '{"a":' * 3000)
            return text[:at] + r.choice(wrong) + text[at:]
        return r.choice((text.encode(), text.encode("utf-16"), bytearray(text.encode()), "\ufeff" + text, text + text))
    return text


def mutate_plan(case: Case, plan: dict[str, Any], arrays: list[Any], options: dict[str, Any]) -> None:
    draw, r = case.draw, case.draw.r
    if r.random() < 0.5:
        plan["auto"]["tol"] = draw.number(0.99, 0.3, 0.1)
        d, m = arrays[0].shape[-1], arrays[1].shape[-2]
        plan["heads"] = [head_json(draw, d, m) for _ in plan["heads"]]
    if r.random() < 0.6:
        plan = mutated(draw, plan)
    text = json.dumps(plain(plan))
    made = case.call(lg.Plan.from_json, spoilt_text(draw, text))
    check_plan(case, made, measured=False)
    use(case, made, arrays, options)


def fuzz_plan_json(case: Case) -> None:
    """Plans that nobody made, without planning before."""
    draw, r = case.draw, case.draw.r
    dtype = draw.dtype()
    q, k, v, causal = shapes(draw)
    if max(q[-2], k[-2]) > 300:
        raise Stop
    arrays = [draw.array(shape, dtype) for shape in (q, k, v)]
    if not all(fits(x) for x in arrays):
        raise Stop
    options = {"key_bias": draw.array(k[:-1], dtype, bias=True)} if r.random() < 0.3 else {}
    plan = {
        "lingrad_rs": "plan",
        "auto": {"tol": 0.5, "gradients": r.random() < 0.5, "strict_causal": r.random() < 0.3, "seed": 0},
        "heads": [head_json(draw, q[-1], k[-2]) for _ in range(math.prod(q[:-2]))],
        "causal": causal,
        "scale": draw.number(1.0, 0.5, -0.3),
        "shapes": [list(q), list(k), list(v)],
        "dtype": str(dtype),
    }
    mutate_plan(case, plan, arrays, options)


def fuzz_measure(case: Case) -> None:
    draw, r = case.draw, case.draw.r
    arrays, options, (dtype, q, _, v) = attention_arguments(case, tol=False)
    if r.random() < 0.6:
        options["samples"] = draw.number(1, 2, 3, 10, 256)
    if r.random() < 0.3:
        options["seed"] = draw.number(0, 1, 2)
    out = draw.array((*q[:-1], v[-1]), dtype)
    case.estimate(case.call(lg.measure_error, *arrays, out, **options))


def fuzz_engines(case: Case) -> None:
    draw, r = case.draw, case.draw.r
    draw.odd = max(draw.odd, 0.1)
    kind = r.random()
    if kind < 0.6:
        made = engine(case, r.randint(0, 4) if r.random() < 0.5 else None)
        if not isinstance(made, lg.Engine):
            raise Stop
    elif kind < 0.75:
        made = landmark_constants(case, r.randint(0, 4))
    elif kind < 0.85:
        names = ("relative", "low", "high", "rows")
        made = case.call(lg.ErrorEstimate, **{name: draw.number(0.1, 1, 3) for name in names})
    elif kind < 0.93:
        made = head_plan(case)
    else:
        made = case.call(
            lg.Plan,
            auto=draw.choice(lg.Auto(0.1)),
            heads=draw.choice((), [], (head_plan(case),)),
            causal=draw.choice(True, False),
            scale=draw.number(1.0),
            shapes=draw.choice(
                ((3, 2), (3, 2), (3, 1)), [[0, 3, 2], [0, 3, 2], [0, 3, 1]], ((3, 2), (3, 2), (3, draw.number(1)))
            ),
            dtype=draw.choice("float32", "float64"),
        )
        check_plan(case, made, measured=False)
    repr(made)
    if hash(made) != hash(copy.deepcopy(made)) or pickle.loads(pickle.dumps(made)) != made:
        nan = any(isinstance(x, float) and math.isnan(x) for x in vars(made).values())
        if not nan:
            raise Find(f"a copy of {made} is another")


def head_plan(case: Case) -> Any:
    draw = case.draw
    return case.call(
        lg.HeadPlan,
        engine=draw.choice(lg.Exact(), lg.Polynomial(), lg.Landmark(4)),
        predicted_error=draw.number(None, 0.1),
        measured_error=draw.choice(None),
        error_bound=draw.number(None, 0.1),
        cost=draw.number(1.0, math.nan),
        exact_cost=draw.number(1.0, math.nan),
        whole_sequence=draw.choice((), ("coefficients",), []),
        reason=draw.choice("", "given"),
        missed=draw.choice(None, "too much"),
        errors=draw.choice({}, {"out": lg.ErrorEstimate(0.1, 0.0, 0.2, 3)}),
    )


def module(case: Case, d: int, dtype: np.dtype) -> tuple[Any, int, Any]:
    """A module, the width of its results, and the class that it is of."""
    draw, r = case.draw, case.draw.r
    e = r.randint(0 if draw.oddly() else 1, 6)
    kind = r.randrange(7)
    if kind == 0:
        bias = draw.array((e,), dtype) if r.random() < 0.5 else None
        return case.call(lg.Linear, w=draw.array((d, e), dtype), b=bias), e, lg.Linear
    if kind == 1:
        return case.call(lg.Activation, draw.choice("relu", "silu", "gelu_tanh")), d, lg.Activation
    if kind == 2:
        return case.call(lg.RMSNorm, gain=draw.array((d,), dtype), eps=draw.number(1e-5, 1e-3, 1.0)), d, lg.RMSNorm
    if kind == 3:
        gain, bias = draw.array((d,), dtype), draw.array((d,), dtype)
        return case.call(lg.LayerNorm, gain=gain, bias=bias, eps=draw.number(1e-5, 1e-3)), d, lg.LayerNorm
    if kind == 4:
        f = draw.size(0)
        options = {"w_in": draw.array((d, f), dtype), "w_out": draw.array((f, e), dtype)}
        options["activation"] = draw.choice("relu", "silu", "gelu_tanh")
        return case.call(lg.FeedForward, **options), e, lg.FeedForward
    options = {"causal": draw.choice(True, False)}
    if r.random() < 0.8:
        options["engine"] = engine(case)
    if r.random() < 0.2:
        options["scale"] = draw.number(0.5, 1.0)
    if kind == 5:
        options |= {"w": draw.array((d, d), dtype), "w_v": draw.array((d, e), dtype)}
        return case.call(lg.SelfAttention, **options), e, lg.SelfAttention
    h_kv = r.randint(1, 2)
    h, width, value = h_kv * r.randint(1, 2), r.randint(1, 4), r.randint(1, 3)
    if r.random() < 0.4:
        options["rope"], width = draw.choice(True, False), width + width % 2
    if r.random() < 0.3:
        options["score_bound"] = draw.number(0.5, 1.0, 10.0)
    options |= {"n_heads": draw.number(h), "n_kv_heads": draw.number(h_kv)}
    axes = {"w_q": (d, h * width), "w_k": (d, h_kv * width), "w_v": (d, h_kv * value), "w_o": (h * value, e)}
    weights = {name: draw.array(shape, dtype) for name, shape in axes.items()}
    if draw.oddly():
        del weights[r.choice(list(weights))]
    return case.call(lg.SelfAttention, **weights, **options), e, lg.SelfAttention


def fuzz_modules(case: Case) -> None:
    draw, r = case.draw, case.draw.r
    dtype, d = draw.dtype(), r.randint(0 if draw.oddly() else 1, 6)
    leading = tuple(r.randint(0 if draw.oddly() else 1, 2) for _ in range(r.choice((0, 0, 1, 2))))
    shape = (*leading, min(draw.size(0), 200), d)
    if r.random() < 0.1:
        vocab = r.randint(0 if draw.oddly() else 1, 9)
        made: Any = case.call(lg.Embedding, embed=draw.array((vocab, d), dtype))
        x, kind, width = draw.tokens(shape[:-1], vocab), lg.Embedding, made.embed.shape[-1]
    else:
        made, width, kind = module(case, d, dtype)
        x = draw.array(shape, dtype)
        if kind is lg.Activation and getattr(x, "ndim", 0):
            width = x.shape[-1]
        elif kind in (lg.Linear, lg.FeedForward):
            width = (made.w if kind is lg.Linear else made.w_out).shape[-1]
        elif kind is lg.SelfAttention:
            width = list(made.weights.values())[-1].shape[-1]
        how = r.random()
        if how < 0.1 and width == d:
            made, kind = case.call(lg.Residual, made), lg.Residual
        elif how < 0.2:
            second, width, _ = module(case, min(width, 1 << 20), dtype)
            given, kind = draw.choice([made, second], (made, second)), lg.Chain
            made = case.call(lg.Chain, given)
        elif how < 0.22:
            given = draw.choice([], [draw.hostile()], draw.hostile())
            made, kind, width = case.call(draw.pick(lg.Chain, lg.Residual), given), lg.Chain, d
    y, pullback = case.call(made.vjp, x, of=kind)
    width = y.shape[-1] if kind is lg.Chain and y.ndim else width  # whatever its last module gives
    if kind is lg.Chain and not made.modules:
        raise Stop  # the identity, of anything
    if kind is not lg.Chain or (isinstance(x, np.ndarray) and x.dtype in (F32, F64) and type(x) is np.ndarray):
        case.result(y, (*x.shape[: len(x.shape) - (kind is not lg.Embedding)], width), y.dtype)
    dx, grads = case.call(pullback, draw.array(y.shape, y.dtype), of=kind)
    if kind is lg.Embedding:
        if dx is not None:
            raise Find("tokens have a gradient")
    else:
        case.result(dx, x.shape, x.dtype)
    for part in grads if isinstance(grads, list) else [grads]:
        for name, grad in part.items():
            case.result(grad, grad.shape, y.dtype)
            owner = getattr(made, "weights", None) or vars(made)
            if name in owner and owner[name].shape != grad.shape:
                raise Find(f"the gradient of {name} has shape {grad.shape}; expected {owner[name].shape}")


def config(case: Case) -> Any:
    draw, r = case.draw, case.draw.r
    h_kv = r.choice((1, 1, 2))
    h = h_kv * r.choice((1, 1, 2))
    width = r.choice((1, 2, 2, 4))
    options: dict[str, Any] = {
        "n_layers": draw.number(1, 1, 2),
        "d_model": draw.number(h * width),
        "n_heads": draw.number(h),
        "d_ff": draw.number(1, 3, 8),
        "vocab_size": draw.number(1, 2, 5, 13),
    }
    choices = {"causal": (True, False), "norm": ("rms", "layer"), "activation": ("relu", "silu", "gelu_tanh")}
    for name, usual in choices.items():
        if r.random() < 0.5:
            options[name] = draw.choice(*usual)
    options["rope"] = draw.choice(width % 2 == 0 and r.random() < 0.7)
    if r.random() < 0.2:
        options["score_bound"] = draw.number(1.0, 5.0)
    if r.random() < 0.5:
        options["n_kv_heads"] = draw.number(h_kv)
    if r.random() < 0.8:
        sizes = [options["d_model"], options["n_heads"]]
        usual = all(type(x) is int for x in sizes) and sizes == [h * width, h]
        options["engine"] = engine(case, None if usual else 100)
    made = case.call(lg.TransformerConfig, **options)
    hash(made), repr(made)
    shapes = case.call(made.param_shapes)
    if sum(map(math.prod, shapes.values())) != case.call(made.param_count):
        raise Find("param_count is another than the shapes tell")
    return made


def small(made: Any) -> bool:
    return made.param_count() < 200_000 and made.n_layers < 20


def transformer(case: Case) -> Any:
    draw, r = case.draw, case.draw.r
    made = config(case)
    if not small(made):
        raise Stop
    dtype = draw.dtype()
    if r.random() < 0.4:
        other = draw.choice(np.float32, np.float64, "f4", "float64", dtype)
        return case.call(lg.Transformer, made, seed=draw.number(0, 1), dtype=other)
    params: Any = {name: draw.array(shape, dtype) for name, shape in made.param_shapes().items()}
    if draw.oddly():
        name = r.choice(list(params))
        value = params.pop(name)
        if r.random() < 0.5:
            params[draw.pick("x", 1, None, name + "x", "\ud800", ("a",))] = value
    return case.call(lg.Transformer, draw.choice(made), draw.choice(params))


def fuzz_transformer(case: Case) -> None:
    draw, r = case.draw, case.draw.r
    model = transformer(case)
    dtype, c = model.params["embed"].dtype, model.config
    batch = [r.randint(0 if draw.oddly() else 1, 2) for _ in range(r.choice((0, 0, 1)))]
    shape = (*batch, min(draw.size(1), 70))
    tokens = draw.tokens(shape, c.vocab_size)
    how = r.random()
    if how < 0.35:
        loss, grads = case.call(model.value_and_grad, tokens, draw.tokens(shape, c.vocab_size))
    elif how < 0.5:
        report = case.call(
            model.gradient_report, tokens, draw.tokens(shape, c.vocab_size), samples=draw.number(0, 1, 8, 256)
        )
        loss, grads = report.loss, report.grads
        for layer in report.layers:
            if layer.measured_error is not None:
                case.estimate(layer.measured_error)
            if not layer.grad_norm >= 0:
                raise Find(f"grad_norm is {layer.grad_norm}")
            check_heads(case, layer.heads)
        if report != report:
            raise Find("a report is not itself")
    elif how < 0.65:
        made = draw.choice(
            lambda y: (0.5, y.copy()),
            lambda y: (np.float32(1), y),
            lambda y: (draw.number(0.5), draw.array(y.shape, y.dtype)),
        )
        more = {"targets": draw.hostile()} if draw.oddly() else {}
        if isinstance(made, type):
            return  # what is raised by its constructor is its own
        loss, grads = case.call(model.value_and_grad, tokens, loss=made, **more)
        loss = 0.0
    else:
        x = tokens if r.random() < 0.5 else draw.array((*shape, c.d_model), dtype)
        y, pullback = case.call(model.vjp, x)
        case.result(y, (*(x.shape if x.dtype.kind in "iu" else x.shape[:-1]), c.vocab_size), dtype)
        dx, grads = case.call(pullback, draw.array(y.shape, dtype), of=lg.Transformer.vjp)
        if x.dtype.kind == "f":
            case.result(dx, x.shape, dtype)
        loss = 0.0
    if not isinstance(loss, float) or not math.isfinite(loss):
        raise Find(f"the loss is {loss!r}")
    wanted = c.param_shapes()
    if grads.keys() != wanted.keys():
        raise Find(f"gradients of {sorted(grads)}")
    for name, grad in grads.items():
        case.result(grad, wanted[name], dtype)


def file_bytes(draw: Draw) -> bytes:
    """A safetensors file: whole, with a header that claims something else, or with bytes changed."""
    r = draw.r
    header: dict[str, Any] = {}
    data = b""
    if r.random() < 0.5:
        header["__metadata__"] = {"format": "pt"}
    sizes = {"F32": 4, "F64": 8, "F16": 2, "BF16": 2, "I64": 8, "I8": 1, "U16": 2, "BOOL": 1, "C64": 8, "F8_E4M3": 1}
    for name in draw.pick((), ("a",), ("a", "b"), ("q", "k", "v"), ("", "layers.0.x", "embed")):
        dtype = r.choice(list(sizes))
        shape = [r.randint(0, 3) for _ in range(r.choice((0, 1, 2, 2, 3)))]
        size = math.prod(shape) * sizes[dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + size]}
        data += r.randbytes(size)
    return spoilt_bytes(draw, with_header(draw, header, data))


def with_header(draw: Draw, header: Any, data: bytes) -> bytes:
    r = draw.r
    if r.random() < 0.5:
        header = mutated(draw, header) if header else header
    text = json.dumps(header)
    if r.random() < 0.1:
        text = spoilt_text(draw, text)
        if not isinstance(text, str):
            text = "{}"
    raw = text.encode("utf-8", "surrogatepass")
    raw += b" " * r.choice((0, -len(raw) % 8))
    length = len(raw)
    if r.random() > 0.9:
        length = r.choice((0, 1, length - 1, length + 1, 2**32, 2**63, 2**64 - 1, 10**8))
    return struct.pack("<Q", max(length, 0)) + raw + data


def spoilt_bytes(draw: Draw, raw: bytes) -> bytes:
    r = draw.r
    if r.random() < 0.6 or not raw:
        return raw
    kind = r.random()
    if kind < 0.3:
        return raw[: r.randrange(len(raw))]
    changed = bytearray(raw)
    for _ in range(r.choice((1, 1, 2, 5))):
        at = r.randrange(len(changed))
        if kind < 0.8:
            changed[at] = r.choice((0, 255, changed[at] ^ (1 << r.randrange(8)), r.randrange(256)))
        else:
            changed[at:at] = r.randbytes(r.randint(1, 9))
    return bytes(changed)


def model_bytes(case: Case) -> bytes:
    """A model's file with some of its configuration changed."""
    draw = case.draw
    model = transformer(case)
    path = draw.folder / "model"
    case.call(lg.save, path, model)
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    if draw.r.random() < 0.7:
        made = mutated(draw, json.loads(header["__metadata__"]["lingrad_rs.config"]))
        text = spoilt_text(draw, json.dumps(made))
        header["__metadata__"]["lingrad_rs.config"] = text if isinstance(text, str) else "{}"
        text = json.dumps(header).encode("utf-8", "surrogatepass")
        raw = struct.pack("<Q", len(text)) + text + raw[8 + length :]
    elif draw.r.random() < 0.5:
        raw = with_header(draw, header, raw[8 + length :])
    return spoilt_bytes(draw, raw)


def fuzz_load(case: Case) -> None:
    draw, r = case.draw, case.draw.r
    path: Any = draw.folder / "file"
    path.write_bytes(model_bytes(case) if r.random() < 0.3 else file_bytes(draw))
    if draw.oddly():
        path = draw.pick(
            draw.hostile(), "", ".", "/", "no/such", "\ud800", "a" * 300, b"\xff\xfe", path / "x", 7, "a\nb", os.devnull
        )
        if isinstance(path, int):
            path = "no"  # the number of an open file
    more = {}
    if r.random() < 0.3:
        more["names"] = draw.choice(["a"], (), {"b"}, ["a", "a"], iter(["q"]), {"a": 1}, ["a", "nothing"], [1], "a")
    loaded = case.call(lg.load, path, **more)
    if isinstance(loaded, lg.Transformer):
        again = draw.folder / "again"
        case.call(lg.save, again, loaded)
        if case.call(lg.load, again).config != loaded.config:
            raise Find("a model that was read and written is another")
        tokens = np.zeros(3, np.int64)
        if small(loaded.config):
            _, grads = case.call(loaded.value_and_grad, tokens, tokens)
            for name, shape in loaded.config.param_shapes().items():
                case.result(grads[name], shape, loaded.params["embed"].dtype)
        return
    for name, x in loaded.items():
        if type(name) is not str or type(x) is not np.ndarray or not x.dtype.isnative:
            raise Find(f"{name!r} is {text_of(x)}")


def fuzz_save(case: Case) -> None:
    draw, r = case.draw, case.draw.r
    path: Any = draw.folder / "saved"
    if r.random() < 0.15:
        case.call(lg.save, path, transformer(case))
        return
    names = draw.pick(("a",), ("a", "b"), ("", "ü"), ("x" * 300, "\0"), (1,), ("\ud800",), ("__metadata__",), ())
    arrays: Any = {}
    for name in names:
        shape = tuple(r.randint(0, 3) for _ in range(r.choice((0, 1, 2, 3))))
        arrays[name] = draw.array(shape, draw.dtype())
        if isinstance(arrays[name], np.ndarray) and arrays[name].nbytes > 1 << 24:
            raise Stop  # a file of that size
    if draw.oddly():
        arrays = draw.hostile()
    if draw.oddly():
        path = draw.pick(draw.hostile(), "", ".", "\ud800", "no/such/file", 7, path / "x")
        if (isinstance(path, str) and path not in ("", ".", "\ud800", "no/such/file")) or isinstance(path, bytes):
            raise Stop  # it would be written there
    case.call(lg.save, path, arrays)
    got = case.call(lg.load, path)
    for name, x in arrays.items():
        if not np.array_equal(got[name], np.asarray(x), equal_nan=True) or got[name].dtype != np.asarray(x).dtype:
            raise Find(f"{name!r} comes back as {text_of(got[name])}")


def npz_bytes(draw: Draw) -> bytes:
    r = draw.r
    n, d = r.randint(1, 12), r.randint(1, 4)
    dtype = draw.dtype()
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", r.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))) as archive:
        for name in draw.pick("qkv", "qkv", "qkvx", "qk"):
            member = io.BytesIO()
            version = draw.pick((1, 0), (1, 0), (2, 0), (3, 0))
            np.lib.format.write_array(member, draw.numbers((n, d), dtype), version=version)
            raw = member.getvalue()
            archive.writestr(f"{name}.npy", spoilt_bytes(draw, raw) if r.random() < 0.3 else raw)
    return spoilt_bytes(draw, out.getvalue())


def fuzz_npz(case: Case) -> None:
    """Files of heads, as `lingrad plan` reads them."""
    from lingrad_rs.cli import surveys

    draw, r = case.draw, case.draw.r
    suffix = draw.pick(".npz", ".npz", ".safetensors", "")
    path = draw.folder / f"heads{suffix}"
    path.write_bytes(npz_bytes(draw) if suffix != ".safetensors" else file_bytes(draw))
    task = surveys.Task(causal=r.random() < 0.5, scale=None, gradients=r.random() < 0.5)
    # The command tells these in one line.
    arrays = case.call(surveys.read, path, task, draw.pick(None, 1, 5), of=_expects_os_errors)
    case.call(surveys.heads, arrays, draw.pick([], [0], [-1], [7]), draw.pick([], [0], [3]), of=_expects_os_errors)


def _expects_os_errors() -> None:
    """What the command line catches.

    Raises
    ------
    OSError
        A file cannot be read.
    """


def fuzz_command_line(case: Case) -> None:
    from lingrad_rs import cli

    draw, r = case.draw, case.draw.r
    folder = draw.folder
    text = folder / "text"
    text.write_bytes(r.randbytes(r.choice((0, 1, 9, 33, 100))))
    odd_number = ("nan", "inf", "-1", "0", "1e400", "0.5", "1e-2", "x", "1e6", "٣", "1_0", "-0.0", "5e-324")
    odd_number += ("", "9" * 400)
    command = r.choice(("grad", "grad", "plan", "plan", "plan", "bench"))
    if command == "grad":
        argv = ["--text", str(text), "--tokens", r.choice(("8", "16", "32"))]
        argv += ["--layers", "1", "--d-model", "8", "--heads", "2"]
        options = ("--d-ff", "--degree", "--rank", "--tol", "--seed", "--tokens", "--layers", "--heads", "--d-model")
        engines = ("exact", "auto", "landmark", "polynomial")
        argv += r.choice(([], ["--compare", "exact"], ["--engine", r.choice(engines)]))
        if r.random() < 0.4:
            model = folder / "params"
            model.write_bytes(model_bytes(case) if r.random() < 0.6 else file_bytes(draw))
            argv = ["--text", str(text), "--tokens", "8", "--params", str(model)]
        if r.random() < 0.3:
            argv += ["--out", str(folder / r.choice(("out", "no/such/out", "\ud800")))]
    elif command == "plan":
        suffix = r.choice((".npz", ".npz", ".safetensors"))
        path = folder / f"plan{suffix}"
        path.write_bytes(npz_bytes(draw) if suffix == ".npz" else file_bytes(draw))
        argv = [str(path), "--rounds", "1"]
        argv += [r.choice(("--causal", "--full")), r.choice(("--gradients", "--forward-only"))]
        options = ("--scale", "--tol", "--layer", "--head", "--max-tokens")
    else:
        argv = ["--tokens", r.choice(("8", "32", "1")), "--d", r.choice(("1", "4")), "--rounds", "1", "--limit", "0.1"]
        options = ("--heads", "--degree", "--score-std", "--d", "--limit")
    if r.random() < 0.5:
        argv += [r.choice(options), r.choice(odd_number)]
    if command == "bench" and not all(len(x) < 4 and "e" not in x for x in argv if x[:1].isdigit()):
        raise Stop  # that many would be made
    if r.random() < 0.5:
        argv.append("--json")
    if VERBOSE:
        print(f"  lingrad {command} {argv}", flush=True)
    streams, before = (sys.stdout, sys.stderr, sys.argv), dict(os.environ)
    out, err = folder / "stdout", folder / "stderr"
    code: Any = 0
    with warnings.catch_warnings():
        try:
            with (
                out.open("w", encoding="utf-8", errors="replace") as sys.stdout,
                err.open("w", encoding="utf-8", errors="replace") as sys.stderr,
            ):
                sys.argv = ["lingrad", command, *argv]
                try:
                    cli.main()
                except SystemExit as ended:
                    code = ended.code
        finally:
            sys.stdout, sys.stderr, sys.argv = streams
            os.environ.clear()
            os.environ.update(before)
    told = err.read_text(encoding="utf-8", errors="replace")
    if code not in (0, None, 2) or "Traceback" in told:
        raise Find(f"it ends with {code!r}: {told[:1000]}")
    if code == 2 and not told.strip():
        raise Find("it fails and says nothing")
    if code in (0, None) and "--json" in argv:
        json.loads(out.read_text(), parse_constant=lambda name: (_ for _ in ()).throw(Find(f"{name} in JSON")))


def fuzz_rest(case: Case) -> None:
    draw, r = case.draw, case.draw.r
    if r.random() < 0.5:
        x = draw.odd_array((3, 2), draw.dtype()) if r.random() < 0.8 else draw.hostile()
        case.call(lg.from_dlpack, x)
    else:
        value = draw.pick(draw.hostile, lambda: draw.pick(*NUMBERS))()
        if isinstance(value, int | np.integer) and 2 < value < 2**60:
            raise Stop  # so many threads
        case.call(lg.set_num_threads, value)
        if lg.get_num_threads() < 1:
            raise Find(f"{lg.get_num_threads()} threads")
        case.call(lg.set_num_threads, 1)
        case.call(lg.build_info)


TARGETS: tuple[tuple[Callable[[Case], None], int], ...] = (
    (fuzz_attention, 1800),
    (fuzz_attention_vjp, 2000),
    (fuzz_plan, 500),
    (fuzz_plan_json, 1000),
    (fuzz_measure, 500),
    (fuzz_engines, 900),
    (fuzz_modules, 1500),
    (fuzz_transformer, 400),
    (fuzz_load, 700),
    (fuzz_save, 300),
    (fuzz_npz, 200),
    (fuzz_command_line, 2),
    (fuzz_rest, 200),
)


# Running ----------------------------------------------------------------------------------------------------------


def run_one(seed: int, index: int, folder: Path) -> tuple[int, str | None, str]:
    """The number of the target of an input, and a find: what kind it is, and its story."""
    draw = Draw(seed, index, folder)
    (at,) = draw.r.choices(range(len(TARGETS)), [weight for _, weight in TARGETS])
    case = Case(draw)
    before = np.geterr()
    try:
        TARGETS[at][0](case)
    except (Stop, MemoryError):
        pass
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        name = TARGETS[at][0].__name__
        frames = traceback.extract_tb(error.__traceback__)
        inner = [frame for frame in frames if "lingrad_rs" in frame.filename]
        where = f"{Path(inner[-1].filename).name}:{inner[-1].lineno}" if inner else str(frames[-1].lineno)
        detail = re.sub(r"[\d.]+", "#", str(error))[:60] if isinstance(error, Find | lg.LingradError) else ""
        kind = f"{name}: {type(error).__name__} at {where} {detail}"
        told = "".join(traceback.format_exception(error))
        calls = ""
        if not VERBOSE and hasattr(case, "last"):
            function, args, kwargs = case.last
            calls = f"  last: {getattr(function, '__qualname__', function)}({args_text(args, kwargs)})"
        return at, kind, f"{calls}\n{told[-6000:]}"
    if np.geterr() != before:
        return at, f"{TARGETS[at][0].__name__}: NumPy's error state has changed", ""
    return at, None, ""


def shared_struct() -> struct.Struct:
    """What parent and child share: the number of the input under way, since when, and how many each target has had."""
    return struct.Struct(f"qd{len(TARGETS)}q")


def prepare(args: argparse.Namespace) -> None:
    """What holds for all inputs of a process."""
    faulthandler.enable()
    if sys.platform == "linux":
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (ROOM, ROOM))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if args.array_path:
        select.KINDS.insert(0, select.Kind("numpy", "ndarray", "array"))
    lg.set_num_threads(1)
    warnings.simplefilter("error")
    os.fsync = lambda handle: None  # no power is cut here


@contextlib.contextmanager
def own_folder() -> Iterator[Path]:
    """A folder to be in for a while."""
    before = os.getcwd()
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        os.chdir(folder)
        try:
            yield Path(folder)
        finally:
            os.chdir(before)


def work(args: argparse.Namespace) -> None:
    """The child: inputs one after the other, a line of JSON for each find."""
    prepare(args)
    shared_as, counts = shared_struct(), [0] * len(TARGETS)
    deadline = None if args.seconds is None else time.monotonic() + args.seconds
    with open(args.shared, "r+b") as file, mmap.mmap(file.fileno(), shared_as.size) as shared:
        with own_folder() as folder:
            for index in range(args.start, args.start + args.inputs):
                now = time.monotonic()
                if deadline is not None and now > deadline:
                    break
                shared[:] = shared_as.pack(index, now, *counts)  # at once: pack_into writes zeros first
                at, kind, story = run_one(args.seed, index, folder)
                counts[at] += 1
                if kind is not None:
                    print(json.dumps({"index": index, "kind": kind, "story": story}), flush=True)
        shared[:] = shared_as.pack(-1, 0.0, *counts)


def supervise(args: argparse.Namespace) -> int:
    """The parent: children until all is done, and what they found."""
    start, found, total = time.monotonic(), Counter(), Counter()
    index, end = args.start, args.start + args.inputs
    shared_as = shared_struct()

    def tell(find: dict[str, Any]) -> None:
        found[find["kind"]] += 1
        if found[find["kind"]] == 1:
            print(f"FIND (--seed {args.seed} --only {find['index']}) {find['kind']}\n{find['story']}", flush=True)

    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        path, lines = Path(folder) / "shared", Path(folder) / "finds"
        while index < end and (args.seconds is None or time.monotonic() - start < args.seconds):
            path.write_bytes(shared_as.pack(index, time.monotonic(), *[0] * len(TARGETS)))
            command = [sys.executable, __file__, "--child", "--seed", str(args.seed), "--start", str(index)]
            command += ["--inputs", str(end - index), "--shared", str(path)]
            command += ["--array-path"] if args.array_path else []
            if args.seconds is not None:
                command += ["--seconds", str(max(args.seconds - (time.monotonic() - start), 0))]
            with lines.open("wb") as stdout, open(Path(folder) / "stderr", "wb") as stderr:
                child = subprocess.Popen(command, stdout=stdout, stderr=stderr)
                hung = False
                while child.poll() is None:
                    time.sleep(0.05)
                    at, since, *_ = shared_as.unpack(path.read_bytes())
                    if at >= 0 and time.monotonic() - since > LIMIT + 5 * (at == index):  # a first one loads libraries
                        hung = True
                        child.send_signal(6 if os.name == "posix" else 15)  # faulthandler tells where it is
                        child.wait()
            for line in lines.read_text().splitlines():
                with contextlib.suppress(ValueError):
                    tell(json.loads(line))
            at, _, *counts = shared_as.unpack(path.read_bytes())
            total.update(dict(enumerate(counts)))
            if at < 0:
                break
            told = (Path(folder) / "stderr").read_text(errors="replace")[-4000:]
            what = f"more than {LIMIT} s" if hung else f"the process ended with {child.returncode}"
            tell({"index": at, "kind": f"{what}: {_killer(told)}", "story": told})
            total["killed"] += 1
            index = at + 1
    for i, (target, _) in enumerate(TARGETS):
        print(f"{target.__name__.removeprefix('fuzz_')}: {total[i]}")
    for kind, count in found.most_common():
        print(f"{count} times: {kind}")
    print(f"{sum(total.values())} inputs, seed {args.seed}, {len(found)} finds")
    return 1 if found else 0


def _killer(told: str) -> str:
    """The place in what `faulthandler` or a panic told that tells kinds of ends apart."""
    match = re.search(r'File ".*?fuzz/python.py", line \d+ in (fuzz_\w+)', told) or re.search(
        r"memory allocation|panicked", told
    )
    return match[0][-80:] if match else told[:80]


def main() -> int:
    global VERBOSE
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, help="stop after so many")
    parser.add_argument("--inputs", type=int, help="stop after so many (10,000, or without end with --seconds)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=int, default=0, help="the number of the first input")
    parser.add_argument("--only", type=int, help="this input alone, with all that is known of it")
    parser.add_argument("--array-path", action="store_true", help="by the code of GPUs, with the arrays of NumPy")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--shared", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inputs is None:
        args.inputs = 10_000 if args.seconds is None else 2**60
    if args.child:
        work(args)
        return 0
    if args.only is None:
        return supervise(args)
    VERBOSE = True
    prepare(args)
    start = time.monotonic()
    with own_folder() as folder:
        at, kind, story = run_one(args.seed, args.only, folder)
    print(f"{TARGETS[at][0].__name__}, {time.monotonic() - start:.2f} s: {kind or 'nothing found'}\n{story}")
    return 1 if kind else 0


if __name__ == "__main__":
    sys.exit(main())
