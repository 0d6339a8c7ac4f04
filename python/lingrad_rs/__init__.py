"""Gradients of long-context transformers in almost linear time, with the error known."""

from __future__ import annotations

from ._lingrad_rs import __version__
from .attention import Pullback, attention, attention_vjp, measure_error, plan_attention
from .engines import Auto, Engine, Exact, Landmark, LandmarkConstants, Polynomial
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
from .interchange import from_dlpack
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
from .plan import ErrorEstimate, HeadPlan, Plan
from .threads import build_info, get_num_threads, set_num_threads
from .transformer import GradientReport, LayerReport, Transformer, TransformerConfig, load, save

__all__ = [
    "Activation",
    "ArgumentError",
    "Auto",
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
    "HeadPlan",
    "Landmark",
    "LandmarkConstants",
    "LayerNorm",
    "LayerReport",
    "Linear",
    "LingradError",
    "Module",
    "NonFiniteError",
    "Plan",
    "Polynomial",
    "Pullback",
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
    "from_dlpack",
    "get_num_threads",
    "load",
    "measure_error",
    "plan_attention",
    "save",
    "set_num_threads",
]
