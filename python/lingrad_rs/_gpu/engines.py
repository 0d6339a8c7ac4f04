"""The engines, each forward and backward, on heads that share no keys."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from ..engines import Exact, Landmark, Polynomial
from ..errors import DenominatorError
from . import exact, landmark, polynomial
from .device import Space
from .heads import Grads, Heads, Saved, dots

__all__ = ["AnyEngine", "add_groups", "backward", "delta_of", "forward", "log_sums"]

Array = Any
AnyEngine = Exact | Polynomial | Landmark

_NO_KEY_REMEDY = (
    "leave such rows out, pad on the right where causal, or give removed keys a large negative bias (-1e4, say) in "
    "place of -inf"
)
_LANDMARK_REMEDY = (
    "its weights are not resolved by these landmarks; use a higher rank, tol= in place of an engine, or Exact()"
)


def _ranges(sp: Space, engine: AnyEngine, heads: Heads) -> Iterator[tuple[int, int]]:
    """Ranges of heads that are computed together: as many as have room for blocks of a fair size."""
    _, _, d, dv = heads.sizes
    if isinstance(engine, Exact):
        numbers = 1 << 16
    elif isinstance(engine, Polynomial):
        numbers = polynomial.numbers(engine, d, dv)
    else:
        numbers = landmark.numbers(engine, d, dv)
    step = max(1, min(heads.count, sp.numbers // numbers))
    return ((start, min(start + step, heads.count)) for start in range(0, heads.count, step))


def forward(sp: Space, engine: AnyEngine, heads: Heads) -> tuple[Array, Saved]:
    """``out (heads, n, dv)``, and what the backward pass needs.

    Waits for the device to check the rows, and where samples are copied to the host, once for each range of heads.

    Raises
    ------
    DenominatorError
        A row sums to a number that is not positive, or not finite, or has no key to attend to.
    """
    ranges, parts = list(_ranges(sp, engine, heads)), []
    for start, end in ranges:
        own = heads.part(start, end)
        if isinstance(engine, Exact):
            parts.append((*exact.forward(sp, own), None, None))
        elif isinstance(engine, Polynomial):
            parts.append(polynomial.forward(sp, engine, own))
        else:
            parts.append(landmark.forward(sp, engine, own))
    out, row_max, row_scale, good = (_joined(sp, [part[i] for part in parts]) for i in range(4))
    _check_rows(sp, engine, heads, row_scale, good)
    constants = [(start, end, part[4]) for (start, end), part in zip(ranges, parts, strict=True)]
    return out, Saved(engine, row_max, row_scale, constants)


def _joined(sp: Space, parts: list[Any]) -> Any:
    return parts[0] if len(parts) == 1 or parts[0] is None else sp.xp.concat(parts)


def delta_of(sp: Space, out: Array, dout: Array) -> Array:
    """``delta_i = dout_i.out_i``, summed in float64."""
    return sp.astype(dots(sp, out, dout), out.dtype)


def backward(sp: Space, heads: Heads, saved: Saved, out: Array, dout: Array) -> Grads:
    """The gradients for ``dout (heads, n, dv)``, from the output and what the forward pass has left."""
    engine, grads = saved.engine, []
    for start, end, constants in saved.constants:
        own, o, up = heads.part(start, end), out[start:end, ...], dout[start:end, ...]
        rows = (saved.row_max[start:end, :], saved.row_scale[start:end, :], up, delta_of(sp, o, up))
        if isinstance(engine, Exact):
            grads.append(exact.backward(sp, own, *rows))
        elif isinstance(engine, Polynomial):
            grads.append(polynomial.backward(sp, engine, own, constants, *rows))
        else:
            grads.append(landmark.backward(sp, engine, own, constants, *rows))
    names = ("dq", "dk", "dv", "dkey_bias")
    return Grads(*(_joined(sp, [getattr(part, name) for part in grads]) for name in names))


def add_groups(sp: Space, grads: Grads, group: int) -> Grads:
    """The gradients of key heads that so many query heads, one after the other, share."""
    if group == 1:
        return grads

    def added(x: Array | None) -> Array | None:
        return None if x is None else sp.xp.sum(sp.xp.reshape(x, (-1, group, *x.shape[1:])), axis=1)

    return Grads(grads.dq, added(grads.dk), added(grads.dv), added(grads.dkey_bias))


def log_sums(sp: Space, heads: Heads, saved: Saved) -> Array:
    """``ln sum_j A_ij`` of every query in the original scores, ``(heads, n)``, float64."""
    parts = []
    for start, end, constants in saved.constants:
        own = heads.part(start, end)
        logs = sp.wide(saved.row_max[start:end, :]) - sp.xp.log(sp.wide(saved.row_scale[start:end, :]))
        if isinstance(saved.engine, Polynomial):
            logs = logs + polynomial.left_out(sp, saved.engine, own, constants)
        elif isinstance(saved.engine, Landmark):
            logs = logs + landmark.left_out(sp, own, constants)
        parts.append(logs)
    return _joined(sp, parts)


def _check_rows(sp: Space, engine: AnyEngine, heads: Heads, row_scale: Array, good: Array | None) -> None:
    """Raise for the first row whose denominator is no use."""
    xp = sp.xp
    usable = xp.isfinite(row_scale) & (row_scale > 0)
    if bool(xp.all(usable if good is None else usable & good)):
        return
    bad = np.flatnonzero(~sp.host(usable).reshape(-1))
    n = row_scale.shape[1]
    if not len(bad):
        at = int(np.flatnonzero(~sp.host(good).reshape(-1))[0])
        raise DenominatorError(
            f"row {at % n} of head {heads.first + at // n} has a denominator below Jensen's lower bound: "
            f"{_LANDMARK_REMEDY}"
        )
    at = int(bad[0])
    scale, name = float(sp.host(row_scale).reshape(-1)[at]), f"row {at % n} of head {heads.first + at // n}"
    if np.isposinf(scale) and heads.key_bias is not None:
        raise DenominatorError(
            f"{name} has no key to attend to: key_bias is -inf, or far below its maximum, for every key that it may "
            f"see; {_NO_KEY_REMEDY}"
        )
    remedy = "use smaller scores, or float64"
    if isinstance(engine, Polynomial):
        remedy = (
            f"its scores lie outside the region where this polynomial of degree {engine.degree} resembles exp; use an "
            'even degree with coefficients="taylor", a smaller scale, or Exact()'
        )
    elif isinstance(engine, Landmark):
        remedy = _LANDMARK_REMEDY
    if np.isfinite(scale):
        raise DenominatorError(f"{name} has the denominator {1 / scale:.3e}, which is not positive: {remedy}")
    raise DenominatorError(f"{name} has a denominator that overflows or underflows: {remedy}")
