"""Checks of the arguments of heads."""

from __future__ import annotations

import math
from typing import Any

import numpy as np


def check_fixed(name: str, number: Any, support: str) -> float:
    """Returns a fixed parameter inside of its support, else raises."""
    number = float(number)
    good = {
        "real": math.isfinite(number),
        "positive": 0.0 < number < math.inf,
        "unit": 0.0 < number < 1.0,
    }[support]
    if not good:
        what = {
            "real": "a finite number, such as 0.0",
            "positive": "a positive, finite number, such as 1.0",
            "unit": "a number between 0 and 1, such as 0.5",
        }[support]
        raise ValueError(
            f"`{name}` must be {what}, or the name of a link. "
            f"Received: {name}={number}"
        )
    return number


def check_count(total_count: Any) -> float:
    """Returns a fixed number of trials or draws, else raises ValueError."""
    if not _is_integer(total_count) or total_count < 1:
        raise ValueError(
            "`total_count` must be an integer, the positive number of draws or "
            f"trials, such as 10. Received: total_count={total_count!r}"
        )
    return float(total_count)


def check_integer(name: str, number: Any, least: int = 1) -> int:
    """Returns an integer of at least `least`, else raises ValueError."""
    if not _is_integer(number) or number < least:
        what = "a positive integer"
        if least > 1:
            what = f"an integer of at least {least}"
        raise ValueError(
            f"`{name}` must be {what}. Received: {name}={number!r}"
        )
    return int(number)


def check_probability(probability: Any) -> None:
    """Raises ValueError unless the level of a quantile is inside (0, 1)."""
    values = np.asarray(probability)
    real = np.issubdtype(values.dtype, np.number)
    if not real or not np.all((values > 0.0) & (values < 1.0)):
        raise ValueError(
            "`probability` must be between 0 and 1. "
            f"Received: probability={probability!r}"
        )


def _is_integer(number: Any) -> bool:
    """Tells whether this is a whole number, also as a float."""
    if isinstance(number, bool):
        return False
    real = isinstance(number, (int, float, np.integer, np.floating))
    return real and math.isfinite(number) and number == int(number)
