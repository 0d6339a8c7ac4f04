"""Picks the backend by the arrays' own kind, never importing a library that is not loaded.

A backend is a module with the functions of `_cpu`.
"""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

__all__ = ["KINDS", "Kind", "kind", "of"]


@dataclass(frozen=True)
class Kind:
    """Arrays of one library, and the module of this package that computes with them."""

    library: str
    array_type: str
    backend: str

    def holds(self, value: object) -> bool:
        """Whether ``value`` is such an array."""
        library = sys.modules.get(self.library)
        array_type = getattr(library, self.array_type, None)
        return array_type is not None and isinstance(value, array_type)


KINDS = [Kind("numpy", "ndarray", "_cpu"), Kind("cupy", "ndarray", "_gpu")]
"""The libraries whose arrays are taken."""


def kind(value: object) -> Kind | None:
    """The kind of an array, None for anything else."""
    return next((kind for kind in KINDS if kind.holds(value)), None)


def of(*arrays: Any) -> ModuleType:
    """The backend of arrays that were checked to be of one kind; that of NumPy where there is none."""
    found = kind(arrays[0] if arrays else np.empty(0))
    if found is None:
        raise TypeError(f"no backend takes a {type(arrays[0]).__name__}")
    return importlib.import_module(f".{found.backend}", __package__)
