"""A guard against steps that the quadratic model got badly wrong."""

from __future__ import annotations

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
