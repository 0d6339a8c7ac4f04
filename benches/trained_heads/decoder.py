"""Decoders with gated feed-forward blocks, of the kinds of Llama and of Gemma 3, forward beside backward.

They are chains of this library's modules and of those below, which are modules too. Weights have the names and the
layout of GGUF files: ``(out, in)``, so that a token is multiplied by their transpose; so have gradients.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

import lingrad_rs as lg

Array = NDArray[Any]
Grads = dict[str, Array]
Pullback = Callable[[Array], tuple[Array, Grads]]

EMBED, LAST_NORM = "token_embd", "output_norm"
# Numbers in the logits of as many tokens as are taken at once.
_LOGITS = 1 << 26


@dataclass(frozen=True)
class Config:
    """What the weights alone do not tell.

    ``rope_bases`` and ``windows`` have an entry a layer. A window is how many keys a token sees, itself among them;
    None: all before it. Pairs that RoPE turns are neighbours where ``pairs_are_neighbours``, else halves of a head.
    """

    heads: int
    kv_heads: int
    width: int
    context: int
    rope_bases: tuple[float, ...]
    windows: tuple[int | None, ...]
    pairs_are_neighbours: bool
    norm_eps: float
    activation: Literal["silu", "gelu_tanh"]
    embedding_scale: float = 1.0
    norms_heads: bool = False
    norms_after: bool = False

    @property
    def layers(self) -> int:
        return len(self.windows)


@dataclass(frozen=True)
class Head:
    """What goes into attention in one query head, rotated and without a scale, with the key head that serves it."""

    layer: int
    index: int
    q: Array
    k: Array
    v: Array

    @property
    def name(self) -> str:
        return f"L{self.layer}h{self.index}"


def rope_base(base: float, width: int, context: int, tokens: int) -> float:
    """The base of a text of so many tokens: the model's own, but where it was trained on shorter texts.

    Pair ``i`` turns by ``base^(-2i/width)`` a token. A base greater by ``s^(width/(width - 2))`` leaves the first pair
    as it is and slows the last by ``s = tokens / context``, so that it meets no angle that is new to it. SmolLM2's loss
    is then 2.51 on 4,096 tokens with ``s = 4``, 2.41 with its own base, and 4.64 with all pairs slowed by s alike.
    """
    return base * max(1.0, tokens / context) ** (width / (width - 2))


def turned(x: Array, angles: Array, neighbours: bool) -> Array:
    """RoPE: pair ``i`` of row ``j`` of ``x (..., n, d)`` turned by ``angles[j, i]``.

    A rotation's transpose turns back, so the gradient is that of the result turned by ``-angles``.
    """
    cos, sin = np.cos(angles).astype(x.dtype), np.sin(angles).astype(x.dtype)  # (n, d / 2)
    half = x.shape[-1] // 2
    first, second = (slice(0, None, 2), slice(1, None, 2)) if neighbours else (slice(0, half), slice(half, None))
    a, b = x[..., first], x[..., second]
    y = np.empty_like(x)
    y[..., first] = a * cos - b * sin
    y[..., second] = a * sin + b * cos
    return y


def apart(x: Array, heads: int) -> Array:
    """``(n, heads d)`` as ``(heads, n, d)``."""
    return np.ascontiguousarray(x.reshape(len(x), heads, -1).swapaxes(0, 1))


def together(x: Array) -> Array:
    """``(heads, n, d)`` as ``(n, heads d)``."""
    return x.swapaxes(0, 1).reshape(x.shape[1], -1)


@dataclass(frozen=True)
class Part:
    """What the modules of a layer share: its weights, by the names that they have within it."""

    config: Config
    weights: Mapping[str, Array]
    layer: int

    def weight(self, name: str) -> Array:
        return self.weights[f"blk.{self.layer}.{name}.weight"]

    def named(self, **grads: Array) -> Grads:
        return {f"blk.{self.layer}.{name}.weight": grad for name, grad in grads.items()}

    def product(self, name: str, x: Array) -> tuple[Array, Pullback]:
        y, pull = lg.Linear(w=self.weight(name).T).vjp(x)

        def pullback(dy: Array) -> tuple[Array, Grads]:
            dx, grads = pull(dy)
            return dx, self.named(**{name: grads["w"].T})

        return y, pullback

    def norm(self, name: str, x: Array, is_there: bool = True) -> tuple[Array, Pullback]:
        if not is_there:
            return x, lambda dy: (dy, {})
        y, pull = lg.RMSNorm(gain=self.weight(name), eps=self.config.norm_eps).vjp(x)

        def pullback(dy: Array) -> tuple[Array, Grads]:
            dx, grads = pull(dy)
            return dx, self.named(**{name: grads["gain"]})

        return y, pullback


@dataclass(frozen=True)
class Attention(Part):
    """``y = norm(attention(q, k, v) w_o)`` with q, k and v from ``norm(x)``, as a module.

    The engine computes layers that see all tokens; those with a window are exact.
    """

    engine: lg.Engine

    def heads(
        self, x: Array
    ) -> tuple[tuple[Array, Array, Array], Callable[[Array, Array, Array], tuple[Array, Grads]]]:
        """``q (h, n, d)``, ``k`` and ``v (h_kv, n, d)``, and their pullback."""
        config = self.config
        h, pull_norm = self.norm("attn_norm", x)
        q, pull_q = self.product("attn_q", h)
        k, pull_k = self.product("attn_k", h)
        v, pull_v = self.product("attn_v", h)
        q, pull_q_norm = self.norm("attn_q_norm", apart(q, config.heads), config.norms_heads)
        k, pull_k_norm = self.norm("attn_k_norm", apart(k, config.kv_heads), config.norms_heads)
        angles = np.arange(len(x))[:, None] * self._speeds(len(x))
        neighbours = config.pairs_are_neighbours
        arrays = turned(q, angles, neighbours), turned(k, angles, neighbours), apart(v, config.kv_heads)

        def pullback(dq: Array, dk: Array, dv: Array) -> tuple[Array, Grads]:
            dq, of_q_norm = pull_q_norm(turned(dq, -angles, neighbours))
            dk, of_k_norm = pull_k_norm(turned(dk, -angles, neighbours))
            (from_q, of_q), (from_k, of_k) = pull_q(together(dq)), pull_k(together(dk))
            from_v, of_v = pull_v(together(dv))
            dx, of_norm = pull_norm(from_q + from_k + from_v)
            return dx, of_q_norm | of_k_norm | of_q | of_k | of_v | of_norm

        return arrays, pullback

    def _speeds(self, tokens: int) -> Array:
        """By how much each pair of entries turns a token; with a window no two that meet are far apart."""
        config = self.config
        base = config.rope_bases[self.layer]
        if config.windows[self.layer] is None:
            base = rope_base(base, config.width, config.context, tokens)
        return base ** (-2 * np.arange(config.width // 2) / config.width)

    def vjp(self, x: Array) -> tuple[Array, Pullback]:
        arrays, pull_heads = self.heads(x)
        window = self.config.windows[self.layer]
        if window is None:
            out, pull_attention = lg.attention_vjp(*arrays, engine=self.engine, causal=True)
        else:
            near = (window - 1, None)
            out, pull_attention = lg.attention_vjp(*arrays, engine=lg.Exact(), causal=True, window=near)
        y, pull_out = self.product("attn_output", together(out))
        y, pull_norm = self.norm("post_attention_norm", y, self.config.norms_after)

        def pullback(dy: Array) -> tuple[Array, Grads]:
            dy, of_norm = pull_norm(dy)
            dout, of_out = pull_out(dy)
            dx, of_heads = pull_heads(*pull_attention(apart(dout, self.config.heads)))
            return dx, of_norm | of_out | of_heads

        return y, pullback


@dataclass(frozen=True)
class FeedForward(Part):
    """``y = norm((act(h w_gate) * (h w_up)) w_down)`` with ``h = norm(x)``, as a module."""

    def vjp(self, x: Array) -> tuple[Array, Pullback]:
        h, pull_norm = self.norm("ffn_norm", x)
        gate, pull_gate = self.product("ffn_gate", h)
        up, pull_up = self.product("ffn_up", h)
        active, pull_activation = lg.Activation(self.config.activation).vjp(gate)
        y, pull_down = self.product("ffn_down", active * up)
        y, pull_last = self.norm("post_ffw_norm", y, self.config.norms_after)

        def pullback(dy: Array) -> tuple[Array, Grads]:
            dy, of_last = pull_last(dy)
            dh, of_down = pull_down(dy)
            from_gate, of_gate = pull_gate(pull_activation(dh * up)[0])
            from_up, of_up = pull_up(dh * active)
            dx, of_norm = pull_norm(from_gate + from_up)
            return dx, of_last | of_down | of_gate | of_up | of_norm

        return y, pullback


@dataclass(frozen=True)
class Again:
    """A module of which only the input is kept: what its pullback needs is computed once more."""

    module: lg.Module

    def vjp(self, x: Array) -> tuple[Array, Pullback]:
        return self.module.vjp(x)[0], lambda dy: self.module.vjp(x)[1](dy)


@dataclass(frozen=True)
class Decoder:
    """A model of ``config`` with those weights, all of one dtype. Logits are products with the embedding."""

    config: Config
    weights: Mapping[str, Array]

    def visit(self, tokens: Array, wanted: Mapping[int, Sequence[int]], meet: Callable[[Head], None]) -> float | None:
        """Calls ``meet`` with the wanted heads of each layer while the model is computed exactly.

        Returns the mean loss of the next token where the last layer is among them; no layer after those is computed.
        """
        x = self._embedded(tokens)
        last = max(wanted)
        for layer in range(last + 1):
            attention, feed_forward = self.layer(layer, lg.Exact())
            (q, k, v), _ = attention.heads(x)
            for index in wanted.get(layer, ()):
                served = index * self.config.kv_heads // self.config.heads
                meet(Head(layer, index, q[index], k[served], v[served]))
            for module in (attention, feed_forward):
                x = x + module.vjp(x)[0]
        return self._loss(x, tokens, needs_gradient=False)[0] if last + 1 == self.config.layers else None

    def value_and_grad(self, tokens: Array, engine: lg.Engine) -> tuple[float, Grads]:
        """The mean loss of the next token, and its gradient with respect to every weight.

        The embedding ``E`` is used at both ends: ``dE`` is the sum of what comes from the logits and from the input.
        """
        layers = (self.layer(i, engine) for i in range(self.config.layers))
        chain = lg.Chain([lg.Residual(Again(module)) for layer in layers for module in layer])
        y, pull = chain.vjp(self._embedded(tokens))
        loss, dy, grads = self._loss(y, tokens, needs_gradient=True)
        dx, of_layers = pull(dy)
        np.add.at(grads[f"{EMBED}.weight"], tokens, self._scale(dx))
        for some in of_layers:
            grads |= some
        return loss, grads

    def layer(self, layer: int, engine: lg.Engine) -> tuple[Attention, FeedForward]:
        return Attention(self.config, self.weights, layer, engine), FeedForward(self.config, self.weights, layer)

    def _scale(self, x: Array) -> Array:
        return x * x.dtype.type(self.config.embedding_scale)

    def _embedded(self, tokens: Array) -> Array:
        return self._scale(self.weights[f"{EMBED}.weight"][tokens])

    def _loss(self, x: Array, tokens: Array, needs_gradient: bool) -> tuple[float, Array, Grads]:
        """The mean over tokens of ``-log softmax(norm(x) E^T)`` at the next, and its gradients, by rows of logits.

        With ``p`` the softmax of a row and ``e`` the unit vector of the token that follows, ``dlogits = (p - e) / n``;
        then ``dE = dlogits^T norm(x)`` and ``dnorm = dlogits E``.
        """
        embed = self.weights[f"{EMBED}.weight"]
        norm = lg.RMSNorm(gain=self.weights[f"{LAST_NORM}.weight"], eps=self.config.norm_eps)
        h, pull = norm.vjp(x)
        targets = tokens[1:]
        dh, dembed = np.zeros_like(h), np.zeros_like(embed) if needs_gradient else embed[:0]
        rows = max(1, _LOGITS // len(embed))
        total = 0.0
        for start in range(0, len(targets), rows):
            some = slice(start, min(start + rows, len(targets)))
            logits = h[some] @ embed.T
            logits -= logits.max(axis=1, keepdims=True)
            own = np.arange(len(logits)), targets[some]
            total -= float(logits[own].sum(dtype=np.float64))
            np.exp(logits, out=logits)
            sums = logits.sum(axis=1, keepdims=True)
            total += float(np.log(sums).sum(dtype=np.float64))
            if needs_gradient:
                logits /= sums
                logits[own] -= 1
                logits /= len(targets)
                dh[some] = logits @ embed
                dembed += logits.T @ h[some]
        loss = total / len(targets)
        if not needs_gradient:
            return loss, dh[:0], {}
        dx, grads = pull(dh)
        return loss, dx, {f"{EMBED}.weight": dembed, f"{LAST_NORM}.weight": grads["gain"]}


@dataclass(frozen=True)
class Difference:
    """How one gradient of all weights differs from another.

    ``relative`` and ``cosine`` are of all weights as one vector; ``weights`` has the relative error of each.
    """

    relative: float
    cosine: float
    weights: dict[str, float] = dataclasses.field(repr=False)


def difference(got: Grads, exact: Grads) -> Difference:
    """The difference of ``got`` from ``exact``, summed in float64."""
    errors, norms, dots, own = {}, {}, 0.0, 0.0
    for name, want in exact.items():
        x, y = got[name].astype(np.float64).ravel(), want.astype(np.float64).ravel()
        dots += float(x @ y)
        own += float(x @ x)
        norms[name] = float(y @ y)
        x -= y
        errors[name] = float(x @ x)
    norm = sum(norms.values())
    return Difference(
        relative=math.sqrt(sum(errors.values()) / norm),
        cosine=dots / math.sqrt(own * norm),
        weights={name: math.sqrt(errors[name] / norms[name]) for name in exact},
    )
