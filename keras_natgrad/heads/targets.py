"""Which targets the families of heads accept."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf


class TargetSupport(NamedTuple):
    """Which targets a family accepts.

    Attributes:
        description: Completes "The targets must be ...".
        contains: Function from targets to booleans.
        ends: The ends of the open interval that contains them.
    """

    description: str
    contains: Any
    ends: tuple[float, float] = (-math.inf, math.inf)


def _is_count(y: tf.Tensor) -> tf.Tensor:
    return tf.math.is_finite(y) & (y >= 0) & tf.equal(y, tf.floor(y))


TARGETS = {
    "real": TargetSupport(
        "finite numbers; remove or mask missing values", tf.math.is_finite
    ),
    "positive": TargetSupport(
        "positive finite numbers; shift or clip zeros",
        lambda y: tf.math.is_finite(y) & (y > 0),
        (0.0, math.inf),
    ),
    "nonnegative": TargetSupport(
        "non-negative finite numbers",
        lambda y: tf.math.is_finite(y) & (y >= 0),
    ),
    "above_minus_one": TargetSupport(
        "finite numbers above −1",
        lambda y: tf.math.is_finite(y) & (y > -1),
        (-1.0, math.inf),
    ),
    "unit": TargetSupport(
        "numbers strictly between 0 and 1; shrink 0 and 1 inwards",
        lambda y: (y > 0) & (y < 1),
        (0.0, 1.0),
    ),
    "count": TargetSupport("non-negative integers", _is_count),
}


def clip_inside(draws: tf.Tensor, target_support: str) -> tf.Tensor:
    """Clips draws to the floating-point numbers inside of a support.

    Args:
        draws: Tensor.
        target_support: A key of `TARGETS`.

    Returns:
        Tensor of the same shape and dtype.
    """
    dtype = draws.dtype.as_numpy_dtype
    low, high = (dtype(end) for end in TARGETS[target_support].ends)
    # Near zero, the smallest number that processors do not flush to zero.
    least = np.finfo(dtype).tiny if low == 0 else np.nextafter(low, high)
    return tf.clip_by_value(draws, least, np.nextafter(high, low))
