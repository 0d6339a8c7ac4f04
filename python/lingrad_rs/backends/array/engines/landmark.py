"""The landmark engine: the exponential kernel by its values at a few points that lie among the queries and keys.

Shifted queries and keys are balanced, ``q^ = +-(q - alpha) / t`` (minus where ``scale < 0``), ``k^ = t (k - beta)``;
with the Gaussian kernel ``g(x, y) = e^(-|scale| |x - y|^2 / 2)``,

    e^(scale q'.k') = e^(|scale| |q^|^2 / 2) g(q^, k^) e^(|scale| |k^|^2 / 2),    g(q^, k^) ~ phi(q^)^T M phi(k^)

with ``phi_l(x) = g(x, x_l)``. The first factor cancels in a row, the last is part of the key's weight. Landmarks are
drawn and fitted by the compiled core, from a sample that is copied to the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .... import _lingrad_rs as core
from ....errors import ArgumentError, ShapeError
from ....spec.engines import Landmark, LandmarkConstants
from ..device import Space
from ..linear import passes, scan
from ..linear.features import Gaussians, Map
from ..problem.heads import Grads, Heads
from . import sample

__all__ = [
    "Constants",
    "backward",
    "constants",
    "forward",
    "left_out",
    "name",
    "numbers",
    "why_not",
    "without_numbers",
]

Array = Any


@dataclass(frozen=True)
class Constants:
    """The landmarks of heads, as the pass takes them."""

    features: Gaussians
    query_shift: Array
    key_shift: Array


def name(engine: Landmark) -> str:
    """What it is called in reports."""
    return f"{engine.rank} landmarks"


def without_numbers(engine: Landmark) -> tuple[Landmark, bool]:
    """What engines of heads that run together have in common; the second says whether landmarks are given."""
    given = engine.constants is not None
    return replace(engine, constants=None, seed=0 if given else engine.seed), given


def numbers(engine: Landmark, d: int, d_v: int) -> int:
    """Numbers of temporary arrays for a block of one head."""
    return 8 * engine.rank * (d_v + 1 + d + scan.BLOCK)


def _checked(given: LandmarkConstants, heads: Heads) -> LandmarkConstants:
    if len(given.query_shift) != heads.sizes[2]:
        raise ShapeError(f"landmarks are of width {len(given.query_shift)}; expected d = {heads.sizes[2]}")
    if given.scale != heads.scale:
        raise ArgumentError(f"scale is {heads.scale}; expected {given.scale}, for which the landmarks were made")
    return given


def _drawn(sp: Space, engine: Landmark, heads: Heads) -> list[LandmarkConstants]:
    """Waits for the device."""
    tokens = sample.first(sp, heads) if heads.causal else sample.spread(sp, heads, sample.POOL, 2)
    return [
        LandmarkConstants(
            **core.landmark_constants(
                own.q,
                own.k,
                own.v,
                own.key_bias,
                rank=engine.rank,
                seed=engine.seed,
                causal=heads.causal,
                scale=heads.scale,
                head=heads.first + i,
            )
        )
        for i, own in enumerate(tokens)
    ]


def constants(sp: Space, own: Sequence[Landmark], heads: Heads) -> Constants:
    """Those of one engine a head, where all or none are given; in the latter case it is the same engine for all."""
    given = [_checked(engine.constants, heads) for engine in own if engine.constants is not None]
    drawn = given or _drawn(sp, own[0], heads)
    r = max(len(x.landmarks) for x in drawn)
    c, sign, dtype = abs(heads.scale), -1.0 if heads.scale < 0 else 1.0, heads.q.dtype
    points, offsets, matrices = [], [], []
    for y in drawn:  # as many for each: of those that are added the matrix takes no notice
        points.append(np.pad(y.landmarks, ((0, r - len(y.landmarks)), (0, 0))))
        offsets.append(-c / 2 * np.square(points[-1]).sum(axis=1))
        matrices.append(np.pad(y.matrix, ((0, r - len(y.landmarks)),) * 2))
    t = np.array([y.balance for y in drawn])
    stacked = np.stack(points)
    query, key = (
        Map(
            sp.asarray(stacked * factor[:, None, None], dtype),
            sp.asarray(np.stack(offsets), dtype),
            sp.asarray(half, sp.xp.float64),
        )
        for factor, half in ((sign * c / t, c / (2 * t * t)), (c * t, c * t * t / 2))
    )
    features = Gaussians(query, key, sp.asarray(np.stack(matrices), sp.xp.float64))
    alpha, beta = ([getattr(y, name) for y in drawn] for name in ("query_shift", "key_shift"))
    return Constants(features, sp.asarray(np.stack(alpha), dtype), sp.asarray(np.stack(beta), dtype))


def _pass(sp: Space, heads: Heads, constants: Constants) -> passes.Pass:
    return passes.make_pass(sp, heads, constants.features, constants.query_shift, constants.key_shift)


def near(engine: Landmark) -> scan.Near:
    """How keys near the diagonal are met under a mask."""
    return scan.Near(core.WINDOW, engine.constants is None)


def forward(sp: Space, engine: Landmark, heads: Heads, constants: Constants) -> tuple[Array, Array, Array, Array]:
    """``out``, the row factors, and whether rows are not below Jensen's bound."""
    run = _pass(sp, heads, constants)
    return scan.forward(sp, run, near(engine)) if heads.causal else passes.forward(sp, run)


def backward(
    sp: Space,
    engine: Landmark,
    heads: Heads,
    constants: Constants,
    row_max: Array,
    row_scale: Array,
    dout: Array,
    delta: Array,
) -> Grads:
    """The gradients, from what the forward pass has left."""
    run = _pass(sp, heads, constants)
    if heads.causal:
        return scan.backward(sp, run, near(engine), row_max, row_scale, dout, delta)
    return passes.backward(sp, run, row_scale, dout, delta)


def left_out(sp: Space, engine: Landmark, heads: Heads, constants: Constants) -> Array:
    """What the logarithms of row sums in the original scores are more than those of the pass, ``(heads, n)``."""
    return passes.left_out(sp, _pass(sp, heads, constants), heads, constants.key_shift)


def why_not(engine: Landmark, scale: float, biased: bool) -> str:
    """Why a row whose ``row_scale`` is no use has no answer, and what to do."""
    return passes.why_not(scale, biased, core.LANDMARK_REMEDY)
