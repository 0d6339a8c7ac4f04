"""What an attention engine is, as data."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from .. import _check
from ..errors import ArgumentError, DeviceError, DtypeError, NonFiniteError, ShapeError

__all__ = ["Auto", "Engine", "Exact", "HeadEngine", "Landmark", "LandmarkConstants", "Polynomial"]

_LARGEST_RANK = 8192

# Of a Taylor polynomial by its bound. Beyond it, scores are too large for the rank of any to pay.
_HIGHEST_DEGREE = 64


@dataclass(frozen=True)
class Exact:
    """Softmax attention, blocked, with a running maximum.

    ``out = D^-1 A v`` with ``A = exp(scale q k^T + key_bias)`` and ``D`` its row sums, to rounding.

    Cost: O(n m (d + d_v)) time and O(n + m) memory a head, forward and backward.
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
    shift : {"none", "mean"} or pair of sequences of float
        What is subtracted from queries and from keys, which leaves exact attention as it is and makes scores small:
        nothing, the means of the call (of the keys that no bias removes), or two constant vectors of d numbers. The
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
    Cost a head: O((n + m) r d_v) time forward, O((n + m) r' d_v) backward with ``r' = C(d + g + 1, g + 1)`` for the
    closed form and ``r`` for the consistent gradient; beside inputs and outputs, states of ``r' (d_v + 1)`` numbers for
    every head under way: 8 to 32 in float64, or under a mask 8 to 256 in the arrays' dtype. Source: arXiv 2408.13233,
    with its printed gradients corrected.
    """

    degree: int = 2
    coefficients: Literal["taylor", "fitted"] | Sequence[float] | NDArray[Any] = "taylor"
    gradient: Literal["closed_form", "consistent"] = "closed_form"
    shift: Literal["none", "mean"] | tuple[Sequence[float], Sequence[float]] = "none"
    diagonal: Literal["exact", "polynomial"] = "exact"
    window: int = 64

    def __post_init__(self) -> None:
        object.__setattr__(self, "degree", _check.integer("degree", self.degree, 1))
        object.__setattr__(self, "coefficients", _coefficients(self.coefficients, self.degree))
        _check.choice("gradient", self.gradient, ("closed_form", "consistent"))
        object.__setattr__(self, "shift", _shift(self.shift))
        _check.choice("diagonal", self.diagonal, ("exact", "polynomial"))
        object.__setattr__(self, "window", _check.integer("window", self.window, 0))

    @classmethod
    def from_bound(cls, error: float, score_bound: float, **options: Any) -> Polynomial:
        """The Taylor polynomial of the smallest degree with a proven error, for scores that are known to be bounded.

        With ``eps = max |p(s) exp(-s) - 1|`` over ``|s| <= score_bound``, each ``exp(s)`` errs by at most ``eps`` of
        itself, and ``|out - exact| <= 2 eps / (1 - eps) max |v|`` entry by entry. The degree is the smallest at which
        that factor is at most ``error``. Every denominator is positive then, whether the degree is even or odd.

        Parameters
        ----------
        error : float
            In (0, 1). Rounding comes on top.
        score_bound : float
            Above 0: no ``|scale q.k|``, once the shift is subtracted and without the key bias, is greater. That is for
            the caller to see to: norms of queries and keys whose product is at most ``score_bound / scale`` will do.
        **options
            `gradient`, `shift`, `diagonal` and `window`, as for `Polynomial`.

        Returns
        -------
        Polynomial
            With ``coefficients="taylor"``.

        Raises
        ------
        ToleranceError, ArgumentError, NonFiniteError
            ``error`` is not in (0, 1); ``score_bound`` is not above 0; no degree up to 64 is enough; an option has a
            value that it may not have, or is the degree or the coefficients.

        Notes
        -----
        Cost: O(degree) time, for at most 64 degrees. Source: arXiv 2408.13233, where scores are bounded, the width is
        O(log n) and the error is ``1/poly(n)``.

        Examples
        --------
        >>> Polynomial.from_bound(1e-3, 0.5).degree
        4
        """
        error = _check.tolerance("error", error)
        score_bound = _check.positive("score_bound", score_bound)
        for name in ("degree", "coefficients"):
            if name in options:
                raise ArgumentError(f"{name} is {_check.shown(options[name])}; expected none, as from_bound chooses it")
        for degree in range(1, _HIGHEST_DEGREE + 1):
            eps = taylor_error(degree, score_bound)
            if eps < 1 and 2 * eps / (1 - eps) <= error:
                return cls(degree=degree, **options)
        raise ArgumentError(
            f"score_bound is {score_bound} and error is {error}; "
            f"expected what a degree of at most {_HIGHEST_DEGREE} meets"
        )


def taylor_error(degree: int, score_bound: float) -> float:
    """``max |p(s) exp(-s) - 1|`` over ``|s| <= score_bound`` for Taylor's ``p``; infinity where it is not below 1."""
    # With h(s) = p(s) e^-s - 1: p - p' = s^g/g!, so h' = -e^-s s^g/g! has one sign on either side of 0, and h(0) = 0.
    # |h| grows towards both ends of [-R, R]. It is the integral of e^-t t^g/g! over [0, R] at R, and that of e^t t^g/g!
    # at -R, which is greater. The series of the latter, sum_i R^(g+1+i) / (g! i! (g+1+i)), has positive terms only: no
    # digit is lost, however small R is.
    power = 1.0  # R^(g+1+i) / (g! i!), with i = 0 at first
    for j in range(1, degree + 1):
        power *= score_bound / j
    power *= score_bound
    total, i = 0.0, 0
    while True:
        term = power / (degree + 1 + i)
        total += term
        if total >= 1:  # a huge R, whose terms would grow for long, ends here at once
            return math.inf
        if term <= 2**-54 * total and i >= score_bound:  # those that follow are smaller, and soon by half each
            return total
        i += 1
        power *= score_bound / i


@dataclass(frozen=True, eq=False)
class LandmarkConstants:
    """What the landmarks of a head are: plain numbers, to be kept and used again.

    Attributes
    ----------
    scale : float
        The factor of the scores that they were made for.
    query_shift, key_shift : ndarray, shape (d,)
        Subtracted from queries and keys.
    balance : float
        What shifted queries are divided by, and shifted keys multiplied with.
    landmarks : ndarray, shape (r, d)
        The points.
    matrix : ndarray, shape (r, r)
        ``M`` of ``exp(-|scale| |x - y|^2 / 2) ~ phi(x)^T M phi(y)`` for shifted and balanced queries x and keys y.

    Raises
    ------
    ArgumentError, DtypeError, ShapeError, NonFiniteError
        A number is out of range; arrays are not float64, do not fit together, or are not finite.
    DeviceError
        An array is not NumPy's.
    """

    scale: float
    query_shift: NDArray[np.float64]
    key_shift: NDArray[np.float64]
    balance: float
    landmarks: NDArray[np.float64]
    matrix: NDArray[np.float64]

    def __post_init__(self) -> None:
        object.__setattr__(self, "scale", _check.number("scale", self.scale))
        object.__setattr__(self, "balance", _check.positive("balance", self.balance))
        shapes: dict[str, tuple[str | int, ...]] = {"landmarks": ("r", "d")}
        for name in ("landmarks", "query_shift", "key_shift", "matrix"):
            array = _check.array(name, getattr(self, name))
            if not isinstance(array, np.ndarray):
                raise DeviceError(
                    f"{name} is a {_check.type_name(array)}; expected a NumPy array, which CuPy's get() makes"
                )
            array = array.copy()
            if array.dtype != np.float64:
                raise DtypeError(f"{name} has dtype {array.dtype}; expected float64")
            _check.shape(name, array, shapes.get(name, ()), match="the landmarks")
            if name == "landmarks":
                r, d = array.shape
                if r == 0 or d == 0:
                    raise ShapeError(f"landmarks has shape {array.shape}; expected at least one point")
                shapes = {"query_shift": (d,), "key_shift": (d,), "matrix": (r, r)}
            if not np.isfinite(array).all():
                raise NonFiniteError(f"{name} holds NaN or infinity; expected finite numbers")
            array.flags.writeable = False
            object.__setattr__(self, name, array)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, LandmarkConstants):
            return NotImplemented
        return all(np.array_equal(getattr(self, f.name), getattr(other, f.name)) for f in fields(self))

    def __hash__(self) -> int:
        # Of the points alone, which suffice to tell constants apart; -0.0 is 0.0, as in ==.
        return hash((self.scale, self.balance, (self.landmarks + 0.0).tobytes()))

    def __reduce__(self) -> tuple[type[LandmarkConstants], tuple[Any, ...]]:
        # Through the constructor, so that the arrays of a copy are checked, and read-only too.
        return type(self), tuple(getattr(self, f.name) for f in fields(LandmarkConstants))

    def __repr__(self) -> str:
        r, d = self.landmarks.shape
        return f"<LandmarkConstants: {r} points of width {d}>"


@dataclass(frozen=True)
class Landmark:
    """Attention through the values of ``exp`` at a few points that lie among the queries and keys.

    With queries x and keys y shifted to their means and balanced, ``exp(scale x.y)`` is ``exp(-scale |x - y|^2 / 2)``
    times a factor of each; and that is about ``phi(x)^T M phi(y)`` with the Gaussian features
    ``phi_l(x) = exp(-scale |x - x_l|^2 / 2)`` of ``rank`` landmarks ``x_l``, taken from a sample by randomly
    pivoted Cholesky; ``M`` is their inverse kernel or a regularised fit, whichever errs less on another sample. It
    needs far fewer terms than `Polynomial` where the points lie near a low-dimensional set (time series, images, smooth
    sequences), and can fail anywhere else: measure its error (`lingrad_rs.measure_error`), or let ``tol=`` choose. Each
    row's denominator is held against Jensen's lower bound.

    Parameters
    ----------
    rank : int
        Landmarks, 1 to 8192; fewer are used where fewer resolve the sample. That of ``constants`` where they are given.
    seed : int
        Of the draws.
    constants : LandmarkConstants, optional
        What was drawn before, for data of the same kind: nothing is drawn. With ``causal=True`` and without it,
        everything is taken from the first 1024 tokens, which are exact among themselves, so that no token's answer
        depends on a later one.

    Raises
    ------
    ArgumentError
        An option has a value that it may not have.

    Notes
    -----
    The gradient is the derivative of the approximate output, for fixed landmarks. With ``causal=True`` the last 64
    tokens before each query are exact. Cost a head: O((n + m) r (d + d_v)) time, and for the draw O(rank^3 + d rank^2),
    of a sample of some thousand queries and keys; memory as for `Polynomial`.
    """

    rank: int = 256
    seed: int = 0
    constants: LandmarkConstants | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "rank", _check.integer("rank", self.rank, 1))
        object.__setattr__(self, "seed", _check.integer("seed", self.seed, 0))
        if not isinstance(self.constants, LandmarkConstants | None):
            raise ArgumentError(f"constants is a {type(self.constants).__name__}; expected LandmarkConstants or None")
        if self.constants is not None:
            object.__setattr__(self, "rank", len(self.constants.landmarks))
        if self.rank > _LARGEST_RANK:
            raise ArgumentError(f"rank is {self.rank}; expected an integer of 1 to {_LARGEST_RANK}")


@dataclass(frozen=True)
class Auto:
    """A tolerance in place of an engine: for each head, the cheapest engine that meets it, or the exact one.

    With ``||approx - exact||_F / ||exact||_F`` for each head, of out and, with ``gradients``, of dq, dk, dv (and the
    gradient of a key bias):

    - Guaranteed: a head is computed exactly, or what a low-rank engine gave has been held against exact rows in float64
      that had no part in choosing it, and the upper end of the interval of its measured error is at most ``tol``.
    - Estimated: that error, from so many rows, with an interval called 95%; rows are drawn by what costs little to know
      of all of them (spread of scores, leverage, sizes of values, gradients and results, the heaviest pairs), so that
      errors which sit in a few tokens are seen.
    - What no sample can rule out: an error in a few rows to which none of these points.

    Engines that would not be clearly faster are discarded by a cost model; the errors of polynomials of every degree
    are measured on some rows, and those of landmarks on a sample; the cheapest is run, and held against 64 to 256 other
    rows. Gradients are held against exact ones again in the pullback, for the ``dout`` at hand; those of keys take the
    exact row sums of the drawn queries, and what those of others may add widens their interval. What misses is computed
    exactly. What is chosen depends on how fast the machine multiplies and exponentiates.

    Parameters
    ----------
    tol : float
        In (0, 1), and not below 1e-5 for float32 or 1e-12 for float64.
    gradients : bool
        Whether the engine is chosen for gradients too. (`attention`, which has none, never does.)
    strict_causal : bool
        With ``causal=True``, use no constants (coefficients, shifts, landmarks) that were taken from later tokens, but
        those of each call's first 1024 tokens, which are exact among themselves. The choice of the engine, and whether
        it is good enough, always looks at the whole sequence.
    seed : int
        Of the draws.

    Raises
    ------
    ToleranceError, ArgumentError
        ``tol`` is out of range; another option has a value that it may not have.

    Notes
    -----
    Cost: planning takes at most about a tenth of the time of exact attention, or is not done; verification takes that
    of 64 to 256 rows and keys a head. Truly subquadratic work is possible only where scores are small or lie near a
    low-dimensional set: elsewhere the answer is the exact engine.
    """

    tol: float = 1e-2
    gradients: bool = True
    strict_causal: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "tol", _check.tolerance("tol", self.tol))
        object.__setattr__(self, "gradients", _check.flag("gradients", self.gradients))
        object.__setattr__(self, "strict_causal", _check.flag("strict_causal", self.strict_causal))
        object.__setattr__(self, "seed", _check.integer("seed", self.seed, 0))


HeadEngine = Exact | Polynomial | Landmark
"""What may compute a head."""
Engine = HeadEngine | Auto
"""Any engine, or a tolerance in its place."""
# As a tuple: compilers of PyTorch before 2.11 do not follow isinstance with a union.
_KINDS: tuple[type[Engine], ...] = get_args(Engine)


def engine_name(engine: HeadEngine) -> str:
    """An engine in a few words."""
    match engine:
        case Polynomial(degree=degree):
            return f"polynomial, degree {degree}"
        case Landmark(rank=rank):
            return f"{rank} landmarks"
    return type(engine).__name__.lower()


def described(engine: HeadEngine) -> dict[str, Any]:
    """What `engine_of` reads, in numbers, texts and lists alone."""
    options = {f.name: getattr(engine, f.name) for f in fields(engine)}
    constants = options.pop("constants", None)
    if constants is not None:
        numbers = {f.name: getattr(constants, f.name) for f in fields(constants)}
        options["constants"] = {k: x.tolist() if isinstance(x, np.ndarray) else x for k, x in numbers.items()}
    return {"kind": type(engine).__name__} | options


def engine_of(description: Mapping[str, Any]) -> HeadEngine:
    """The engine that `described` had, or the core.

    Raises
    ------
    ArgumentError
        There is no such engine, or an option has a value that it may not have.
    """
    options: dict[str, Any] = dict(description)
    kind, constants = options.pop("kind"), options.get("constants")
    if constants is not None:
        numbers: dict[str, Any] = {
            k: np.array(x, np.float64) if isinstance(x, list) else x for k, x in constants.items()
        }
        options["constants"] = LandmarkConstants(**numbers)
    for engine in get_args(HeadEngine):
        if engine.__name__ == kind:
            return engine(**options)
    raise ArgumentError(f"a plan holds the engine {_check.shown(kind)}, which is unknown")


def _shift(value: object) -> str | tuple[tuple[float, ...], ...]:
    if isinstance(value, str):
        _check.choice("shift", value, ("none", "mean"))
        return value
    try:
        query, key = value  # type: ignore[misc]
    except Exception:  # of whatever kind its class raises
        query = key = None
    # Nothing is copied from a device number by number.
    parts = [_check.reals(part) if isinstance(part, Sequence | np.ndarray) else None for part in (query, key)]
    query, key = parts
    if query is None or key is None:
        raise ArgumentError(f"shift is {_check.shown(value)}; expected 'none', 'mean' or two sequences of d numbers")
    if not all(map(math.isfinite, query + key)):
        raise NonFiniteError(f"shift is {_check.shown(value)}; expected finite numbers")
    return query, key


def _coefficients(value: object, degree: int) -> str | tuple[float, ...]:
    if isinstance(value, str):
        if value in ("taylor", "fitted"):
            return value
    elif isinstance(value, Sequence | np.ndarray):
        numbers = _check.reals(value) if getattr(value, "ndim", 1) == 1 and len(value) == degree + 1 else None
        if numbers is None:
            raise ArgumentError(f"coefficients is {_check.shown(value)}; expected degree + 1 = {degree + 1} numbers")
        if not all(map(math.isfinite, numbers)):
            raise NonFiniteError(f"coefficients is {_check.shown(value)}; expected finite numbers")
        return numbers
    raise ArgumentError(f"coefficients is {_check.shown(value)}; expected 'taylor', 'fitted' or {degree + 1} numbers")


def check_engine(value: object) -> Engine:
    """``value``, if it is an engine, of no class derived from one: what that computes, no backend would know."""
    if not isinstance(value, _KINDS):
        raise ArgumentError(
            f"engine is {_check.shown(value)}; expected Exact(), Polynomial(...), Landmark(...) or Auto(...)"
        )
    not_derived("engine", value, _KINDS)
    return value


def not_derived(name: str, value: object, classes: tuple[type, ...]) -> None:
    """Raise where ``value``, an instance of one of the classes, is of one derived from it."""
    if type(value) not in classes:
        base = next(kind for kind in classes if isinstance(value, kind))
        raise ArgumentError(
            f"{name} is a {_check.type_name(value)}, a class derived from {base.__name__}; expected {base.__name__} "
            "itself, as only its own fields would be computed with"
        )
