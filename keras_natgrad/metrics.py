"""Metrics of predicted distributions."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_natgrad import heads
from keras_natgrad.checks import check_integer

__all__ = ["CalibrationError", "NegativeLogLikelihood"]


# The loss of the same name already has that registered name.
@keras.saving.register_keras_serializable(
    package="keras_natgrad", name="NegativeLogLikelihoodMetric"
)
class NegativeLogLikelihood(keras.metrics.Mean):
    """Mean negative log-likelihood of the targets under a head.

    Args:
        head: A `keras_natgrad.heads.Head`, or what `heads.get()` accepts.
        name: Name of the metric.
        dtype: Dtype of the metric's result.

    Example:

    ```python
    metric = keras_natgrad.metrics.NegativeLogLikelihood(head)
    model.compile(optimizer, loss, metrics=[metric])
    ```
    """

    def __init__(
        self,
        head: Any,
        name: str = "negative_log_likelihood",
        dtype: Any = None,
    ) -> None:
        super().__init__(name=name, dtype=dtype)
        self.head = heads.get(head)
        self._direction = "down"

    def update_state(
        self, y_true: Any, y_pred: Any, sample_weight: Any = None
    ) -> None:
        """Adds a batch.

        Args:
            y_true: Targets.
            y_pred: Outputs of the model, `[..., K]`.
            sample_weight: Weights, broadcastable to `[...]`.
        """
        y_pred = tf.convert_to_tensor(y_pred)
        self.head.validate(y_pred.shape)
        values = -self.head.log_prob(y_pred, y_true)
        super().update_state(values, sample_weight)

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments of the constructor."""
        head = keras.saving.serialize_keras_object(self.head)
        return {"head": head, "name": self.name, "dtype": self.dtype}


@keras.saving.register_keras_serializable(package="keras_natgrad")
class CalibrationError(keras.metrics.Metric):
    """How far predicted distributions are from calibrated, over all levels.

    A share q of the targets should lie below the predicted quantile of level q.
    The error is the mean absolute difference between both shares over equally
    spaced levels: 0 for a calibrated model, at most ½.

    Args:
        head: A head of continuous targets with a distribution function: a
            `keras_natgrad.heads.Family` or `NormalMixture`.
        levels: Number of levels between 0 and 1. Defaults to `19`.
        name: Name of the metric.
        dtype: Dtype of the metric's result.

    Raises:
        ValueError: If the head has no distribution function of real targets, or
            `levels` is not a positive integer; when called, if the number of
            outputs does not fit the head.

    References:
        - Kuleshov, Fenner & Ermon, 2018, arXiv:1807.00263.
    """

    def __init__(
        self,
        head: Any,
        levels: int = 19,
        name: str = "calibration_error",
        dtype: Any = None,
    ) -> None:
        super().__init__(name=name, dtype=dtype)
        self.head: Any = heads.get(head)
        counts = getattr(self.head, "target_support", None) == "count"
        if counts or not hasattr(self.head, "cdf"):
            raise ValueError(
                "`CalibrationError` needs a head of continuous targets with a "
                "distribution function, a keras_natgrad.heads.Family or "
                f"NormalMixture. Received: head={self.head!r}"
            )
        self.levels = check_integer("levels", levels)
        self._below = self.add_variable((self.levels,), "zeros", name="below")
        self._total = self.add_variable((), "zeros", name="total")
        self._direction = "down"

    def update_state(
        self, y_true: Any, y_pred: Any, sample_weight: Any = None
    ) -> None:
        """Adds a batch.

        Args:
            y_true: Targets, `[..., D]`.
            y_pred: Outputs of the model, `[..., K]`.
            sample_weight: Weights, `[...]`.
        """
        y_pred = tf.convert_to_tensor(y_pred)
        self.head.validate(y_pred.shape)
        below = self.head.cdf(y_pred, y_true)
        if below.shape.rank < y_pred.shape.rank:  # One target per example.
            below = below[..., tf.newaxis]
        weights = tf.ones_like(below)
        if sample_weight is not None:
            sample_weight = tf.cast(sample_weight, below.dtype)
            weights *= tf.reshape(
                sample_weight, tf.concat([tf.shape(below)[:-1], [1]], 0)
            )
        levels = self._levels(below.dtype)
        inside = tf.cast(below[..., tf.newaxis] <= levels, below.dtype)
        count = tf.linalg.matvec(
            tf.reshape(inside, [-1, self.levels]),
            tf.reshape(weights, [-1]),
            transpose_a=True,
        )
        self._below.assign_add(tf.cast(count, self._below.dtype))
        self._total.assign_add(
            tf.cast(tf.reduce_sum(weights), self._total.dtype)
        )

    def result(self) -> tf.Tensor:
        """Returns the error, zero before the first batch."""
        share = tf.math.divide_no_nan(
            tf.convert_to_tensor(self._below), tf.convert_to_tensor(self._total)
        )
        error = tf.reduce_mean(tf.abs(share - self._levels(share.dtype)))
        seen = tf.convert_to_tensor(self._total) > 0
        return tf.where(seen, error, tf.zeros_like(error))

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments of the constructor."""
        return {
            "head": keras.saving.serialize_keras_object(self.head),
            "levels": self.levels,
            "name": self.name,
            "dtype": self.dtype,
        }

    def _levels(self, dtype: tf.DType) -> tf.Tensor:
        return tf.constant(
            np.arange(1, self.levels + 1) / (self.levels + 1), dtype
        )
