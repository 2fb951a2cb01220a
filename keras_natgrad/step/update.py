"""The update of one variable."""

from __future__ import annotations

from typing import Any

import tensorflow as tf


def apply_update(
    variable: Any,
    velocity: Any,
    direction: tf.Tensor,
    rate: tf.Tensor,
    momentum: tf.Tensor,
) -> None:
    """Moves a variable by `δ = −α d + μ δ₋₁`, and keeps δ as the velocity.

    TensorFlow's fused kernels make one pass over memory, which matters
    because a step of K-FAC reads every weight several times as it is.

    Args:
        variable: `keras.Variable` to move.
        velocity: `keras.Variable` with δ₋₁, or `None` for no momentum.
        direction: d, shaped like the variable.
        rate: Scalar α.
        momentum: Scalar μ.
    """
    if velocity is None:
        tf.raw_ops.ResourceApplyGradientDescent(
            var=variable.value.handle,
            alpha=tf.cast(rate, variable.dtype),
            delta=tf.cast(direction, variable.dtype),
        )
    elif variable.dtype == velocity.dtype:
        tf.raw_ops.ResourceApplyKerasMomentum(
            var=variable.value.handle,
            accum=velocity.value.handle,
            lr=rate,
            grad=direction,
            momentum=momentum,
        )
    else:  # Half-precision weights keep their velocity in full precision.
        velocity.assign(momentum * velocity.value - rate * direction)
        variable.value.assign_add(tf.cast(velocity.value, variable.dtype))
