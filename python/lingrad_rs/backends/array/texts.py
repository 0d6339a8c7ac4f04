"""How numbers are written in messages: as the compiled core writes them."""

from __future__ import annotations

import numpy as np

__all__ = ["scientific"]


def scientific(x: float, digits: int) -> str:
    """With so many digits after the point, and a bare exponent."""
    return np.format_float_scientific(x, precision=digits, unique=False, exp_digits=1).replace("e+", "e")
