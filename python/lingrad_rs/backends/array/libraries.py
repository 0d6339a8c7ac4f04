"""Which library an array is of."""

from __future__ import annotations

import sys
from typing import Any

__all__ = ["is_cupy", "library_of"]


def library_of(x: Any) -> Any:
    """The library that defines the type of an array."""
    return sys.modules[type(x).__module__.partition(".")[0]]


def is_cupy(x: Any) -> bool:
    """Whether an array is CuPy's."""
    return library_of(x).__name__ == "cupy"
