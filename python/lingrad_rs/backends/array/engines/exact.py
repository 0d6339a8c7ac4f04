"""The exact engine: softmax attention in tiles; nothing is taken from the data beforehand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .... import _lingrad_rs as core
from ....spec.engines import Exact
from .. import softmax
from ..device import Space
from ..problem.heads import Grads, Heads

__all__ = ["backward", "constants", "forward", "left_out", "name", "numbers", "why_not", "without_numbers"]

Array = Any


def name(engine: Exact) -> str:
    """What it is called in reports."""
    return "exact"


def without_numbers(engine: Exact) -> tuple[Exact, bool]:
    """Itself: it holds none."""
    return engine, False


def numbers(engine: Exact, d: int, d_v: int) -> int:
    """Numbers of temporary arrays for a block of one head."""
    return 1 << 16


def constants(sp: Space, own: Sequence[Exact], heads: Heads) -> None:
    """None."""


def forward(sp: Space, engine: Exact, heads: Heads, constants: None) -> tuple[Array, Array, Array, None]:
    """``out``, the row factors, and None."""
    return *softmax.forward(sp, heads), None


def backward(
    sp: Space,
    engine: Exact,
    heads: Heads,
    constants: None,
    row_max: Array,
    row_scale: Array,
    dout: Array,
    delta: Array,
) -> Grads:
    """The gradients, from what the forward pass has left."""
    return softmax.backward(sp, heads, row_max, row_scale, dout, delta)


def left_out(sp: Space, engine: Exact, heads: Heads, constants: None) -> float:
    """0: the pass has the original scores."""
    return 0.0


def why_not(engine: Exact, scale: float, biased: bool) -> str:
    """Why a row whose ``row_scale`` is no use has no answer, and what to do."""
    if np.isposinf(scale):
        return (
            "has no key to attend to: key_bias is -inf (or its scores overflow) for every key that it may see; "
            f"{core.NO_KEY_REMEDY}"
        )
    return "has scores that overflow; make q, k, scale or key_bias smaller"
