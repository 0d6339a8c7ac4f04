"""Gradients of long-context transformers in almost linear time, with the error known."""

from __future__ import annotations

from ._lingrad_rs import __version__
from .attention import (
    Plan,
    Pullback,
    attention,
    attention_backward,
    attention_vjp,
    measure_error,
    plan_attention,
)
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
from .nn.model import GradientReport, LayerReport, Transformer, TransformerConfig, load, save
from .nn.modules import (
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
from .spec.engines import Auto, Engine, Exact, Landmark, LandmarkConstants, Polynomial
from .spec.plan import ErrorEstimate, HeadPlan
from .threads import build_info, get_num_threads, set_num_threads

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
    "attention_backward",
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
