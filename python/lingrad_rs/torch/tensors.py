"""Tensors as arrays and back: the same memory, never a copy."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..errors import ArgumentError, DeviceError, DtypeError
from ..interchange import from_dlpack

__all__ = [
    "DTYPES",
    "array_of",
    "check_device",
    "check_matches",
    "check_tensor",
    "dtype_name",
    "forward_mode_error",
    "is_plain",
    "is_transformed",
    "refuse_forward_mode",
    "tensor_of",
]

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
    # is_tracing is documented, and missing in torch.jit's list of names.
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or _is_watched():  # pyright: ignore[reportPrivateImportUsage]
        return False
    for x in tensors:
        if x is not None and (type(x) not in _PLAIN or x.is_meta or x.is_neg() or _is_batched(x)):
            return False
    return True


def is_transformed() -> bool:
    """Whether a transformation of torch.func is under way, and is not compiled."""
    return not torch.compiler.is_compiling() and _level() is not None


_PLAIN = (Tensor, torch.nn.Parameter)

# PyTorch has no public names for these. Where they are gone, everything counts as watched: slower, and right.
_functorch = getattr(torch._C, "_functorch", None)
_level: Callable[[], int | None] = getattr(_functorch, "maybe_current_level", lambda: None)
_modes: Callable[[], int] = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 1)
_is_batched: Callable[[Tensor], bool] = getattr(_functorch, "is_legacy_batchedtensor", lambda x: True)


def _is_watched() -> bool:
    return _level() is not None or _modes() != 0


def refuse_forward_mode(names: Sequence[str], values: Sequence[Any]) -> None:
    """Raise for a tensor with a tangent, which the operators would drop: the derivative would be 0, silently."""
    if forward_ad._current_level < 0:
        return
    for name, x in zip(names, values, strict=True):
        if not isinstance(x, Tensor):
            continue
        try:
            has_tangent = forward_ad.unpack_dual(x).tangent is not None
        except RuntimeError:  # batched inside of forward mode, where PyTorch cannot tell
            has_tangent = True
        if has_tangent:
            raise forward_mode_error(name)


def forward_mode_error(name: str) -> ArgumentError:
    """What is said of forward-mode differentiation."""
    return ArgumentError(
        f"{name} has a tangent of forward-mode differentiation, which is not implemented; expected reverse mode, as of "
        "torch.func.grad or backward()"
    )


def check_tensor(name: str, value: object) -> Tensor:
    """``value``, if it is a tensor in strides on a device that the library knows."""
    if not isinstance(value, Tensor):
        raise DtypeError(f"{name} is a {type(value).__module__}.{type(value).__qualname__}; expected a torch.Tensor")
    if value.layout is not torch.strided:
        raise DtypeError(f"{name} has layout {value.layout}; expected torch.strided, which {name}.to_dense() has")
    if value.device.type not in _DEVICES:
        raise DeviceError(f"{name} is on {value.device}; expected the CPU or an NVIDIA GPU: nothing is copied")
    return value


def check_device(name: str, x: Tensor, like: Tensor, match: str) -> None:
    """Raise unless ``x`` is on the device of ``like``."""
    if x.device != like.device:
        raise DeviceError(
            f"{name} is on {x.device}; expected {like.device} to match {match}: nothing is copied between devices"
        )


def check_matches(name: str, x: Tensor, like: Tensor, match: str) -> None:
    """Raise unless ``x`` is on the device of ``like`` and of its dtype."""
    check_device(name, x, like, match)
    if x.dtype is not like.dtype:
        raise DtypeError(
            f"{name} has dtype {dtype_name(x.dtype)}; expected {dtype_name(like.dtype)} to match {match}, which "
            f"{name}.to({match}.dtype) has"
        )


def dtype_name(dtype: torch.dtype) -> str:
    """What PyTorch calls it, without its own name."""
    return str(dtype).removeprefix("torch.")


def _bfloat16() -> Any:
    try:
        return importlib.import_module("ml_dtypes").bfloat16
    except ImportError as error:
        raise DtypeError(
            "tensors of bfloat16 need ml_dtypes, which is not installed: pip install 'lingrad_rs[torch]'; or use "
            "x.float()"
        ) from error
