"""The feature maps of the low-rank engines, for some heads together.

``A_ij ~ phi(q_i)^T W chi(k_j)``. A state is a sum over tokens of ``[values]`` times features, ``(..., e, r)``; with the
weighting ``W`` it is what the features of the other side are applied to. The gradient may go through features and
weights of its own, the *potential* (see `polynomial`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol

from .. import tiles
from ..device import Space
from ..problem.heads import dots
from .monomials import Monomials

__all__ = ["Features", "Gaussians", "Map", "Polynomials", "Side"]

Array = Any
Side = Literal["queries", "keys"]


class Features(Protocol):
    """The feature maps of both sides. Tokens are ``(heads, blocks, d, tokens)``."""

    def rank(self, potential: bool) -> int:
        """How many features: of the weights, or of their potential."""
        ...

    def of(self, sp: Space, side: Side, x: Array, potential: bool) -> Array:
        """``(heads, blocks, r, tokens)``."""
        ...

    def pullback(self, sp: Space, side: Side, x: Array, u: Array) -> Array:
        """``J^T u`` of the potential's features, for ``u (heads, blocks, r, tokens)``, which is lost."""
        ...

    def weigh(self, sp: Space, state_of: Side, state: Array, potential: bool) -> Array:
        """A state ``(heads, blocks, e, r)``, float64, times ``W``, in the arrays' dtype.

        Of a longer state, the first features.
        """
        ...

    def norms(self, sp: Space, side: Side, x: Array) -> Array | None:
        """What the exponents of features lack, for shifted tokens ``x (heads, tokens, d)``: float64, or None for 0."""
        ...


@dataclass(frozen=True)
class Polynomials:
    """Monomials, weighted by polynomials: ``weights (heads, r)`` and those of the potential.

    Both are float64: powers of the scale, which the tokens make up for, are out of float32's range sooner than scores.
    """

    monomials: Monomials
    degree: int
    weights: Array
    potential_degree: int
    potential_weights: Array
    dtype: Any

    def rank(self, potential: bool) -> int:
        """How many features there are."""
        return self.monomials.rank(self.potential_degree if potential else self.degree)

    def of(self, sp: Space, side: Side, x: Array, potential: bool) -> Array:
        """Features ``(heads, blocks, r, tokens)`` of tokens ``(heads, blocks, d, tokens)``."""
        return self.monomials.features(sp, x, self.potential_degree if potential else self.degree)

    def pullback(self, sp: Space, side: Side, x: Array, u: Array) -> Array:
        """The gradient of the features, weighted by ``u``, in the tokens."""
        return self.monomials.pullback(sp, x, u, self.potential_degree)

    def weigh(self, sp: Space, state_of: Side, state: Array, potential: bool) -> Array:
        """A state times the weights between features, in the arrays' dtype."""
        weights = self.potential_weights if potential else self.weights
        return sp.astype(state[..., : weights.shape[-1]] * weights[:, None, None, :], self.dtype)

    def norms(self, sp: Space, side: Side, x: Array) -> Array | None:
        """What the exponents of features lack; None for 0."""
        return None


@dataclass(frozen=True)
class Map:
    """One map, ``phi_l(x) = e^(points_l.x + offsets_l - half |x|^2)``.

    ``points (heads, r, d)`` and ``offsets (heads, r)`` in the arrays' dtype, ``half (heads,)`` in float64.
    """

    points: Array
    offsets: Array
    half: Array

    def of(self, sp: Space, x: Array) -> Array:
        """The features of ``x (heads, blocks, d, tokens)``."""
        half = sp.astype(self.half, x.dtype)[:, None, None]
        norms = half * sp.xp.sum(x * x, axis=-2)
        return tiles.gaussian(sp, sp.xp.matmul(self.points[:, None, ...], x), self.offsets, norms)


@dataclass(frozen=True)
class Gaussians:
    """Landmarks: a map for queries and one for keys, and ``matrix (heads, r, r)``.

    The matrix, whose large entries cancel, is float64.
    """

    query: Map
    key: Map
    matrix: Array

    def _map(self, side: Side) -> Map:
        return self.query if side == "queries" else self.key

    def rank(self, potential: bool) -> int:
        """How many features there are."""
        return self.matrix.shape[-1]

    def of(self, sp: Space, side: Side, x: Array, potential: bool) -> Array:
        """Features ``(heads, blocks, r, tokens)`` of tokens ``(heads, blocks, d, tokens)``."""
        return self._map(side).of(sp, x)

    def pullback(self, sp: Space, side: Side, x: Array, u: Array) -> Array:
        """The gradient of the features, weighted by ``u``, in the tokens."""
        # Without their norms, which are dealt with elsewhere, features are e to a linear function.
        own = self._map(side)
        return sp.xp.matmul(sp.xp.matrix_transpose(own.points)[:, None, ...], own.of(sp, x) * u)

    def weigh(self, sp: Space, state_of: Side, state: Array, potential: bool) -> Array:
        """A state times the weights between features, in the arrays' dtype."""
        # phi(q)^T M chi(k): keys' states meet queries through M^T, those of queries meet keys through M.
        matrix = sp.xp.matrix_transpose(self.matrix) if state_of == "keys" else self.matrix
        return sp.astype(sp.xp.matmul(state, matrix[:, None, ...]), self.query.points.dtype)

    def norms(self, sp: Space, side: Side, x: Array) -> Array | None:
        """What the exponents of features lack; None for 0."""
        return self._map(side).half[:, None] * dots(sp, x, x)
