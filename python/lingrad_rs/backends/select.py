"""Picks the backend by the arrays' own kind, never importing a library that is not loaded.

A backend is a module with the functions of `cpu`.
"""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

from ..errors import DeviceError

__all__ = ["KINDS", "Kind", "cupy", "kind", "of"]


@dataclass(frozen=True)
class Kind:
    """Arrays of one library, and the module of this package that computes with them."""

    library: str
    array_type: str
    backend: str

    def _type(self) -> type | None:
        return getattr(sys.modules.get(self.library), self.array_type, None)

    def holds(self, value: object) -> bool:
        """Whether ``value`` is such an array."""
        array_type = self._type()
        return array_type is not None and isinstance(value, array_type)

    def is_plain(self, value: object) -> bool:
        """Whether it is one of no subclass."""
        return type(value) is self._type()


KINDS = [Kind("numpy", "ndarray", "cpu"), Kind("cupy", "ndarray", "array")]
"""The libraries whose arrays are taken."""

# CUDA's numbers of errors.
_INSUFFICIENT_DRIVER = 35
_NO_DEVICE = 100
_NO_GPU = "there is no GPU: CUDA finds no device (nvidia-smi lists them, CUDA_VISIBLE_DEVICES hides them)"


def kind(value: object) -> Kind | None:
    """The kind of an array, None for anything else."""
    return next((kind for kind in KINDS if kind.holds(value)), None)


def of(*arrays: Any) -> ModuleType:
    """The backend of arrays that were checked to be of one kind; that of NumPy where there is none."""
    found = kind(arrays[0] if arrays else np.empty(0))
    if found is None:
        raise TypeError(f"no backend takes a {type(arrays[0]).__name__}")
    name = f"{__package__}.{found.backend}"
    return sys.modules.get(name) or importlib.import_module(name)


def cupy() -> Any:
    """CuPy, where there is a GPU that it can use; this alone imports it.

    Raises
    ------
    DeviceError
        CuPy is not installed or does not load, there is no driver or too old a one, or no GPU; the message says which.
    """
    try:
        library: Any = importlib.import_module("cupy")
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "cupy":
            raise DeviceError(
                "arrays on a GPU need CuPy, which is not installed: pip install 'lingrad_rs[cuda12]', or "
                "'lingrad_rs[cuda13]' for CUDA 13"
            ) from error
        raise DeviceError(f"CuPy is installed and does not load: {error}") from error
    runtime = library.cuda.runtime
    if getattr(runtime, "is_hip", False):
        raise DeviceError("this CuPy computes on AMD GPUs; expected one for CUDA: pip install 'lingrad_rs[cuda12]'")
    try:
        count = runtime.getDeviceCount()
    except runtime.CUDARuntimeError as error:
        raise DeviceError(_why_cuda_fails(runtime, error)) from error
    if count == 0:
        raise DeviceError(_NO_GPU)
    return library


def _why_cuda_fails(runtime: Any, error: Any) -> str:
    if error.status == _NO_DEVICE:
        return _NO_GPU
    try:
        supported = runtime.driverGetVersion()
    except runtime.CUDARuntimeError:
        supported = None
    if supported == 0:
        return "there is no NVIDIA driver on this machine, so no GPU can be used; install one, or use NumPy arrays"
    if error.status == _INSUFFICIENT_DRIVER:
        return f"the NVIDIA driver is too old for CuPy; update it, or install CuPy for an earlier CUDA ({error})"
    return f"CUDA does not start: {error}"
