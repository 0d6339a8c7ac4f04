"""The engines, each forward and backward, on heads that share no keys.

Heads run together where their engines are the same but for numbers: coefficients, constant shifts, landmarks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np

from ..engines import Exact, Landmark, Polynomial
from ..errors import DenominatorError
from . import exact, landmark, polynomial
from .device import Space
from .heads import Grads, Heads, Saved, dots, part_of
from .texts import scientific

__all__ = ["AnyEngine", "add_groups", "backward", "forward", "log_sums", "without_numbers"]

Array = Any
AnyEngine = Exact | Polynomial | Landmark

_NO_KEY_REMEDY = (
    "leave such rows out, pad on the right where causal, or give removed keys a large negative bias (-1e4, say) in "
    "place of -inf"
)
_LANDMARK_REMEDY = (
    "its weights are not resolved by these landmarks; use a higher rank, tol= in place of an engine, or Exact()"
)


def without_numbers(engine: AnyEngine) -> tuple[AnyEngine, bool]:
    """What engines of heads that run together have in common; the second says whether landmarks are given."""
    if isinstance(engine, Polynomial):
        coefficients = "fitted" if engine.coefficients == "fitted" else "taylor"
        return replace(engine, coefficients=coefficients, shift="mean" if engine.shift == "mean" else "none"), False
    if isinstance(engine, Landmark):
        given = engine.constants is not None
        return replace(engine, constants=None, seed=0 if given else engine.seed), given
    return engine, False


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


def forward(sp: Space, own: Sequence[AnyEngine], heads: Heads) -> tuple[Array, Saved]:
    """``out (heads, n, dv)``, and what the backward pass needs.

    Waits for the device to check the rows, and before that where samples are copied to the host.

    Parameters
    ----------
    own : sequence of Exact, Polynomial or Landmark
        One a head, the same `without_numbers`.
    heads : Heads
        At least one.

    Raises
    ------
    DenominatorError
        A row sums to a number that is not positive, or not finite, or has no key to attend to.
    """
    engine, constants, parts = own[0], None, []
    ranges = list(_ranges(sp, engine, heads))
    if isinstance(engine, Polynomial):
        constants = polynomial.constants(sp, cast(Sequence[Polynomial], own), heads)
    elif isinstance(engine, Landmark):
        constants = landmark.constants(sp, cast(Sequence[Landmark], own), heads)
    for start, end in ranges:
        some, numbers = heads.part(start, end), part_of(constants, start, end)
        if isinstance(engine, Exact):
            parts.append((*exact.forward(sp, some), None))
        elif isinstance(engine, Polynomial):
            parts.append(polynomial.forward(sp, engine, some, numbers))
        else:
            parts.append(landmark.forward(sp, engine, some, numbers))
    out, row_max, row_scale, good = (_joined(sp, [part[i] for part in parts]) for i in range(4))
    _check_rows(sp, engine, heads, row_scale, good)
    return out, Saved(engine, row_max, row_scale, constants)


def _joined(sp: Space, parts: list[Any]) -> Any:
    return parts[0] if len(parts) == 1 or parts[0] is None else sp.xp.concat(parts)


def _delta_of(sp: Space, out: Array, dout: Array) -> Array:
    """``delta_i = dout_i.out_i``, summed in float64."""
    return sp.astype(dots(sp, out, dout), out.dtype)


def backward(sp: Space, heads: Heads, saved: Saved, out: Array, dout: Array) -> Grads:
    """The gradients for ``dout (heads, n, dv)``, from the output and what the forward pass has left."""
    engine, grads = saved.engine, []
    for start, end in _ranges(sp, engine, heads):
        own, some, up = saved.part(start, end), heads.part(start, end), dout[start:end, ...]
        rows = (own.row_max, own.row_scale, up, _delta_of(sp, out[start:end, ...], up))
        if isinstance(engine, Exact):
            grads.append(exact.backward(sp, some, *rows))
        elif isinstance(engine, Polynomial):
            grads.append(polynomial.backward(sp, engine, some, own.constants, *rows))
        else:
            grads.append(landmark.backward(sp, engine, some, own.constants, *rows))
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
    for start, end in _ranges(sp, saved.engine, heads):
        own, some = saved.part(start, end), heads.part(start, end)
        logs = sp.wide(own.row_max) - sp.xp.log(sp.wide(own.row_scale))
        if isinstance(saved.engine, Polynomial):
            logs = logs + polynomial.left_out(sp, saved.engine, some, own.constants)
        elif isinstance(saved.engine, Landmark):
            logs = logs + landmark.left_out(sp, some, own.constants)
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
    if isinstance(engine, Exact):
        if np.isposinf(scale):
            raise DenominatorError(
                f"{name} has no key to attend to: key_bias is -inf (or its scores overflow) for every key that it may "
                f"see; {_NO_KEY_REMEDY}"
            )
        raise DenominatorError(f"{name} has scores that overflow; make q, k, scale or key_bias smaller")
    if np.isposinf(scale) and heads.key_bias is not None:
        raise DenominatorError(
            f"{name} has no key to attend to: key_bias is -inf, or far below its maximum, for every key that it may "
            f"see; {_NO_KEY_REMEDY}"
        )
    remedy = _LANDMARK_REMEDY
    if isinstance(engine, Polynomial):
        remedy = (
            f"its scores lie outside the region where this polynomial of degree {engine.degree} resembles exp; use an "
            'even degree with coefficients="taylor", a smaller scale, or Exact()'
        )
    if np.isposinf(scale) or scale < 0:
        denominator = scientific(1 / scale, 3)
        raise DenominatorError(f"{name} has the denominator {denominator}, which is not positive: {remedy}")
    raise DenominatorError(f"{name} has a denominator that overflows or underflows: {remedy}")
