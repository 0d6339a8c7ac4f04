"""CUDA kernels for what plain array code would move too many bytes for."""

from __future__ import annotations

from typing import Any

__all__ = ["usable"]

Array = Any


def usable(x: Array) -> bool:
    """Whether the kernels take an array: one of CuPy."""
    return type(x).__module__.partition(".")[0] == "cupy"
