"""A transformer, and the gradient of every one of its parameters.

``x_0 = embed[tokens]``; ``z_i = x_i + Attn_i(norm(x_i))``, ``x_{i+1} = z_i + FFN_i(norm(z_i))`` for every layer;
``logits = norm(x_last) head``.

A residual passes its gradient on beside that of what it bypasses: ``dz = dx_{i+1} + (d norm)^T (d FFN)^T dx_{i+1}``,
then ``dx_i = dz + (d norm)^T (d Attn)^T dz``. The forward pass keeps ``x_0 .. x_last`` and nothing else; the backward
pass computes the inside of each layer again.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from ... import _check
from ..._lingrad_rs import transformer_param_shapes
from ...spec.engines import Auto
from . import layers
from .attention import Planned
from .device import Space
from .layers.attention_block import Inside, SelfAttention
from .measure import measure_error
from .problem.finite import check_arguments

__all__ = ["Report", "Trace", "backward", "forward", "value_and_grad"]

Array = Any
_R = TypeVar("_R")
Report = tuple[tuple[float, float, float, int] | None, list[dict[str, Any]]]
"""The measured error of a layer's attention, and its heads."""

# The eps of every norm.
_EPS = 1e-5
# Each head is measured on no more rows than this.
_SAMPLES_A_HEAD = 64


@dataclass(frozen=True)
class Trace:
    """What the forward pass keeps: the input of every layer and of the final norm, each ``(batch, n, d_model)``."""

    inputs: list[Array]
    plans: list[Planned | None]
    """The engines of each layer, where there is a tolerance: the backward pass uses them again."""


def forward(sp: Space, config: Any, params: Sequence[tuple[str, Array]], x: Array) -> tuple[Array, Trace]:
    """Logits ``(..., n, vocab_size)`` of tokens ``(..., n)`` or embeddings ``(..., n, d_model)``, and the trace.

    Memory beyond the output: one ``(..., n, d_model)`` array a layer, and about seven more while a layer is computed.
    """
    model = _Model(sp, config, dict(params))
    _check_input(sp, x)
    trace = model.layers_forward(x)
    y = layers.linear_forward(sp, model.norm_forward("norm", trace.inputs[-1]), model.params["head"], None)
    return sp.xp.reshape(y, (*_positions(x), config.vocab_size)), trace


def backward(
    sp: Space, config: Any, params: Sequence[tuple[str, Array]], x: Array, trace: Trace, dy: Array
) -> tuple[Array, dict[str, Array]]:
    """``(dx, grads)`` of any loss whose gradient with respect to the logits is ``dy``.

    ``dx (..., n, d_model)`` is the gradient with respect to the embedded input. Memory beyond the results: about eleven
    ``(..., n, d_model)`` arrays, for any number of layers.
    """
    model = _Model(sp, config, dict(params))
    _check_input(sp, x, dy=dy)
    dy = sp.xp.reshape(dy, (*trace.inputs[-1].shape[:-1], config.vocab_size))

    def head(last: Array) -> tuple[None, Array, Array]:
        dlast, grads = layers.linear_backward(sp, last, model.params["head"], False, dy)
        return None, dlast, grads["w"]

    _, dx = model.head_backward(trace, head)
    dx, _ = model.layers_backward(trace, dx, samples=0)
    model.embedding_backward(x, dx)
    return sp.xp.reshape(dx, (*_positions(x), config.d_model)), model.ordered_grads()


def value_and_grad(
    sp: Space,
    config: Any,
    params: Sequence[tuple[str, Array]],
    tokens: Array,
    targets: Array,
    *,
    samples: int,
    progress: Callable[[float], object] | None,
) -> tuple[float, dict[str, Array], list[Report]]:
    """The mean cross-entropy, its gradients, and of each layer the measured error of its attention and its heads.

    The head and the loss are computed chunk by chunk: there is never a logit for every token. The error is measured on
    ``samples`` rows, if any. Memory as for `forward` and `backward`, without logits. ``progress`` is called with the
    fraction done after every stage.
    """
    model = _Model(sp, config, dict(params), progress, stages=5 * config.n_layers + 1)
    trace = model.layers_forward(tokens)

    def head(last: Array) -> tuple[float, Array, Array]:
        return layers.linear_cross_entropy(sp, last, model.params["head"], targets)

    loss, dx = model.head_backward(trace, head)
    dx, reports = model.layers_backward(trace, dx, samples=samples)
    model.embedding_backward(tokens, dx)
    return loss, model.ordered_grads(), reports


def _positions(x: Array) -> tuple[int, ...]:
    """All axes of tokens or embeddings but that of width, the last of them n."""
    return x.shape if _check.is_integer(x) else x.shape[:-1]


def _check_input(sp: Space, x: Array, **others: Array) -> None:
    embeddings = {} if _check.is_integer(x) else {"x": x}
    if embeddings or others:
        check_arguments(sp, **embeddings, **others)


@dataclass(frozen=True)
class _Attended:
    """The first half of a layer: the normed input, what attention computed of it, and ``z``."""

    normed: Array
    inside: Inside
    z: Array


@dataclass
class _Model:
    """The parameters, known to be finite, the gradients so far, and how much has been done."""

    sp: Space
    config: Any
    params: dict[str, Array]
    progress: Callable[[float], object] | None = None
    stages: int = 1
    stages_done: int = 0
    grads: dict[str, Array] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_arguments(self.sp, **{f"the parameter {name}": x for name, x in self.params.items()})

    def stage_done(self) -> None:
        self.stages_done += 1
        if self.progress is not None:
            self.progress(self.stages_done / self.stages)

    def norm_forward(self, name: str, x: Array) -> Array:
        bias = self.params.get(f"{name}.bias")
        return layers.norm_forward(self.sp, x, self.params[f"{name}.gain"], bias, _EPS)

    def norm_backward(self, name: str, x: Array, dy: Array) -> Array:
        """The gradient with respect to x; those of the parameters go to ``grads``."""
        gain, has_bias = self.params[f"{name}.gain"], f"{name}.bias" in self.params
        dx, grads = layers.norm_backward(self.sp, x, gain, has_bias, _EPS, dy)
        self.take(name, grads)
        return dx

    def take(self, name: str, grads: dict[str, Array]) -> None:
        self.grads |= {f"{name}.{own}": grad for own, grad in grads.items()}

    def attention(self, i: int) -> SelfAttention:
        config = self.config
        return SelfAttention(
            self.sp,
            [self.params[f"layers.{i}.attn.{name}"] for name in ("w_q", "w_k", "w_v", "w_o")],
            engine=config.engine,
            causal=config.causal,
            n_heads=config.n_heads,
            n_kv_heads=config.n_kv_heads or config.n_heads,
            rope=config.rope,
            score_bound=config.score_bound,
        )

    def feed_forward(self, i: int) -> tuple[Array, Array, str]:
        return self.params[f"layers.{i}.ffn.w_in"], self.params[f"layers.{i}.ffn.w_out"], self.config.activation

    def layers_forward(self, x: Array) -> Trace:
        sp = self.sp
        rows = layers.embedding_forward(sp, x, self.params["embed"]) if _check.is_integer(x) else x
        *batch, n = _positions(x)
        trace = Trace([sp.xp.reshape(rows, (math.prod(batch), n, self.config.d_model))], [])
        for i in range(self.config.n_layers):
            trace.inputs.append(self.layer_forward(trace, i))
        return trace

    def layer_forward(self, trace: Trace, i: int) -> Array:
        """``x_{i+1}`` from ``x_i``; the engines that were used go to the trace."""
        attended = self.attend(self.attention(i), trace, i, keep=isinstance(self.config.engine, Auto))
        state, z = attended.inside.state, attended.z
        trace.plans.append(None if state is None else state.planned())
        del attended, state
        self.stage_done()
        z = z + layers.feed_forward_forward(
            self.sp, self.norm_forward(f"layers.{i}.ffn_norm", z), *self.feed_forward(i)
        )
        self.stage_done()
        return z

    def attend(self, attn: SelfAttention, trace: Trace, i: int, *, keep: bool) -> _Attended:
        """The first half of a layer."""
        normed = self.norm_forward(f"layers.{i}.attn_norm", trace.inputs[i])
        inside = attn.inside(normed, keep=keep)
        return _Attended(normed, inside, trace.inputs[i] + attn.finish(inside))

    def head_backward(self, trace: Trace, head: Callable[[Array], tuple[_R, Array, Array]]) -> tuple[_R, Array]:
        """What ``head(last) -> (result, dlast, dhead)`` makes of the final norm's output, and ``dx_last``."""
        result, dlast, self.grads["head"] = head(self.norm_forward("norm", trace.inputs[-1]))
        dx = self.norm_backward("norm", trace.inputs[-1], dlast)
        self.stage_done()
        return result, dx

    def layers_backward(self, trace: Trace, dx: Array, *, samples: int) -> tuple[Array, list[Report]]:
        """``dx_0`` from ``dx_last``, and a report of each layer."""
        reports: list[Report] = []
        for i in reversed(range(self.config.n_layers)):
            dx, report = self.layer_backward(trace, i, dx, samples)
            reports.append(report)
        return dx, reports[::-1]

    def layer_backward(self, trace: Trace, i: int, dx: Array, samples: int) -> tuple[Array, Report]:
        """``dx_i`` from ``dx_{i+1}``."""
        sp, name = self.sp, f"layers.{i}"
        attn = self.attention(i)
        planned = trace.plans[i]
        if planned is not None:
            attn = dataclasses.replace(attn, engine=planned)
        attended = self.attend(attn, trace, i, keep=True)
        normed, inside, z = attended.normed, attended.inside, attended.z
        del attended
        error = None
        if samples > 0:
            q, k, v = (part.rows for part in (inside.q, inside.k, inside.v))
            options = {"causal": attn.causal, "scale": attn.score_scale, "samples": samples, "seed": i}
            error = measure_error(sp, q, k, v, None, inside.out, **options)
        self.stage_done()

        through, grads = layers.feed_forward_backward(
            sp, self.norm_forward(f"{name}.ffn_norm", z), *self.feed_forward(i), dx
        )
        self.take(f"{name}.ffn", grads)
        dz = dx + self.norm_backward(f"{name}.ffn_norm", z, through)
        del z, through
        self.stage_done()

        through, grads, heads = attn.pull_back(normed, inside, dz, samples=min(samples, _SAMPLES_A_HEAD))
        del normed, inside
        self.take(f"{name}.attn", grads)
        dx = dz + self.norm_backward(f"{name}.attn_norm", trace.inputs[i], through)
        self.stage_done()
        return dx, (error, heads)

    def embedding_backward(self, x: Array, dx: Array) -> None:
        """The gradient of ``embed``, 0 where the input is embeddings."""
        embed = self.params["embed"]
        if _check.is_integer(x):
            self.grads["embed"] = layers.embedding_backward(self.sp, x, embed.shape[0], dx)
        else:
            self.grads["embed"] = self.sp.zeros(embed.shape, embed.dtype)

    def ordered_grads(self) -> dict[str, Array]:
        """The gradients in the model's order."""
        return {name: self.grads[name] for name, _ in transformer_param_shapes(self.config)}
