"""Tensors as arrays and back: the same memory, never a copy."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import DeviceError, DtypeError
from ..interchange import from_dlpack

__all__ = ["DTYPES", "array_of", "check_dtypes_match", "check_tensor", "is_plain", "tensor_of"]

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
"""The dtypes of queries, keys and values."""

# Where a kernel is, or where shapes alone are computed.
_DEVICES = ("cpu", "cuda", "meta")


def array_of(x: Tensor) -> Any:
    """A tensor of the CPU as NumPy's array, one of an NVIDIA GPU as CuPy's: same memory, shape and strides."""
    x = x.detach()
    if x.is_cuda:
        return from_dlpack(x)
    if x.dtype is torch.bfloat16:  # which NumPy does not have
        return x.view(torch.int16).numpy().view(_bfloat16())
    return x.numpy()


def tensor_of(x: Any) -> Tensor:
    """The tensor of an array that the library returned."""
    if not isinstance(x, np.ndarray):
        return torch.from_dlpack(x)
    if x.dtype.kind == "f":
        return torch.from_numpy(x)
    return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)


def is_plain(*tensors: Tensor | None) -> bool:
    """Whether tensors hold numbers, and nothing traces, batches or counts what is done with them."""
    return not (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or _is_watched()
        or any(x is not None and (type(x) not in _PLAIN or x.is_meta or x.is_neg()) for x in tensors)
    )


_PLAIN = (Tensor, torch.nn.Parameter)


def _watcher() -> Callable[[], bool]:
    """What tells whether a transformation of torch.func or a mode of dispatch is under way.

    PyTorch has no public name for it. Where these are gone, everything counts as watched: slower, and right.
    """
    try:
        level, modes = torch._C._functorch.maybe_current_level, torch._C._len_torch_dispatch_stack
        if level() is None and modes() == 0:
            return lambda: level() is not None or modes() != 0
    except (AttributeError, TypeError):
        pass
    return lambda: True


_is_watched = _watcher()


def check_tensor(name: str, value: object) -> Tensor:
    """``value``, if it is a tensor in strides on a device that the library knows."""
    if not isinstance(value, Tensor):
        raise DtypeError(f"{name} is a {type(value).__module__}.{type(value).__qualname__}; expected a torch.Tensor")
    if value.layout is not torch.strided:
        raise DtypeError(f"{name} has layout {value.layout}; expected torch.strided, which {name}.to_dense() has")
    if value.device.type not in _DEVICES:
        raise DeviceError(f"{name} is on {value.device}; expected the CPU or an NVIDIA GPU: nothing is copied")
    return value


def check_dtypes_match(name: str, x: Tensor, like: Tensor, match: str) -> None:
    """Raise unless ``x`` is on the device of ``like`` and of its dtype."""
    if x.device != like.device:
        raise DeviceError(
            f"{name} is on {x.device}; expected {like.device} to match {match}: nothing is copied between devices"
        )
    if x.dtype is not like.dtype:
        raise DtypeError(
            f"{name} has dtype {_name(x.dtype)}; expected {_name(like.dtype)} to match {match}, which "
            f"{name}.to({match}.dtype) has"
        )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _bfloat16() -> Any:
    try:
        return importlib.import_module("ml_dtypes").bfloat16
    except ImportError as error:
        raise DtypeError(
            "tensors of bfloat16 need ml_dtypes, which is not installed: pip install 'lingrad_rs[torch]'; or use "
            "x.float()"
        ) from error
