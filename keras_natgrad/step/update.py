"""Updates of the variables."""

from __future__ import annotations

from collections.abc import Sequence
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


def move(
    variables: Sequence[Any],
    updates: Sequence[Any],
    direction: Sequence[tf.Tensor],
    coefficients: tf.Tensor,
    part_of_variable: Sequence[int],
) -> None:
    """Moves all variables by `δ = −α Δ + μ δ₋₁`.

    Args:
        variables: `keras.Variable`s.
        updates: δ₋₁, one `keras.Variable` per variable; empty for none.
        direction: Δ, one tensor per variable.
        coefficients: (α, μ), or an α for each part and then μ.
        part_of_variable: The part that each variable belongs to.
    """
    *rates, momentum = tf.unstack(coefficients)
    for index, variable in enumerate(variables):
        part = part_of_variable[index] if len(rates) > 1 else 0
        apply_update(
            variable,
            updates[index] if updates else None,
            direction[index],
            rates[part],
            momentum,
        )


def restore(
    variables: Sequence[Any], values: Sequence[tf.Tensor], when: tf.Tensor
) -> None:
    """Puts values back into variables where a scalar bool says so.

    Args:
        variables: `keras.Variable`s.
        values: One tensor per variable.
        when: Scalar bool.
    """
    for variable, value in zip(variables, values, strict=True):
        variable.assign(tf.where(when, value, variable.value))
