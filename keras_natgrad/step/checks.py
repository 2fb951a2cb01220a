"""Checks of numbers that users pass; NumPy's scalars are numbers too."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any


def is_number(value: Any) -> bool:
    """Returns whether something is a finite real number, and no bool."""
    real = isinstance(value, Real) and not isinstance(value, bool)
    return real and math.isfinite(value)


def check_positive(name: str, value: Any) -> float:
    """Returns a positive number as a float, else raises ValueError."""
    if is_number(value) and value > 0:
        return float(value)
    raise ValueError(
        f"`{name}` must be a positive number. Received: {name}={value!r}"
    )


def check_fraction(name: str, value: Any) -> float:
    """Returns a float in [0, 1), else raises ValueError."""
    if is_number(value) and 0 <= value < 1:
        return float(value)
    raise ValueError(
        f"`{name}` must be a float in [0, 1). Received: {name}={value!r}"
    )


def check_integer(name: str, value: Any, least: int) -> int:
    """Returns an integer of at least `least`, else raises ValueError."""
    integer = isinstance(value, Integral) and not isinstance(value, bool)
    if integer and value >= least:
        return int(value)
    raise ValueError(
        f"`{name}` must be an integer of at least {least}. "
        f"Received: {name}={value!r}"
    )


def check_period(name: str, value: Any) -> int:
    """Returns a positive number of steps, else raises ValueError."""
    integer = isinstance(value, Integral) and not isinstance(value, bool)
    if integer and value >= 1:
        return int(value)
    raise ValueError(
        f"`{name}` must be a positive number of steps, e.g. 10. "
        f"Received: {name}={value!r}"
    )


def check_seed(value: Any) -> int:
    """Returns a seed that fits int32, else raises ValueError."""
    integer = isinstance(value, Integral) and not isinstance(value, bool)
    if integer and -(2**31) <= value < 2**31:
        return int(value)
    raise ValueError(
        "`seed` must be an integer between -2**31 and 2**31 - 1. "
        f"Received: seed={value!r}"
    )
