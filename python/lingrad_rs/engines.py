"""What an attention engine is, as data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from . import _check
from .errors import ArgumentError, NonFiniteError

__all__ = ["Engine", "Exact", "Polynomial"]


@dataclass(frozen=True)
class Exact:
    """Softmax attention, blocked, with a running maximum.

    ``out = D^-1 A v`` with ``A = exp(scale q k^T + key_bias)`` and ``D`` its row sums, to rounding.

    Cost: O(n m (d + dv)) time and O(n + m) memory a head, forward and backward.
    """


@dataclass(frozen=True)
class Polynomial:
    """Attention with ``exp(s)`` replaced by ``p(s) = sum_{j <= g} a_j s^j``, in time almost linear in the tokens.

    ``A ~ phi(q) diag(a) phi(k)^T`` with ``phi`` the symmetric monomials of degree 0 to g, ``r = C(d + g, g)`` of them.
    Accurate where the scores are small; `lingrad_rs.measure_error` tells how accurate. A row whose denominator is not
    positive is a `DenominatorError`; an even-degree Taylor polynomial has none.

    Parameters
    ----------
    degree : int
        ``g``, at least 1.
    coefficients : {"taylor", "fitted"} or sequence of float
        ``a_0 .. a_g``: ``1/j!``, or the weighted least-squares fit of ``exp`` to a sample of the call's own scores, or
        given numbers. With ``causal=True`` the sample is taken from the first 1024 tokens, which are exact among
        themselves, so that no token's answer depends on a later one (refused with ``diagonal="polynomial"``, which has
        no exact tokens). Fitting costs little and lowers the error.
    gradient : {"closed_form", "consistent"}
        The exact gradient's formula with the softmax matrix in its low-rank form (closer to the true gradient), or the
        derivative of the approximate output (which passes central differences).
    shift : {"none", "mean"}
        What is subtracted from queries and keys, which leaves exact attention as it is and makes scores small. The
        means take in later tokens, so ``"mean"`` is refused with ``causal=True``.
    diagonal : {"exact", "polynomial"}
        With ``causal=True``, whether the scores near the diagonal go through ``exp`` or through the polynomial.
    window : int
        With ``diagonal="exact"``, at least so many tokens before each query are exact.

    Raises
    ------
    ArgumentError, NonFiniteError
        An option has a value that it may not have.

    Notes
    -----
    Cost a head: O((n + m) r dv) time forward, O((n + m) r' dv) backward with ``r' = C(d + g + 1, g + 1)`` for the
    closed form and ``r`` for the consistent gradient; beside inputs and outputs, states of ``r' (dv + 1)`` numbers for
    every head under way: 8 to 32 in float64, or under a mask 8 to 256 in the arrays' dtype. Source: arXiv 2408.13233,
    with its printed gradients corrected.
    """

    degree: int = 2
    coefficients: Literal["taylor", "fitted"] | Sequence[float] | NDArray[Any] = "taylor"
    gradient: Literal["closed_form", "consistent"] = "closed_form"
    shift: Literal["none", "mean"] = "none"
    diagonal: Literal["exact", "polynomial"] = "exact"
    window: int = 64

    def __post_init__(self) -> None:
        object.__setattr__(self, "degree", _check.integer("degree", self.degree, 1))
        object.__setattr__(self, "coefficients", _coefficients(self.coefficients, self.degree))
        _check.choice("gradient", self.gradient, ("closed_form", "consistent"))
        _check.choice("shift", self.shift, ("none", "mean"))
        _check.choice("diagonal", self.diagonal, ("exact", "polynomial"))
        object.__setattr__(self, "window", _check.integer("window", self.window, 0))


Engine = Exact | Polynomial
"""Any engine."""


def _coefficients(value: object, degree: int) -> str | tuple[float, ...]:
    if isinstance(value, str):
        if value in ("taylor", "fitted"):
            return value
    elif isinstance(value, Sequence | np.ndarray) and not isinstance(value, bytes | bytearray):
        try:
            numbers = tuple(float(x) for x in value)
        except (TypeError, ValueError):
            numbers = ()
        if len(numbers) != degree + 1:
            raise ArgumentError(f"coefficients is {value!r}; expected degree + 1 = {degree + 1} numbers")
        if not all(map(math.isfinite, numbers)):
            raise NonFiniteError(f"coefficients is {value!r}; expected finite numbers")
        return numbers
    raise ArgumentError(f"coefficients is {value!r}; expected 'taylor', 'fitted' or {degree + 1} numbers")


def check_engine(value: object) -> Engine:
    """``value``, if it is an engine."""
    if not isinstance(value, Exact | Polynomial):
        raise ArgumentError(f"engine is {value!r}; expected Exact() or Polynomial(...)")
    return value
