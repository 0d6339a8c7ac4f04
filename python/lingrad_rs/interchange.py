"""Arrays of other libraries, by the DLPack protocol."""

from __future__ import annotations

import ctypes
import importlib
from typing import Any

import numpy as np

from . import _check
from .backends import select
from .errors import DeviceError, DtypeError

__all__ = ["from_dlpack"]

# The protocol's numbers of kinds of devices.
_HOST = (1, 3)  # ordinary memory, and memory pinned for CUDA
_CUDA = (2, 13)  # a GPU's own, and managed
# Its kinds of numbers, and where in a tensor theirs stands.
_UNSIGNED, _BFLOAT, _DTYPE = 1, 4, 20
_OTHERS = {
    4: "OpenCL",
    7: "Vulkan",
    8: "Metal",
    9: "Verilog simulator",
    10: "ROCm",
    11: "pinned ROCm",
    12: "extension",
    14: "oneAPI",
    15: "WebGPU",
    16: "Hexagon",
    17: "MAIA",
}


def from_dlpack(x: Any) -> Any:
    """The array of another library as one of NumPy's, or on an NVIDIA GPU as one of CuPy's: the same memory, no copy.

    Parameters
    ----------
    x : object with ``__dlpack__`` and ``__dlpack_device__``
        A PyTorch tensor, a JAX array, or anything else that speaks DLPack. Arrays of NumPy and CuPy are given back.

    Returns
    -------
    ndarray
        NumPy's or CuPy's, of the dtype, shape and strides of ``x``. It keeps the memory of ``x`` alive, and what is
        written to one is seen in the other; of a read-only array (JAX's) NumPy's is read-only too, which suffices as
        input, and CuPy's, which knows no such thing, must not be written to. On a GPU, CuPy's current stream waits for
        what has been asked of ``x``.

    Raises
    ------
    DtypeError
        ``x`` does not speak DLPack, or is something that cannot be handed over as it is: a tensor that requires grad
        (``x.detach()`` can), a sparse or lazily negated one, or in bfloat16 where ``ml_dtypes`` is not installed.
    DeviceError
        ``x`` is on a device of another kind, or on an NVIDIA GPU where CuPy is missing or finds no driver or device.

    Notes
    -----
    Results go back in the same way: ``torch.from_dlpack(out)`` is the same memory, and so is
    ``jax.dlpack.from_dlpack(out)``, but that JAX itself copies CPU arrays that do not start at a multiple of 64 bytes.
    As operators that these libraries differentiate, attention is in `lingrad_rs.torch` and `lingrad_rs.jax`.
    """
    if select.kind(x) is not None:
        return _check.array("x", x)
    name = _check.type_name(x)
    if not _check.has(x, "__dlpack__"):
        raise DtypeError(f"x is a {name}; expected an array with __dlpack__, such as PyTorch's, JAX's or CuPy's")
    _refuse_what_dlpack_loses(name, x)
    try:
        device = int(x.__dlpack_device__()[0])
    except Exception as error:  # of whatever kind its library raises
        raise DeviceError(f"x is a {name} whose device DLPack does not have: {error}") from error
    if device in _HOST:
        library: Any = np
    elif device in _CUDA:
        library = select.cupy()
    else:
        raise DeviceError(
            f"x is a {name} on a device of kind {_OTHERS.get(device, 'unknown')} ({device} in DLPack); expected the "
            "CPU or an NVIDIA GPU: nothing is copied between devices"
        )
    try:
        if library is np and str(getattr(x, "dtype", "")).endswith("bfloat16"):
            return _bfloat16_of(x)
        return library.from_dlpack(x)
    except (MemoryError, ImportError):
        raise
    except Exception as error:  # of whatever kind its library raises
        raise DtypeError(
            f"x is a {name} that cannot be handed over without a copy ({error}); expected plain numbers in strides, "
            "such as x.to_dense() of a sparse PyTorch tensor"
        ) from error


class _Bits:
    """An array in bfloat16, which NumPy's DLPack does not know, as one of 16-bit integers: the same memory."""

    def __init__(self, x: Any) -> None:
        self._x = x

    def __dlpack_device__(self) -> Any:
        return self._x.__dlpack_device__()

    def __dlpack__(self, **_: Any) -> Any:
        capsule = self._x.__dlpack__()
        get_pointer = ctypes.pythonapi.PyCapsule_GetPointer
        get_pointer.restype, get_pointer.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
        tensor = get_pointer(capsule, b"dltensor")
        # Behind the address, the device and the number of axes stands the dtype: its kind, bits and lanes.
        kind = ctypes.cast(tensor + _DTYPE, ctypes.POINTER(ctypes.c_uint8))
        if (kind[0], kind[1]) != (_BFLOAT, 16):
            raise DtypeError(f"x says that it is of bfloat16, and its DLPack that its kind is {kind[0]}")
        kind[0] = _UNSIGNED
        return capsule


def _bfloat16_of(x: Any) -> Any:
    """A view of an array in bfloat16 as NumPy's, of the dtype that ``ml_dtypes`` has."""
    try:
        bfloat16 = importlib.import_module("ml_dtypes").bfloat16
    except ImportError as error:
        raise DtypeError("x is of bfloat16, which NumPy has from ml_dtypes: pip install ml_dtypes") from error
    return np.from_dlpack(_Bits(x)).view(bfloat16)


def _refuse_what_dlpack_loses(name: str, x: Any) -> None:
    """Raise for what PyTorch keeps beside the numbers: a graph, and signs that are yet to be changed."""
    if getattr(x, "requires_grad", False) is True:
        raise DtypeError(
            f"x is a {name} that requires grad; expected one that does not: x.detach(), of the same memory"
        )
    if callable(is_negated := getattr(x, "is_neg", None)) and is_negated():
        raise DtypeError(f"x is a {name} that is negated only when read; expected x.resolve_neg(), a copy that is")
