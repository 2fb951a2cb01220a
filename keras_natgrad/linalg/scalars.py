"""Scalars in the right precision."""

from __future__ import annotations

from typing import Any

import tensorflow as tf


def scalar(value: Any, dtype: Any) -> tf.Tensor:
    """Returns a Python number or a tensor as a scalar of a dtype.

    `tf.cast(0.95, "float64")` rounds to float32 on the way; this does not.
    """
    if isinstance(value, (int, float)):
        return tf.constant(value, dtype)
    return tf.cast(value, dtype)
