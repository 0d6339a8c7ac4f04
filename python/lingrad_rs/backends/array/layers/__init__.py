"""The modules of a transformer that see one token at a time, forward beside backward, and the loss.

``x_backward`` takes the gradient ``dy`` of any loss with respect to what ``x_forward`` computed. Arrays are
``(..., n, d)``, known to be finite and to fit each other; results are new and C-contiguous. What is summed over tokens
is summed in float64, so that in float32 the error of a weight's gradient does not grow with their number.
"""

from __future__ import annotations

import math
from typing import Any

from ....errors import NonFiniteError, ShapeError
from ..device import Space

__all__ = [
    "activation_backward",
    "activation_forward",
    "embedding_backward",
    "embedding_forward",
    "feed_forward_backward",
    "feed_forward_forward",
    "linear_backward",
    "linear_cross_entropy",
    "linear_forward",
    "norm_backward",
    "norm_forward",
    "rows_of",
    "sum_of_products",
]

Array = Any

# Tokens of one product in the arrays' dtype; products of more are added up.
_TOKENS = 512
# Beyond it sigmoids are 0 or 1 to the last bit; the powers of a larger number could overflow.
_SATURATED = 64.0


def rows_of(sp: Space, x: Array) -> Array:
    """``x (..., n, d)`` as ``(tokens, d)``."""
    return sp.xp.reshape(x, (math.prod(x.shape[:-1]), x.shape[-1]))


def sum_of_products(sp: Space, x: Array, dy: Array) -> Array:
    """``x^T dy`` in float64, ``(d, e)`` for ``(tokens, d)`` and ``(tokens, e)``.

    Products of a few hundred tokens are in the arrays' dtype, their sum in float64. Time O(tokens d e); memory beyond
    the result: tiles.
    """
    total = sp.zeros((x.shape[1], dy.shape[1]), sp.xp.float64)
    add_products(sp, total, x, dy)
    return total


def add_products(sp: Space, total: Array, x: Array, dy: Array) -> None:
    """Adds `sum_of_products` to ``total``."""
    xp = sp.xp
    tokens, d = x.shape
    blocks = tokens // _TOKENS
    for a, b in sp.tiles(dy.shape[1], d):
        for start, stop in sp.tiles(blocks, d * (b - a) + _TOKENS * (d + b - a)):
            rows = slice(start * _TOKENS, stop * _TOKENS)
            x_blocks, dy_blocks = (
                xp.reshape(z, (stop - start, _TOKENS, z.shape[1])) for z in (x[rows, :], dy[rows, a:b])
            )
            total[:, a:b] += xp.sum(xp.matrix_transpose(x_blocks) @ dy_blocks, axis=0, dtype=xp.float64)
        if tokens > blocks * _TOKENS:
            rest = blocks * _TOKENS
            total[:, a:b] += sp.wide(xp.matrix_transpose(x[rest:, :]) @ dy[rest:, a:b])


def linear_forward(sp: Space, x: Array, w: Array, b: Array | None) -> Array:
    """``y = x w + b``. Time O(n d e)."""
    y = rows_of(sp, x) @ w
    if b is not None:
        y += b
    return sp.contiguous(sp.xp.reshape(y, (*x.shape[:-1], w.shape[1])))


def linear_backward(sp: Space, x: Array, w: Array, has_bias: bool, dy: Array) -> tuple[Array, dict[str, Array]]:
    """``dx = dy w^T``, ``dw = x^T dy``, ``db = 1^T dy``. Time O(n d e)."""
    xp = sp.xp
    x_rows, dy_rows = rows_of(sp, x), rows_of(sp, dy)
    dx = xp.reshape(dy_rows @ xp.matrix_transpose(w), x.shape)
    sums = {"w": sum_of_products(sp, x_rows, dy_rows)}
    if has_bias:
        sums["b"] = xp.sum(dy_rows, axis=0, dtype=xp.float64)
    return sp.contiguous(dx), _rounded(sp, sums, x.dtype)


def _rounded(sp: Space, sums: dict[str, Array], dtype: Any) -> dict[str, Array]:
    return {name: sp.contiguous(sp.astype(total, dtype)) for name, total in sums.items()}


def _sigmoid(sp: Space, x: Array) -> tuple[Array, Array]:
    """``1 / (1 + exp(-x))`` and one minus that, both to full relative accuracy."""
    xp = sp.xp
    e = xp.exp(-xp.abs(x))
    large = 1 / (1 + e)
    small = e * large
    return xp.where(x > 0, large, small), xp.where(x > 0, small, large)


def _exponent(sp: Space, kind: str, x: Array) -> tuple[Array, Array]:
    """``u`` of ``act(x) = x sigmoid(u)``, and ``x du/dx``.

    ``silu``: ``u = x``. ``gelu_tanh``: ``u = 2 sqrt(2/pi) (x + 0.044715 x^3)``, as ``1 + tanh(u/2) = 2 sigmoid(u)``.
    """
    if kind == "silu":
        return x, x
    limit = sp.full((), _SATURATED, x.dtype)
    z = sp.xp.minimum(sp.xp.maximum(x, -limit), limit)
    a, b = 2 * math.sqrt(2 / math.pi), 2 * math.sqrt(2 / math.pi) * 0.044715
    square = z * z
    return z * (a + b * square), z * (a + 3 * b * square)


def _activation(sp: Space, kind: str, x: Array) -> Array:
    """``act(x)``; a NaN stays NaN."""
    if kind == "relu":
        return sp.xp.where(x < 0, sp.zeros((), x.dtype), x)
    return x * _sigmoid(sp, _exponent(sp, kind, x)[0])[0]


def _activation_and_slope(sp: Space, kind: str, x: Array) -> tuple[Array, Array]:
    """``act(x)`` and ``act'(x) = s + s (1 - s) x du/dx``, ``s = sigmoid(u)``; for relu, 0 at 0."""
    if kind == "relu":
        return _activation(sp, kind, x), sp.astype(x > 0, x.dtype)
    u, x_du = _exponent(sp, kind, x)
    s, t = _sigmoid(sp, u)
    return x * s, s * (1 + t * x_du)


def activation_forward(sp: Space, x: Array, kind: str) -> Array:
    """``y = act(x)``. Time O(n d)."""
    rows = rows_of(sp, x)
    y = sp.empty(rows.shape, x.dtype)
    for start, stop in sp.tiles(*rows.shape):
        y[start:stop, :] = _activation(sp, kind, rows[start:stop, :])
    return sp.xp.reshape(y, x.shape)


def activation_backward(sp: Space, x: Array, kind: str, dy: Array) -> Array:
    """``dx = dy act'(x)``. Time O(n d)."""
    rows, dy_rows = rows_of(sp, x), rows_of(sp, dy)
    dx = sp.empty(rows.shape, x.dtype)
    for start, stop in sp.tiles(*rows.shape):
        dx[start:stop, :] = dy_rows[start:stop, :] * _activation_and_slope(sp, kind, rows[start:stop, :])[1]
    return sp.xp.reshape(dx, x.shape)


def _normed(sp: Space, x: Array, centred: bool, eps: float) -> tuple[Array, Array, Array]:
    """``r (x - mean)``, ``r`` and ``1/r^2``, in float64; the mean is 0 unless centred."""
    xp = sp.xp
    x = sp.wide(x)
    if centred:
        x = x - xp.mean(x, axis=-1, keepdims=True)
    square = xp.mean(x * x, axis=-1, keepdims=True) + eps
    r = 1 / xp.sqrt(square)
    return x * r, r, square


def _check_squares(sp: Space, squares: list[Array]) -> None:
    """Raise where the mean square of a row is unusable; waits for the device, once."""
    if squares and not bool(sp.xp.all(sp.xp.isfinite(sp.xp.concat(squares)))):
        raise NonFiniteError(
            "the mean square of a row of x, plus eps, is not finite; expected a finite number > 0 (x holds NaN or "
            "infinity, or its square overflows)"
        )


def norm_forward(sp: Space, x: Array, gain: Array, bias: Array | None, eps: float) -> Array:
    """``y = x̂ gain + bias``, ``x̂ = r (x - mean(x))``, ``r = (var(x) + eps)^(-1/2)``; without a bias, mean 0.

    RMSNorm without a bias, LayerNorm with one. Time O(n d).
    """
    rows = rows_of(sp, x)
    _check_width(rows)
    y = sp.empty(rows.shape, x.dtype)
    squares = []
    for start, stop in sp.tiles(*rows.shape):
        normed, _, square = _normed(sp, rows[start:stop, :], bias is not None, eps)
        tile = normed * sp.wide(gain)
        if bias is not None:
            tile += sp.wide(bias)
        y[start:stop, :] = sp.astype(tile, x.dtype)
        squares.append(square)
    _check_squares(sp, squares)
    return sp.xp.reshape(y, x.shape)


def norm_backward(
    sp: Space, x: Array, gain: Array, has_bias: bool, eps: float, dy: Array
) -> tuple[Array, dict[str, Array]]:
    """The gradients of `norm_forward`: with ``t = gain dy``, ``dx = r (t - mean(t) - x̂ mean(t x̂))``.

    The mean of t is 0 where that of x is. ``dgain`` is the sum of ``dy x̂`` over the tokens, ``dbias`` that of dy.
    Time O(n d).
    """
    xp = sp.xp
    rows, dy_rows = rows_of(sp, x), rows_of(sp, dy)
    _check_width(rows)
    dx = sp.empty(rows.shape, x.dtype)
    sums = {name: sp.zeros(gain.shape, xp.float64) for name in (("gain", "bias") if has_bias else ("gain",))}
    squares = []
    for start, stop in sp.tiles(*rows.shape):
        normed, r, square = _normed(sp, rows[start:stop, :], has_bias, eps)
        dy_tile = sp.wide(dy_rows[start:stop, :])
        sums["gain"] += xp.sum(dy_tile * normed, axis=0)
        t = dy_tile * sp.wide(gain)
        inner = t - normed * xp.mean(t * normed, axis=-1, keepdims=True)
        if has_bias:
            sums["bias"] += xp.sum(dy_tile, axis=0)
            inner -= xp.mean(t, axis=-1, keepdims=True)
        dx[start:stop, :] = sp.astype(r * inner, x.dtype)
        squares.append(square)
    _check_squares(sp, squares)
    return xp.reshape(dx, x.shape), _rounded(sp, sums, x.dtype)


def _check_width(rows: Array) -> None:
    if rows.shape[1] == 0:
        raise ShapeError("x has width 0; expected at least 1")


def feed_forward_forward(sp: Space, x: Array, w_in: Array, w_out: Array, kind: str) -> Array:
    """``y = act(x w_in) w_out``, by chunks of tokens: their hidden units never exist at once. Time O(n f (d + e))."""
    _check_hidden(w_in)
    rows = rows_of(sp, x)
    y = sp.empty((rows.shape[0], w_out.shape[1]), x.dtype)
    for start, stop in sp.tiles(rows.shape[0], w_in.shape[1]):
        y[start:stop, :] = _activation(sp, kind, rows[start:stop, :] @ w_in) @ w_out
    return sp.xp.reshape(y, (*x.shape[:-1], w_out.shape[1]))


def feed_forward_backward(
    sp: Space, x: Array, w_in: Array, w_out: Array, kind: str, dy: Array
) -> tuple[Array, dict[str, Array]]:
    """The gradients of `feed_forward_forward`, which computes ``h = x w_in`` again. Time O(n f (d + e)).

    With ``a = act(h)``: ``dw_out = a^T dy``, ``dh = (dy w_out^T) act'(h)``, ``dw_in = x^T dh``, ``dx = dh w_in^T``.
    """
    _check_hidden(w_in)
    xp = sp.xp
    rows, dy_rows = rows_of(sp, x), rows_of(sp, dy)
    dx = sp.empty(rows.shape, x.dtype)
    sums = {name: sp.zeros(w.shape, xp.float64) for name, w in (("w_in", w_in), ("w_out", w_out))}
    for start, stop in sp.tiles(rows.shape[0], w_in.shape[1]):
        x_tile, dy_tile = rows[start:stop, :], dy_rows[start:stop, :]
        a, slope = _activation_and_slope(sp, kind, x_tile @ w_in)
        sums["w_out"] += sum_of_products(sp, a, dy_tile)
        dh = (dy_tile @ xp.matrix_transpose(w_out)) * slope
        sums["w_in"] += sum_of_products(sp, x_tile, dh)
        dx[start:stop, :] = dh @ xp.matrix_transpose(w_in)
    return xp.reshape(dx, x.shape), _rounded(sp, sums, x.dtype)


def _check_hidden(w_in: Array) -> None:
    if w_in.shape[1] == 0:
        raise ShapeError("w_in has no columns (d_ff = 0); expected at least one")


def embedding_forward(sp: Space, tokens: Array, embed: Array) -> Array:
    """``y = embed[tokens]``, ``(..., n, d)``. Time O(n d)."""
    xp = sp.xp
    y = xp.take(embed, xp.reshape(tokens, (math.prod(tokens.shape),)), axis=0)
    return sp.contiguous(xp.reshape(y, (*tokens.shape, embed.shape[1])))


def embedding_backward(sp: Space, tokens: Array, vocab: int, dy: Array) -> Array:
    """``dembed (vocab, d)``: row t is the sum of ``dy`` over the positions that hold token t.

    The positions are sorted by their tokens, so that those of a token follow each other. After k steps a row holds the
    sum of the 2^k rows from its own on that are of its token; in the end the first one of a token holds them all. The
    order of the sum is fixed, as that of scattered additions is not. Time O((n log n + vocab) d).
    """
    xp = sp.xp
    ids, rows = xp.reshape(tokens, (math.prod(tokens.shape),)), rows_of(sp, dy)
    n, d = rows.shape
    dembed = sp.zeros((vocab, d), dy.dtype)
    if n == 0 or vocab == 0:
        return dembed
    order = xp.argsort(ids)
    ids = xp.astype(xp.take(ids, order), xp.int64)
    every = sp.arange(0, vocab)
    first = xp.clip(xp.astype(xp.searchsorted(ids, every), xp.int64), 0, n - 1)
    is_there = (xp.take(ids, first) == every)[:, None]
    for start, stop in sp.tiles(d, 4 * n + 2 * vocab):
        sums = sp.wide(xp.take(rows[:, start:stop], order, axis=0))  # (n, columns)
        reach = 1
        while reach < n:
            same = (ids[reach:] == ids[:-reach])[:, None]
            sums[:-reach, :] = sums[:-reach, :] + xp.where(same, sums[reach:, :], sp.zeros((), sums.dtype))
            reach *= 2
        total = xp.take(sums, first, axis=0)
        dembed[:, start:stop] = sp.astype(xp.where(is_there, total, xp.zeros_like(total)), dy.dtype)
    return dembed


def _one_hot(sp: Space, ids: Array, low: int, high: int) -> Array:
    """Where token i is ``low + j``: ``(tokens, high - low)``."""
    return ids[:, None] == sp.arange(low, high)[None, :]


def linear_cross_entropy(sp: Space, x: Array, w: Array, targets: Array) -> tuple[float, Array, Array]:
    """The mean of ``-log softmax(x w)[target]`` over tokens, at least one, and its gradients ``(loss, dx, dw)``.

    With ``p = softmax(logits_i)``, ``dlogits_i = (p - e_target) / tokens``. Chunk by chunk: the logits of all tokens
    never exist at once. Time O(n d vocab). Waits for the device, once.
    """
    xp = sp.xp
    rows, ids = rows_of(sp, x), xp.reshape(targets, (math.prod(targets.shape),))
    (tokens, d), vocab = rows.shape, w.shape[1]
    dx = sp.empty((tokens, d), x.dtype)
    loss, dw = sp.zeros((), xp.float64), sp.zeros((d, vocab), xp.float64)
    for start, stop in sp.tiles(tokens, vocab):
        x_tile = rows[start:stop, :]
        logits = x_tile @ w
        largest = xp.max(logits, axis=1, keepdims=True)
        p = xp.exp(logits - largest)
        total = xp.sum(p, axis=1, keepdims=True, dtype=xp.float64)
        is_target = _one_hot(sp, ids[start:stop], 0, vocab)
        of_target = xp.sum(xp.where(is_target, logits - largest, sp.zeros((), x.dtype)), axis=1, dtype=xp.float64)
        loss += xp.sum(xp.log(total[:, 0]) - of_target)
        dlogits = p * sp.astype(1 / (total * tokens), x.dtype)
        dlogits = xp.where(is_target, dlogits - 1 / tokens, dlogits)
        add_products(sp, dw, x_tile, dlogits)
        dx[start:stop, :] = dlogits @ xp.matrix_transpose(w)
    mean = float(loss) / tokens
    if not math.isfinite(mean):
        raise NonFiniteError(f"the mean cross-entropy is {mean}: logits hold NaN or infinity; expected finite logits")
    return mean, xp.reshape(dx, x.shape), sp.contiguous(sp.astype(dw, x.dtype))
