"""Guards against steps that the quadratic model got badly wrong."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_natgrad.checks import check_integer, check_positive, is_number
from keras_natgrad.linalg import scalar


@keras.saving.register_keras_serializable(package="keras_natgrad")
@dataclass(frozen=True)
class SurgeGuard:
    """Takes back a step after which the loss surges.

    The loss of the next batch tells for free what the last step did to it. It
    is held against a running average and its mean absolute deviation, so that
    neither the scale of the loss nor the noise of the batches matters. The
    step is then taken back and the damping is raised.

    Args:
        deviations: A surge is this many mean absolute deviations above the
            average,
        fraction: plus this fraction of the average itself.
        decay: Decay of the average, in [0, 1).
        growth: Factor of the damping. It is squared after a second step in a
            row that was taken back, and so on: where the damping starts many
            orders too low, as in deep networks without normalisation, a fixed
            factor would spend a step on each order.
        most_powers: Largest power of that factor.

    Raises:
        ValueError: If an argument is out of range.
    """

    deviations: float = 5.0
    fraction: float = 0.5
    decay: float = 0.9
    growth: float = 10.0
    most_powers: int = 3

    def __post_init__(self) -> None:
        for name in ("deviations", "fraction"):
            value = getattr(self, name)
            if not is_number(value) or value < 0:
                raise ValueError(
                    f"`{name}` must be non-negative. Received: {name}={value!r}"
                )
        if not is_number(self.decay) or not 0 <= self.decay < 1:
            raise ValueError(
                f"`decay` must be in [0, 1). Received: decay={self.decay!r}"
            )
        check_positive("growth", self.growth)
        check_integer("most_powers", self.most_powers, 1)

    def build(self, add_variable: Callable[..., Any]) -> Any:
        """Returns the saved state: loss, deviation and weight, `[3]`.

        Args:
            add_variable: Creates a variable from (name, shape, initializer).
        """
        return add_variable("loss_average", (3,), "zeros")

    def is_surge(self, state: Any, loss: tf.Tensor) -> tf.Tensor:
        """Returns whether a loss is out of line with those before.

        Args:
            state: Of `build`.
            loss: Scalar, of a batch before its step.
        """
        average, deviation, weight = _debiased(state)
        loss = tf.cast(loss, average.dtype)
        threshold = (
            average
            + self.deviations * deviation
            + self.fraction * tf.abs(average)
        )
        return tf.logical_and(weight > 0, loss > threshold)

    def is_blamed(
        self, state: Any, loss: tf.Tensor, before: tf.Tensor
    ) -> tf.Tensor:
        """Returns whether a surge is the step's doing, and not the batch's.

        Near the end of training a batch with a few hard examples stands out as
        a bad step does. The step is to blame if it made up more than half
        of what the loss is above the average.

        Args:
            state: Of `build`.
            loss: Scalar, of a batch now.
            before: Scalar, of the same batch before the last step.
        """
        average, _, _ = _debiased(state)
        loss, before = (tf.cast(x, average.dtype) for x in (loss, before))
        return loss - before > 0.5 * (loss - average)

    def accept(self, state: Any, loss: tf.Tensor) -> None:
        """Takes a loss into the running average."""
        average, _, weight = _debiased(state)
        loss = tf.cast(loss, average.dtype)
        seen = weight > 0
        difference = tf.where(seen, tf.abs(loss - average), tf.zeros_like(loss))
        new = tf.stack([loss, difference, tf.ones_like(loss)])
        state.assign(self.decay * state.value + (1 - self.decay) * new)

    def raised(self, damping: tf.Tensor, surges: tf.Tensor) -> tf.Tensor:
        """Returns the damping after a step that was taken back.

        Args:
            damping: Scalar λ.
            surges: int32 scalar, steps taken back in a row, this one included.
        """
        power = tf.cast(tf.minimum(surges, self.most_powers), damping.dtype)
        return scalar(self.growth, damping.dtype) ** power * damping

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        return asdict(self)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> SurgeGuard:
        """Recreates the guard from `get_config`."""
        return cls(**config)


@dataclass(frozen=True)
class StepRejection:
    """Takes back a step that raises the loss of its own batch.

    For solvers that are exact on the batch, as trust-region methods do.

    Attributes:
        growth: Factor of the damping after a step that was taken back.
        rounding: Rise of the loss that counts as rounding, in units of the
            last place. Near the minimum the change is rounding, and says
            nothing.
    """

    growth: float = 4.0
    rounding: float = 64.0

    def is_rejected(self, change: tf.Tensor, loss: tf.Tensor) -> tf.Tensor:
        """Returns whether a step is to be taken back.

        Args:
            change: Scalar, change of the loss of the batch.
            loss: Scalar, the loss before the step.
        """
        unit = self.rounding * np.finfo(loss.dtype.as_numpy_dtype).eps
        return ~(change <= tf.constant(unit, loss.dtype) * tf.abs(loss))


def loss_before(
    objective: Callable[[], Any],
    variables: Sequence[Any],
    updates: Sequence[Any],
) -> tf.Tensor:
    """Returns a loss at the weights before the last step.

    Args:
        objective: Returns the loss at the current weights.
        variables: `keras.Variable`s, afterwards exactly as they were.
        updates: The last step, one `keras.Variable` per variable.
    """
    now = [tf.identity(variable.value) for variable in variables]
    for variable, value, update in zip(variables, now, updates, strict=True):
        step = tf.cast(tf.convert_to_tensor(update), variable.dtype)
        variable.assign(value - step)
    with tf.control_dependencies(now):
        before = tf.convert_to_tensor(objective())
    with tf.control_dependencies([before]):
        for variable, value in zip(variables, now, strict=True):
            variable.assign(value)
    return before


def _debiased(state: Any) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    total, deviation, weight = tf.unstack(tf.convert_to_tensor(state))
    safe = tf.where(weight > 0, weight, tf.ones_like(weight))
    return total / safe, deviation / safe, weight
