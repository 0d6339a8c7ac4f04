"""The modules of a transformer, each with the gradient of all it depends on.

A module has ``vjp(x) -> (y, pullback)`` with ``pullback(dy) -> (dx, grads)``: ``dx`` is the gradient of a loss with
respect to ``x`` and ``grads`` a dict of those with respect to the module's parameters, by the module's own names, for
any loss whose gradient with respect to ``y`` is ``dy``. Any object with that method is a module.

Arrays are ``(..., n, d)``, float32 or float64, any strides, NumPy's or CuPy's, parameters and inputs of one kind and on
one device; results are new C-contiguous arrays of the same dtype and kind (in a `Chain` they are what its modules
return). A pullback may be called many times. It reads ``x`` and the parameters'
arrays again, so these must not be written to before it is called; a module's attributes may be set to other arrays.

All modules raise `ShapeError`, `DtypeError` and `DeviceError` for arrays that do not fit, and `NonFiniteError` where
one holds NaN or infinity, or a result would.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from .. import _check
from ..backends import select
from ..errors import ArgumentError, ShapeError
from ..spec.engines import Engine, Polynomial, check_engine

__all__ = [
    "Activation",
    "Chain",
    "Embedding",
    "FeedForward",
    "LayerNorm",
    "Linear",
    "Module",
    "RMSNorm",
    "Residual",
    "SelfAttention",
]

Array = NDArray[Any]
Pullback = Callable[[Array], tuple[Any, Any]]
ACTIVATIONS = ("relu", "silu", "gelu_tanh")


@runtime_checkable
class Module(Protocol):
    """Anything with a ``vjp``."""

    def vjp(self, x: Any, /) -> tuple[Any, Pullback]:
        """``y``, and the function that pulls a gradient with respect to ``y`` back."""
        ...


def _input(x: object, params: Mapping[str, Array], width: int | None) -> Array:
    """``x``, once it is known to be ``(..., n, width)`` and of the parameters' dtype."""
    checked = _check.floats(**params, x=x)[-1]
    if width is None:
        _check.shape("x", checked, ("...", "n", "d"))
    else:
        name, param = next(iter(params.items()))
        _check.shape("x", checked, ("...", "n", width), match=f"{name} of shape {param.shape}")
    return checked


def _named(**arrays: object) -> dict[str, Array]:
    return dict(zip(arrays, _check.floats(**arrays), strict=True))


def _upstream(dy: object, shape: tuple[int, ...], dtype: np.dtype[Any], x: Array) -> Array:
    """``dy``, once it is known to be like ``y``."""
    checked = _check.floats(dy=dy)[0]
    _check.same_device("dy", checked, x, match="x")
    _check.same_dtype("dy", checked, dtype, match="y")
    _check.shape("dy", checked, shape, match=f"y of shape {shape}")
    return checked


def _result(x: Array, y: Array, backward: Callable[[Array], tuple[Any, Any]]) -> tuple[Array, Pullback]:
    """``y`` and its pullback, which checks ``dy`` and keeps ``x``, not ``y``."""
    shape, dtype = y.shape, y.dtype
    return y, lambda dy: backward(_upstream(dy, shape, dtype, x))


class Linear:
    """``y = x w + b``.

    ``dx = dy w^T``, ``dw = x^T dy``, ``db = sum over tokens of dy``.

    Parameters
    ----------
    w : ndarray, shape (d, e)
    b : ndarray, shape (e,), optional

    Notes
    -----
    Cost: O(n d e) time. The gradients are named ``w`` and, with a bias, ``b``.
    """

    def __init__(self, *, w: Array, b: Array | None = None) -> None:
        self.w = _check.floats(w=w)[0]
        _check.shape("w", self.w, ("d", "e"))
        self.b = None if b is None else _check.floats(w=w, b=b)[1]
        if self.b is not None:
            _check.shape("b", self.b, self.w.shape[1:], match=f"w of shape {self.w.shape}")

    def vjp(self, x: Array) -> tuple[Array, Pullback]:
        """``y (..., n, e)`` for ``x (..., n, d)``, and its pullback."""
        w, b = self.w, self.b
        x = _input(x, {"w": w}, w.shape[0])
        backend = select.of(x)
        y = backend.linear_forward(x, w, b)
        return _result(x, y, lambda dy: backend.linear_backward(x, w, b is not None, dy))


class Activation:
    """A nonlinearity, entry by entry.

    ``"relu"``: ``max(x, 0)``, with derivative 0 at 0. ``"silu"``: ``x / (1 + exp(-x))``.
    ``"gelu_tanh"``: ``x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))``.

    Parameters
    ----------
    kind : {"relu", "silu", "gelu_tanh"}

    Notes
    -----
    Cost: O(n d) time. It has no parameters: its ``grads`` are empty.
    """

    def __init__(self, kind: Literal["relu", "silu", "gelu_tanh"]) -> None:
        self.kind = _check.choice("kind", kind, ACTIVATIONS)

    def vjp(self, x: Array) -> tuple[Array, Pullback]:
        """``y`` of the shape of ``x (..., n, d)``, and its pullback."""
        x, kind = _input(x, {}, None), self.kind
        backend = select.of(x)
        y = backend.activation_forward(x, kind)
        return _result(x, y, lambda dy: (backend.activation_backward(x, kind, dy), {}))


class RMSNorm:
    """``y = gain x / sqrt(mean(x^2) + eps)``, token by token.

    Parameters
    ----------
    gain : ndarray, shape (d,)
    eps : float
        Above 0.

    Notes
    -----
    Cost: O(n d) time. The gradient is named ``gain``.
    """

    def __init__(self, *, gain: Array, eps: float = 1e-5) -> None:
        self.gain = _check.floats(gain=gain)[0]
        _check.shape("gain", self.gain, ("d",))
        self.eps = _check.positive("eps", eps)

    def vjp(self, x: Array) -> tuple[Array, Pullback]:
        """``y`` of the shape of ``x (..., n, d)``, and its pullback."""
        return _norm_vjp(x, self.gain, None, self.eps)


class LayerNorm:
    """``y = gain (x - mean(x)) / sqrt(var(x) + eps) + bias``, token by token.

    Parameters
    ----------
    gain, bias : ndarray, shape (d,)
    eps : float
        Above 0.

    Notes
    -----
    Cost: O(n d) time. The gradients are named ``gain`` and ``bias``.
    """

    def __init__(self, *, gain: Array, bias: Array, eps: float = 1e-5) -> None:
        self.gain, self.bias = _check.floats(gain=gain, bias=bias)
        _check.shape("gain", self.gain, ("d",))
        _check.shape("bias", self.bias, self.gain.shape, match=f"gain of shape {self.gain.shape}")
        self.eps = _check.positive("eps", eps)

    def vjp(self, x: Array) -> tuple[Array, Pullback]:
        """``y`` of the shape of ``x (..., n, d)``, and its pullback."""
        return _norm_vjp(x, self.gain, self.bias, self.eps)


def _norm_vjp(x: Array, gain: Array, bias: Array | None, eps: float) -> tuple[Array, Pullback]:
    x = _input(x, {"gain": gain}, gain.shape[0])
    backend = select.of(x)
    y = backend.norm_forward(x, gain, bias, eps)
    return _result(x, y, lambda dy: backend.norm_backward(x, gain, bias is not None, eps, dy))


class FeedForward:
    """``y = act(x w_in) w_out``, tile by tile: there is never an ``n x f`` array.

    Parameters
    ----------
    w_in : ndarray, shape (d, f)
    w_out : ndarray, shape (f, e)
    activation : {"relu", "silu", "gelu_tanh"}
        As for `Activation`.

    Notes
    -----
    Cost: O(n f (d + e)) time. The gradients are named ``w_in`` and ``w_out``.
    """

    def __init__(self, *, w_in: Array, w_out: Array, activation: Literal["relu", "silu", "gelu_tanh"]) -> None:
        self.w_in, self.w_out = _check.floats(w_in=w_in, w_out=w_out)
        _check.shape("w_in", self.w_in, ("d", "f"))
        _check.shape("w_out", self.w_out, (self.w_in.shape[1], "e"), match=f"w_in of shape {self.w_in.shape}")
        self.activation = _check.choice("activation", activation, ACTIVATIONS)

    def vjp(self, x: Array) -> tuple[Array, Pullback]:
        """``y (..., n, e)`` for ``x (..., n, d)``, and its pullback."""
        w_in, w_out, activation = self.w_in, self.w_out, self.activation
        x = _input(x, {"w_in": w_in}, w_in.shape[0])
        backend = select.of(x)
        y = backend.feed_forward_forward(x, w_in, w_out, activation)
        return _result(x, y, lambda dy: backend.feed_forward_backward(x, w_in, w_out, activation, dy))


class Embedding:
    """``y = embed[tokens]``.

    Parameters
    ----------
    embed : ndarray, shape (vocab, d)

    Notes
    -----
    Cost: O(n d) time. Its input has no gradient: the pullback's ``dx`` is None. The gradient is named ``embed``.
    """

    def __init__(self, *, embed: Array) -> None:
        self.embed = _check.floats(embed=embed)[0]
        _check.shape("embed", self.embed, ("vocab", "d"))

    def vjp(self, tokens: Array) -> tuple[Array, Pullback]:
        """``y (..., n, d)`` for integers ``tokens (..., n)`` below ``vocab``, and its pullback."""
        ids = _check.token_ids("tokens", tokens, self.embed.shape[0], self.embed)
        backend = select.of(ids)
        y = backend.embedding_forward(ids, self.embed)
        vocab = self.embed.shape[0]
        return _result(ids, y, lambda dy: (None, {"embed": backend.embedding_backward(ids, vocab, dy)}))


class SelfAttention:
    """Self-attention with its projections, in the paper's form or with many heads.

    The paper's form, ``SelfAttention(w=, w_v=)``, is ``y = f (x w_v)``, where row i of ``f`` is the softmax of
    ``scale x_i w x_j^T`` over j and ``w`` stands for ``w_q w_k^T``. With ``P = dS`` of attention and ``h = x w_v``,
    ``dw = scale x^T P x``, ``dw_v = x^T f^T dy``, ``dx = scale (P x w^T + P^T x w) + f^T dy w_v^T``.

    With heads, ``SelfAttention(w_q=, w_k=, w_v=, w_o=, n_heads=)``, the columns of ``q = x w_q`` are cut into
    ``n_heads`` heads and those of ``k = x w_k`` and ``v = x w_v`` into ``n_kv_heads``; the heads' outputs, side by
    side, times ``w_o`` are ``y``.

    Parameters
    ----------
    w : ndarray, shape (d, d)
    w_v : ndarray, shape (d, e) with ``w``; (d, n_kv_heads * value width) with heads
    w_q : ndarray, shape (d, n_heads * width)
    w_k : ndarray, shape (d, n_kv_heads * width)
    w_o : ndarray, shape (n_heads * value width, e)
    n_heads, n_kv_heads : int
        Query heads, and key heads, a divisor of them (as many unless given).
    rope : bool
        Whether queries and keys are turned by their positions, halves of a head as pairs, base 10000. Needs an even
        width.
    score_bound : float, optional
        Queries and keys are normalised to length 1 and the scale is this number, so that no score exceeds it. A row of
        zeros stays zero, and so does its gradient.
    engine : Exact, Polynomial, Landmark or Auto
        As for `lingrad_rs.attention`.
    causal : bool
        Whether a token sees only itself and those before it.
    scale : float, optional
        The factor of the scores; ``1/sqrt(d)``, with heads ``1/sqrt(width)``, unless given. Not with ``score_bound``.

    Raises
    ------
    ArgumentError
        Options that do not fit: neither or both of the forms, heads that do not divide, an odd width with ``rope``.

    Notes
    -----
    Cost: the projections, and attention as its engine costs. The gradients are named as the weights are.
    Source: arXiv 2408.13233, with its printed gradients corrected.
    """

    def __init__(
        self,
        *,
        w: Array | None = None,
        w_v: Array | None = None,
        w_q: Array | None = None,
        w_k: Array | None = None,
        w_o: Array | None = None,
        n_heads: int | None = None,
        n_kv_heads: int | None = None,
        rope: bool = False,
        score_bound: float | None = None,
        engine: Engine = Polynomial(degree=2),
        causal: bool = False,
        scale: float | None = None,
    ) -> None:
        given = {"w": w, "w_q": w_q, "w_k": w_k, "w_v": w_v, "w_o": w_o}
        self.weights: dict[str, Array]
        names = {name for name, value in given.items() if value is not None}
        self.engine = check_engine(engine)
        self.causal = _check.flag("causal", causal)
        self.scale = None if scale is None else _check.number("scale", scale)
        self.rope = _check.flag("rope", rope)
        self.score_bound = None if score_bound is None else _check.positive("score_bound", score_bound)
        if names == {"w", "w_v"}:
            self.weights = _named(w=w, w_v=w_v)
            if n_heads is not None or n_kv_heads is not None or self.rope or self.score_bound is not None:
                raise ArgumentError("n_heads, n_kv_heads, rope and score_bound need w_q, w_k, w_v, w_o; got w and w_v")
            self.n_heads = self.n_kv_heads = 1
            self._check_combined()
        elif names == {"w_q", "w_k", "w_v", "w_o"}:
            self.weights = _named(w_q=w_q, w_k=w_k, w_v=w_v, w_o=w_o)
            if n_heads is None:
                raise ArgumentError("n_heads is missing; expected an integer >= 1 beside w_q, w_k, w_v, w_o")
            if self.score_bound is not None and self.scale is not None:
                raise ArgumentError("scale and score_bound are both given; score_bound is the scale, so give one")
            self.n_heads = _check.integer("n_heads", n_heads, 1)
            self.n_kv_heads = self.n_heads if n_kv_heads is None else _check.integer("n_kv_heads", n_kv_heads, 1)
            self._check_heads()
        else:
            raise ArgumentError(
                f"got the weights {', '.join(sorted(names)) or 'none'}; expected w and w_v, or w_q, w_k, w_v and w_o"
            )

    def _check_combined(self) -> None:
        w, w_v = self.weights.values()
        _check.shape("w", w, ("d", "d"))
        _check.shape("w", w, (w.shape[0], w.shape[0]))
        _check.shape("w_v", w_v, (w.shape[0], "e"), match=f"w of shape {w.shape}")
        for name, weight in (("w", w), ("w_v", w_v)):
            if weight.shape[1] == 0:
                raise ShapeError(f"{name} has shape {weight.shape}; expected at least one column")

    def _check_heads(self) -> None:
        w_q, w_k, w_v, w_o = self.weights.values()
        h, h_kv = self.n_heads, self.n_kv_heads
        if h % h_kv:
            raise ArgumentError(f"n_kv_heads is {h_kv}; expected a divisor of n_heads = {h}")
        _check.shape("w_q", w_q, ("d", "n_heads * width"))
        d, total = w_q.shape
        if total == 0 or total % h:
            raise ShapeError(f"w_q has shape {w_q.shape}; expected ({d}, a multiple of n_heads = {h})")
        width = total // h
        if self.rope and width % 2:
            raise ArgumentError(f"rope=True with heads of width {width}; expected an even width")
        _check.shape("w_k", w_k, (d, h_kv * width), match=f"w_q of shape {w_q.shape} with n_kv_heads = {h_kv}")
        _check.shape("w_v", w_v, (d, "n_kv_heads * value width"), match=f"w_q of shape {w_q.shape}")
        if w_v.shape[1] == 0 or w_v.shape[1] % h_kv:
            raise ShapeError(f"w_v has shape {w_v.shape}; expected ({d}, a multiple of n_kv_heads = {h_kv})")
        value_width = w_v.shape[1] // h_kv
        _check.shape("w_o", w_o, (h * value_width, "e"), match=f"w_v of shape {w_v.shape} with n_heads = {h}")

    def vjp(self, x: Array) -> tuple[Array, Pullback]:
        """``y (..., n, e)`` for ``x (..., n, d)``, and its pullback."""
        x = _input(x, self.weights, next(iter(self.weights.values())).shape[0])
        backend = select.of(x)
        weights, options = list(self.weights.values()), copy.copy(self)  # as they are now
        y = backend.self_attention_forward(x, weights, options)
        return _result(x, y, lambda dy: backend.self_attention_backward(x, weights, options, dy))


class Residual:
    """``y = x + module(x)``; ``dx = dy + (d module)^T dy``.

    Parameters
    ----------
    module : Module
        Whose output has the shape and dtype of its input.

    Notes
    -----
    The gradients are the inner module's.
    """

    def __init__(self, module: Module) -> None:
        self.module = _module("module", module)

    def vjp(self, x: Array) -> tuple[Array, Pullback]:
        """``y`` of the shape of ``x (..., n, d)``, and its pullback."""
        x = _input(x, {}, None)
        backend = select.of(x)
        inner, pull = _call("module", self.module, x)
        _check.shape(_owner("module", self.module, "y"), inner, x.shape, match=f"x of shape {x.shape}")

        def backward(dy: Array) -> tuple[Array, Any]:
            dx, grads = pull(dy)
            if dx is None:
                raise ArgumentError(f"{_owner('module', self.module, 'dx')} is None; expected an array like x")
            return backend.add("dx", dy, dx), grads

        return _result(x, backend.add("y", x, inner), backward)


class Chain:
    """Modules one after the other: the paper's ``F = g_m o Attn_m o ... o Attn_1 o g_0``.

    The gradient is walked back from the last module to the first.

    Parameters
    ----------
    modules : sequence of Module
        Of this library or the user's own.

    Notes
    -----
    The gradients are a list, one entry a module. Only the modules' inputs are kept.
    """

    def __init__(self, modules: Sequence[Module]) -> None:
        if not isinstance(modules, Sequence):
            raise ArgumentError(f"modules is {_check.shown(modules)}; expected a sequence of modules")
        self.modules = [_module(f"modules[{i}]", module) for i, module in enumerate(modules)]

    def vjp(self, x: Array) -> tuple[Array, Pullback]:
        """The last module's output for ``x``, the first one's input, and its pullback."""
        x = y = _check.array("x", x)
        pulls: list[Pullback] = []
        for i, module in enumerate(self.modules):
            y, pull = _call(f"modules[{i}]", module, y)
            pulls.append(pull)
        if not pulls:
            y = select.of(y).copy(y)

        def backward(dy: Array) -> tuple[Array | None, list[Any]]:
            dx: Array | None = dy if pulls else select.of(dy).copy(dy)
            grads: list[Any] = []
            for i, pull in reversed(list(enumerate(pulls))):
                if dx is None:
                    owner = _owner(f"modules[{i + 1}]", self.modules[i + 1], "dx")
                    raise ArgumentError(f"{owner} is None; expected an array like its x, for modules[{i}]")
                dx, grad = pull(dx)
                grads.append(grad)
            return dx, grads[::-1]

        return _result(x, y, backward)


def _module(name: str, module: object) -> Module:
    if isinstance(module, type) or not _check.has(module, "vjp") or not isinstance(module, Module):
        raise ArgumentError(
            f"{name} is {_check.shown(module)}; expected a module: an object with vjp(x) -> (y, pullback)"
        )
    return module


def _owner(name: str, module: object, what: str) -> str:
    return f"{what} of {name} ({type(module).__name__})"


def _call(name: str, module: Module, x: Array) -> tuple[Array, Pullback]:
    """``module.vjp(x)``, held to what a module promises: it may be anyone's."""
    result = module.vjp(x)
    if not isinstance(result, tuple) or len(result) != 2 or not callable(result[1]):
        raise ArgumentError(
            f"{name} ({type(module).__name__}): vjp returned {type(result).__name__}; expected (y, pullback)"
        )
    pull = result[1]
    owner_of_y = _owner(name, module, "y")
    y = _check.floats(**{owner_of_y: result[0]})[0]
    _check.same_device(owner_of_y, y, x, match="x")
    differentiable = _check.is_float(x)
    if differentiable:
        _check.same_dtype(owner_of_y, y, x.dtype, match="x")
    shape, dtype = x.shape, x.dtype

    def pullback(dy: Array) -> tuple[Array | None, Any]:
        result = pull(dy)
        if not isinstance(result, tuple) or len(result) != 2:
            raise ArgumentError(
                f"{name} ({type(module).__name__}): pullback returned {type(result).__name__}; expected (dx, grads)"
            )
        dx, grads = result
        if not isinstance(grads, Mapping | list):
            raise ArgumentError(f"{_owner(name, module, 'grads')} is {_check.shown(grads)}; expected a dict")
        if dx is None or not differentiable:
            return None, grads
        owner = _owner(name, module, "dx")
        dx = _check.floats(**{owner: dx})[0]
        _check.same_device(owner, dx, dy, match="dy")
        _check.same_dtype(owner, dx, dtype, match="x")
        _check.shape(owner, dx, shape, match=f"x of shape {shape}")
        return dx, grads

    return y, pullback
