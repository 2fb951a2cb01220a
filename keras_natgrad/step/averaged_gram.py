"""The running average of the quadratic model's curvature."""

from __future__ import annotations

from dataclasses import replace

import tensorflow as tf

from keras_natgrad.linalg import scalar
from keras_natgrad.step.quadratic import QuadraticModel
from keras_natgrad.step.refresh import Refresh
from keras_natgrad.step.state import StateFactory


class AveragedGram:
    """The saved running average of the quotients.

    Args:
        model: `QuadraticModel`.
        refresh: `Refresh`, for its warm-up.
        factory: `StateFactory`.
        size: Number of directions.
        name: Prefix of the names of the variables.
    """

    def __init__(
        self,
        model: QuadraticModel,
        refresh: Refresh,
        factory: StateFactory,
        size: int = 2,
        name: str = "quotient",
    ) -> None:
        self.model = model
        self._refresh = refresh
        # Of δᵀFδ, every replica knows its examples' part.
        self._quotients = factory.add_sum(f"{name}s", (size, size), "zeros")
        # A quotient of a direction that was zero has not been seen: each has
        # a weight of its own.
        self._weights = factory.add(f"{name}_weights", (size, size), "zeros")
        self._due_at = factory.add_integer(f"{name}_at", ())

    def is_due(self, step: tf.Tensor) -> tf.Tensor:
        """Returns whether the curvature is computed at this step."""
        return self._refresh.is_due(step, self._due_at.value)

    def add(
        self,
        gram: tf.Tensor,
        norms: tf.Tensor,
        step: tf.Tensor,
        few: tf.Tensor | bool = False,
    ) -> None:
        """Averages in what one batch says.

        Args:
            gram: Tensor `[size, size]`, Q.
            norms: Tensor `[size]`, the n_i, zero for a direction of zero.
            step: Scalar integer, counted from zero.
            few: Whether the batch has few examples.
        """
        scale = tf.math.reciprocal_no_nan(norms)
        decay = self._decay(step, gram.dtype)
        old, weights = self._quotients.value, self._weights.value
        new = gram * scale * scale[:, tf.newaxis]
        seen = (scale * scale[:, tf.newaxis]) > 0
        # What is not finite would stay in the average.
        seen &= tf.math.is_finite(new)
        self._quotients.assign(
            tf.where(seen, decay * old + (1 - decay) * new, old)
        )
        self._weights.assign(
            tf.where(seen, decay * weights + (1 - decay), weights)
        )
        self._due_at.assign(self._next_due(step, few))

    def read(self, norms: tf.Tensor) -> tf.Tensor:
        """Returns Q for directions of these norms, this replica's part."""
        mean = tf.math.divide_no_nan(self._quotients.value, self._weights.value)
        return mean * norms * norms[:, tf.newaxis]

    def _next_due(self, step: tf.Tensor, few: tf.Tensor | bool) -> tf.Tensor:
        refresh, period = self._refresh, self.model.period
        if refresh.growth is None:
            return refresh.next_due(step, period)
        gaps = (self.model.longest_gap_of_few, self.model.longest_gap)
        early, late = (
            replace(refresh, growth=min(refresh.growth, gap)).next_due(
                step, period
            )
            for gap in gaps
        )
        return tf.where(few, early, late)

    def _decay(self, step: tf.Tensor, dtype: tf.DType) -> tf.Tensor:
        updates = tf.cast(step, dtype) / scalar(self.model.period, dtype)
        span = tf.maximum(scalar(self.model.span, dtype) * updates, 1)
        return tf.minimum(1 - 1 / span, scalar(self.model.decay, dtype))
