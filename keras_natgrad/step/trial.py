"""A step that is tried out before it is kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf


class TrialStep:
    """Steps `θ − α φ` of any length α from where the weights are now.

    Args:
        variables: `keras.Variable`s.
        direction: φ, one tensor per variable.
        objective: Returns the loss at the current weights, or `None`.
    """

    def __init__(
        self,
        variables: Sequence[Any],
        direction: Sequence[tf.Tensor],
        objective: Callable[[], Any] | None,
    ) -> None:
        self._variables = list(variables)
        self._before = [tf.identity(v.value) for v in self._variables]
        self._direction = list(direction)
        self._objective = objective

    def place(self, rate: tf.Tensor) -> None:
        """Sets the weights to `θ − α φ`."""
        for variable, value, part in zip(
            self._variables, self._before, self._direction, strict=True
        ):
            step = tf.cast(rate, part.dtype) * part
            variable.assign(value - tf.cast(step, value.dtype))

    def evaluate(self, rate: tf.Tensor) -> tf.Tensor:
        """Returns the loss at `θ − α φ`, and leaves the weights there."""
        assert self._objective is not None
        self.place(rate)
        return tf.cast(self._objective(), rate.dtype)

    def take_back(self, when: tf.Tensor) -> None:
        """Restores the weights, where a scalar bool says so."""
        for variable, value in zip(self._variables, self._before, strict=True):
            variable.assign(tf.where(when, value, variable.value))
