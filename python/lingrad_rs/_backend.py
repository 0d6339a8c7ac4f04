"""Picks the backend by the arrays' own kind, never importing a library that is not loaded.

A backend is a module with the functions of `_cpu`. This version has that one.
"""

from __future__ import annotations

from types import ModuleType

from . import _check, _cpu

__all__ = ["of"]


def of(*arrays: object) -> ModuleType:
    """The backend of arrays of one kind; `DeviceError` or `DtypeError` for a kind that none takes."""
    for value in arrays:
        _check.array("an array", value)
    return _cpu
