"""Checks of numbers that users pass; NumPy's scalars are numbers too."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any

import numpy as np


def is_number(value: Any) -> bool:
    """Returns whether something is a finite real number, and not a bool."""
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


def check_integer(name: str, value: Any, least: int = 1) -> int:
    """Returns an integer, which may be a float, else raises ValueError."""
    if is_number(value) and value == int(value) and value >= least:
        return int(value)
    raise ValueError(
        f"`{name}` must be an integer of at least {least}. "
        f"Received: {name}={value!r}"
    )


def check_period(name: str, value: Any) -> int:
    """Returns a positive number of steps, else raises ValueError."""
    if _is_integral(value) and value >= 1:
        return int(value)
    raise ValueError(
        f"`{name}` must be a positive number of steps, e.g. 10. "
        f"Received: {name}={value!r}"
    )


def check_seed(value: Any) -> int:
    """Returns a seed that fits int32, else raises ValueError."""
    if _is_integral(value) and -(2**31) <= value < 2**31:
        return int(value)
    raise ValueError(
        "`seed` must be an integer between -2**31 and 2**31 - 1. "
        f"Received: seed={value!r}"
    )


def check_fixed(name: str, number: Any, support: str) -> float:
    """Returns a fixed parameter that is in its support, else raises.

    Args:
        name: Name of the parameter.
        number: The value.
        support: `"real"`, `"positive"` or `"unit"`, the interval (0, 1).

    Raises:
        ValueError: If the value is outside.
    """
    number = float(number)
    good, what = {
        "real": (math.isfinite(number), "a finite number, such as 0.0"),
        "positive": (
            0.0 < number < math.inf,
            "a positive, finite number, such as 1.0",
        ),
        "unit": (0.0 < number < 1.0, "a number between 0 and 1, such as 0.5"),
    }[support]
    if good:
        return number
    raise ValueError(
        f"`{name}` must be {what}, or the name of a link. "
        f"Received: {name}={number}"
    )


def check_probability(probability: Any) -> None:
    """Raises ValueError unless the level of a quantile is in (0, 1)."""
    values = np.asarray(probability)
    real = np.issubdtype(values.dtype, np.number)
    if not real or not np.all((values > 0.0) & (values < 1.0)):
        raise ValueError(
            "`probability` must be between 0 and 1. "
            f"Received: probability={probability!r}"
        )


def _is_integral(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)
