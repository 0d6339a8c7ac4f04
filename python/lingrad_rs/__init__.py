"""Gradients of long-context transformers in almost linear time, with the error known."""

from __future__ import annotations

from ._lingrad_rs import __version__
from .attention import ErrorEstimate, attention, attention_vjp, measure_error
from .engines import Engine, Exact, Polynomial
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
from .modules import (
    Activation,
    Chain,
    Embedding,
    FeedForward,
    LayerNorm,
    Linear,
    Module,
    Residual,
    RMSNorm,
    SelfAttention,
)
from .threads import build_info, get_num_threads, set_num_threads
from .transformer import GradientReport, LayerReport, Transformer, TransformerConfig, load, save

__all__ = [
    "Activation",
    "ArgumentError",
    "Chain",
    "DenominatorError",
    "DeviceError",
    "DtypeError",
    "Embedding",
    "Engine",
    "ErrorEstimate",
    "Exact",
    "FeedForward",
    "GradientReport",
    "LayerNorm",
    "LayerReport",
    "Linear",
    "LingradError",
    "Module",
    "NonFiniteError",
    "Polynomial",
    "RMSNorm",
    "Residual",
    "SelfAttention",
    "ShapeError",
    "ToleranceError",
    "Transformer",
    "TransformerConfig",
    "__version__",
    "attention",
    "attention_vjp",
    "build_info",
    "get_num_threads",
    "load",
    "measure_error",
    "save",
    "set_num_threads",
]
