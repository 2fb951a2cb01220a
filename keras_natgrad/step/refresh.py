"""When statistics and inverses are renewed."""

from __future__ import annotations

import tensorflow as tf


def is_due(step: tf.Tensor, period: int, dense_steps: int = 0) -> tf.Tensor:
    """Returns whether something with a period happens at this step.

    It happens at every step below `dense_steps`, and then at every step that
    is a multiple of the period.

    Args:
        step: Scalar integer, counted from zero.
        period: Positive number of steps.
        dense_steps: Number of first steps at which it always happens.

    Returns:
        Scalar bool.
    """
    period_tensor = tf.constant(period, step.dtype)
    on_period = tf.equal(tf.math.floormod(step, period_tensor), 0)
    return tf.logical_or(on_period, step < tf.constant(dense_steps, step.dtype))


def check_period(name: str, period: object) -> int:
    """Returns a positive integer period, else raises ValueError."""
    if isinstance(period, bool) or not isinstance(period, int) or period < 1:
        raise ValueError(
            f"`{name}` must be a positive number of steps, e.g. 10. "
            f"Received: {name}={period!r}"
        )
    return period
