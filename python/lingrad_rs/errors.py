"""What the library raises. A message names the argument, what it got and what it needs."""

__all__ = [
    "ArgumentError",
    "DenominatorError",
    "DeviceError",
    "DtypeError",
    "LingradError",
    "NonFiniteError",
    "ShapeError",
    "ToleranceError",
]


class LingradError(Exception):
    """The base of all errors of this library; raised itself only for internal errors."""


class ShapeError(LingradError, ValueError):
    """An array has the wrong shape."""


class DtypeError(LingradError, TypeError):
    """An argument is not an array, or not one of float32 or float64, or its dtype differs from the others'."""


class ArgumentError(LingradError, ValueError):
    """An option has a value that it may not have."""


class NonFiniteError(LingradError, ValueError):
    """An array holds NaN or infinity, or a result would (it overflows its dtype)."""


class DenominatorError(LingradError, ArithmeticError):
    """A row of the attention matrix has a sum that is not positive, or not finite, or no key to attend to."""


class ToleranceError(LingradError, ValueError):
    """A tolerance cannot be met, or is not one."""


class DeviceError(LingradError, TypeError):
    """An array lies on a device where the library cannot compute, or not on the same one as the others.

    Also: what computing there needs is missing (CuPy, a driver, CUDA's libraries), or its memory does not suffice.
    """
