"""A guard against steps that the quadratic model got badly wrong."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

# A batch's loss counts as a surge beyond this many mean absolute deviations
# and this fraction of the average loss above the running average.
_DEVIATIONS = 5.0
_FRACTION = 0.5
_DECAY = 0.9


class SurgeGuard:
    """Notices when the last step made the loss surge.

    The loss of the next batch tells for free what the last step did to it. It
    is held against a running average and its mean absolute deviation, so that
    neither the scale of the loss nor the noise of the batches matters. The
    optimizer then takes the step back and raises its damping.

    Args:
        add_variable: Creates a saved variable from (name, shape, init).
    """

    def __init__(self, add_variable: object) -> None:
        assert callable(add_variable)
        self._state = add_variable("loss_average", (3,), "zeros")

    def is_surge(self, loss: tf.Tensor) -> tf.Tensor:
        """Returns whether a loss is out of line with those before.

        Args:
            loss: Scalar, of a batch before its step.
        """
        average, deviation, weight = self._debiased()
        loss = tf.cast(loss, average.dtype)
        threshold = (
            average + _DEVIATIONS * deviation + _FRACTION * tf.abs(average)
        )
        return tf.logical_and(weight > 0, loss > threshold)

    def is_blamed(self, loss: tf.Tensor, before: tf.Tensor) -> tf.Tensor:
        """Returns whether a surge is the step's doing, and not the batch's.

        Near the end of training a batch with a few hard examples stands out as
        a bad step does. The step is to blame where it made up more than half
        of what the loss is above the average.

        Args:
            loss: Scalar, of a batch now.
            before: Scalar, of the same batch before the last step.
        """
        average, _, _ = self._debiased()
        loss, before = (tf.cast(x, average.dtype) for x in (loss, before))
        return loss - before > 0.5 * (loss - average)

    def accept(self, loss: tf.Tensor) -> None:
        """Takes a loss into the running average."""
        average, _, weight = self._debiased()
        loss = tf.cast(loss, average.dtype)
        seen = weight > 0
        difference = tf.where(seen, tf.abs(loss - average), tf.zeros_like(loss))
        new = tf.stack([loss, difference, tf.ones_like(loss)])
        self._state.assign(_DECAY * self._state.value + (1 - _DECAY) * new)

    def _debiased(self) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        total, deviation, weight = tf.unstack(tf.convert_to_tensor(self._state))
        safe = tf.where(weight > 0, weight, tf.ones_like(weight))
        return total / safe, deviation / safe, weight


def loss_before(
    objective: Callable[[], Any],
    variables: Sequence[Any],
    velocities: Sequence[Any],
) -> tf.Tensor:
    """Returns a loss at the weights before the last step.

    Args:
        objective: Returns the loss at the current weights.
        variables: `keras.Variable`s, afterwards exactly as they were.
        velocities: The last step, one `keras.Variable` per variable.
    """
    now = [tf.identity(variable.value) for variable in variables]
    for variable, value, velocity in zip(
        variables, now, velocities, strict=True
    ):
        step = tf.cast(tf.convert_to_tensor(velocity), variable.dtype)
        variable.assign(value - step)
    with tf.control_dependencies(now):
        before = tf.convert_to_tensor(objective())
    with tf.control_dependencies([before]):
        for variable, value in zip(variables, now, strict=True):
            variable.assign(value)
    return before
