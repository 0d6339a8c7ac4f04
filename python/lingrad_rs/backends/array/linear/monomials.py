"""Symmetric monomials: the features of the polynomial engine.

Those of degree j are the products of j coordinates ``c_1 <= ... <= c_j``, in lexicographic order; all degrees follow
each other. So those of degree j that begin with ``c`` are ``x_c`` times the last ones of degree ``j - 1``, from the
first that begins with ``c`` or a later coordinate on. With the multinomials in the weights,

    phi(q)^T diag(weights) phi(k) = sum_j a_j (scale q.k)^j,    weights_alpha = a_j scale^j j! / alpha!,  j = |alpha|
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np

from .. import kernels
from ..device import Space

__all__ = ["Monomials", "monomials", "rank"]

Array = Any


def rank(d: int, degree: int) -> int:
    """How many there are of d coordinates up to a degree: ``C(d + degree, degree)``."""
    return math.comb(d + degree, degree)


class Monomials:
    """The monomials of d coordinates up to a degree.

    Attributes
    ----------
    coordinates : ndarray of int32, shape (r, degree)
        The coordinates of each, and ``d`` for those that it lacks.
    """

    def __init__(self, d: int, degree: int) -> None:
        self.d, self.degree = d, degree
        tables = [np.empty((1, 0), np.int32)]
        multinomials = [np.ones(1)]
        for j in range(1, degree + 1):
            starts = [self.start(j - 1, c) for c in range(d)]
            before, counts = tables[-1], multinomials[-1]
            table = np.concatenate(
                [np.insert(before[start:], 0, c, axis=1) for c, start in enumerate(starts)], dtype=np.int32
            )
            run = (table == table[:, :1]).sum(axis=1)
            multinomials.append(np.concatenate([counts[start:] for start in starts]) * j / run)
            tables.append(table)
        self.coordinates = np.concatenate(
            [np.pad(table, ((0, 0), (0, degree - table.shape[1])), constant_values=d) for table in tables]
        )
        self._multinomials = multinomials

    def rank(self, degree: int) -> int:
        """How many there are up to a degree."""
        return rank(self.d, degree)

    def start(self, degree: int, c: int) -> int:
        """Among those of one degree, the first that begins with coordinate c or a later one."""
        if degree == 0:
            return 0
        return math.comb(self.d + degree - 1, degree) - math.comb(self.d - c + degree - 1, degree)

    def weights(self, coefficients: np.ndarray[Any, Any], scale: float) -> np.ndarray[Any, Any]:
        """The weights of polynomials ``(heads, degree + 1)`` of ``scale q.k``: ``(heads, r)``, float64."""
        # Of NumPy's, which overflow to infinity.
        powers = np.float64(scale) ** np.arange(coefficients.shape[1])
        parts = [a[:, None] * self._multinomials[j][None] for j, a in enumerate((coefficients * powers).T)]
        return np.concatenate(parts, axis=1)

    def features(self, sp: Space, x: Array, degree: int) -> Array:
        """``phi`` of tokens ``x (..., d, tokens)``: ``(..., r, tokens)``."""
        if kernels.usable(x):
            return kernels.monomial_features(x, self.coordinates[: self.rank(degree), :degree])
        return sp.xp.concat(self._by_degree(sp, x, degree), axis=-2)

    def _by_degree(self, sp: Space, x: Array, degree: int) -> list[Array]:
        xp = sp.xp
        parts = [xp.ones((*x.shape[:-2], 1, x.shape[-1]), dtype=x.dtype, device=sp.device)]
        for j in range(1, degree + 1):
            before = parts[-1]
            products = [x[..., c : c + 1, :] * before[..., self.start(j - 1, c) :, :] for c in range(self.d)]
            parts.append(xp.concat(products, axis=-2))
        return parts

    def pullback(self, sp: Space, x: Array, u: Array, degree: int) -> Array:
        """``J_phi(x)^T u``: the gradient of ``sum_alpha u_alpha phi_alpha(x)``, ``(..., d, tokens)``.

        ``u (..., r, tokens)`` is not needed afterwards.
        """
        if kernels.usable(x):
            return kernels.monomial_pullback(x, u, self.coordinates[: self.rank(degree), :degree])
        xp = sp.xp
        parts = self._by_degree(sp, x, degree - 1)
        dx = sp.zeros(x.shape, x.dtype)
        end = u.shape[-2]
        du = u[..., self.rank(degree - 1) :, :]
        # x_c p has the gradient p in x_c, and x_c in p.
        for j in range(degree, 0, -1):
            below, end = parts[j - 1], end - du.shape[-2]
            dbelow = xp.asarray(u[..., end - below.shape[-2] : end, :], copy=True)
            at = 0
            for c in range(self.d):
                start = self.start(j - 1, c)
                block = du[..., at : at + below.shape[-2] - start, :]
                dx[..., c, :] += xp.sum(block * below[..., start:, :], axis=-2)
                dbelow[..., start:, :] += x[..., c : c + 1, :] * block
                at += block.shape[-2]
            du = dbelow
        return dx


@functools.lru_cache(maxsize=8)
def monomials(d: int, degree: int) -> Monomials:
    """Those of d coordinates, made once."""
    return Monomials(d, degree)
