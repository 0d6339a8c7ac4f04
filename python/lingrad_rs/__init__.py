"""Gradients of long-context transformers in almost linear time, with the error known."""

from __future__ import annotations

from ._lingrad_rs import __version__
from .attention import ErrorEstimate, attention, attention_vjp, measure_error
from .engines import Exact, Polynomial
from .errors import (
    ArgumentError,
    DenominatorError,
    DeviceError,
    DtypeError,
    LingradError,
    NonFiniteError,
    ShapeError,
    ToleranceError,
)
from .threads import build_info, get_num_threads, set_num_threads

__all__ = [
    "ArgumentError",
    "DenominatorError",
    "DeviceError",
    "DtypeError",
    "ErrorEstimate",
    "Exact",
    "LingradError",
    "NonFiniteError",
    "Polynomial",
    "ShapeError",
    "ToleranceError",
    "__version__",
    "attention",
    "attention_vjp",
    "build_info",
    "get_num_threads",
    "measure_error",
    "set_num_threads",
]
