"""The engines, each forward and backward, on heads that share no keys.

Heads run together where their engines are the same but for numbers: coefficients, constant shifts, landmarks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from .... import _lingrad_rs as core
from ....errors import DenominatorError
from ....spec.engines import Exact, HeadEngine, Landmark, Polynomial
from ..device import Space
from ..problem.heads import Grads, Heads, Saved, dots, part_of
from . import exact, landmark, polynomial

__all__ = ["add_groups", "backward", "forward", "log_sums", "name", "without_numbers"]

Array = Any


class _Engine(Protocol):
    """What the module of an engine gives; ``engine`` is its spec, ``constants`` what its own function has made."""

    @staticmethod
    def name(engine: Any) -> str:
        """What it is called in reports."""
        ...

    @staticmethod
    def without_numbers(engine: Any) -> tuple[Any, bool]:
        """What engines of heads that run together have in common; the second says whether landmarks are given."""
        ...

    @staticmethod
    def numbers(engine: Any, d: int, d_v: int) -> int:
        """Numbers of temporary arrays for a block of one head."""
        ...

    @staticmethod
    def constants(sp: Space, own: Sequence[Any], heads: Heads) -> Any:
        """What heads' data, and the numbers of each one's engine, decide before their pass."""
        ...

    @staticmethod
    def forward(sp: Space, engine: Any, heads: Heads, constants: Any) -> tuple[Array, Array, Array, Array | None]:
        """``out``, ``row_max`` and ``row_scale`` of `Saved`, and which rows are good, None for all."""
        ...

    @staticmethod
    def backward(
        sp: Space,
        engine: Any,
        heads: Heads,
        constants: Any,
        row_max: Array,
        row_scale: Array,
        dout: Array,
        delta: Array,
    ) -> Grads:
        """The gradients, from what the forward pass has left and ``delta_i = dout_i.out_i``."""
        ...

    @staticmethod
    def left_out(sp: Space, engine: Any, heads: Heads, constants: Any) -> Array | float:
        """What the logarithms of row sums in the original scores are more than those of the pass, ``(heads, n)``."""
        ...

    @staticmethod
    def why_not(engine: Any, scale: float, biased: bool) -> str:
        """Why a row whose ``row_scale`` is no use has no answer, and what to do."""
        ...


# The one registry.
_ENGINES: dict[type, _Engine] = {Exact: exact, Polynomial: polynomial, Landmark: landmark}


def name(engine: HeadEngine) -> str:
    """What an engine is called in reports."""
    return _ENGINES[type(engine)].name(engine)


def without_numbers(engine: HeadEngine) -> tuple[HeadEngine, bool]:
    """What engines of heads that run together have in common; the second says whether landmarks are given."""
    return _ENGINES[type(engine)].without_numbers(engine)


def _ranges(sp: Space, engine: HeadEngine, heads: Heads) -> Iterator[tuple[int, int]]:
    """Ranges of heads that are computed together: as many as have room for blocks of a fair size."""
    _, _, d, d_v = heads.sizes
    numbers = _ENGINES[type(engine)].numbers(engine, d, d_v)
    step = max(1, min(heads.count, sp.numbers // numbers))
    return ((start, min(start + step, heads.count)) for start in range(0, heads.count, step))


def forward(sp: Space, own: Sequence[HeadEngine], heads: Heads) -> tuple[Array, Saved]:
    """``out (heads, n, d_v)``, and what the backward pass needs.

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
    engine, ranges = own[0], list(_ranges(sp, own[0], heads))
    module = _ENGINES[type(engine)]
    constants = module.constants(sp, own, heads)
    parts = [module.forward(sp, engine, heads.part(a, b), part_of(constants, a, b)) for a, b in ranges]
    out, row_max, row_scale, good = (_joined(sp, [part[i] for part in parts]) for i in range(4))
    _check_rows(sp, engine, heads, row_scale, good)
    return out, Saved(engine, row_max, row_scale, constants)


def _joined(sp: Space, parts: list[Any]) -> Any:
    return parts[0] if len(parts) == 1 or parts[0] is None else sp.xp.concat(parts)


def _delta_of(sp: Space, out: Array, dout: Array) -> Array:
    """``delta_i = dout_i.out_i``, summed in float64."""
    return sp.astype(dots(sp, out, dout), out.dtype)


def backward(sp: Space, heads: Heads, saved: Saved, out: Array, dout: Array) -> Grads:
    """The gradients for ``dout (heads, n, d_v)``, from the output and what the forward pass has left."""
    engine, grads = saved.engine, []
    module = _ENGINES[type(engine)]
    for start, end in _ranges(sp, engine, heads):
        left, some, up = saved.part(start, end), heads.part(start, end), dout[start:end, ...]
        delta = _delta_of(sp, out[start:end, ...], up)
        grads.append(module.backward(sp, engine, some, left.constants, left.row_max, left.row_scale, up, delta))
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
        left, some = saved.part(start, end), heads.part(start, end)
        logs = sp.wide(left.row_max) - sp.xp.log(sp.wide(left.row_scale))
        parts.append(logs + _ENGINES[type(saved.engine)].left_out(sp, saved.engine, some, left.constants))
    return _joined(sp, parts)


def _check_rows(sp: Space, engine: HeadEngine, heads: Heads, row_scale: Array, good: Array | None) -> None:
    """Raise for the first row whose denominator is no use."""
    xp = sp.xp
    usable = xp.isfinite(row_scale) & (row_scale > 0)
    if bool(xp.all(usable if good is None else usable & good)):
        return
    n = row_scale.shape[1]
    bad = np.flatnonzero(~sp.host(usable).reshape(-1))
    if not len(bad):
        at = int(np.flatnonzero(~sp.host(good).reshape(-1))[0])
        why = f"has a denominator below Jensen's lower bound: {core.LANDMARK_REMEDY}"
    else:
        at = int(bad[0])
        why = _ENGINES[type(engine)].why_not(
            engine, float(sp.host(row_scale).reshape(-1)[at]), heads.key_bias is not None
        )
    raise DenominatorError(f"row {at % n} of head {heads.first + at // n} {why}")
