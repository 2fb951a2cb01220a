"""Normal distribution of fixed scale: least squares."""

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_natgrad.heads import tensors
from keras_natgrad.heads.base import Head
from keras_natgrad.heads.probability import distributions


@keras.saving.register_keras_serializable(package="keras_natgrad")
class Normal(Head):
    """Independent normal targets whose means are the outputs.

    The scale is fixed, the same for all `K` units, so the Fisher matrix is
    `F = I / scale²`, with the factor `L = I / scale`.

    Args:
        scale: Positive float, the standard deviation of the targets. The mean
            squared error is the negative log-likelihood for `scale=√½`.
            Defaults to `1.0`.

    Raises:
        ValueError: If `scale` is not positive and finite.

    Example:

    >>> head = keras_natgrad.heads.Normal(scale=0.5)
    >>> outputs = tf.constant([[1.0, 2.0]])
    >>> head.fisher(outputs).numpy()
    array([[[4., 0.],
            [0., 4.]]], dtype=float32)
    """

    def __init__(self, scale: float = 1.0) -> None:
        if not 0.0 < scale < float("inf"):
            raise ValueError(
                "`scale` must be a positive, finite number, such as 1.0. "
                f"Received: scale={scale}"
            )
        self.scale = float(scale)

    def distribution(self, outputs: tf.Tensor) -> Any:
        """Builds the `Independent(Normal)` distribution of shape `[..., K]`."""
        tfd = distributions()
        mean = tensors.as_parameters(outputs)
        scale = tf.constant(self.scale, mean.dtype)
        return tfd.Independent(tfd.Normal(mean, scale), 1)

    def log_prob(self, outputs: tf.Tensor, targets: tf.Tensor) -> tf.Tensor:
        """Computes the log-density; see `Head.log_prob()`."""
        mean = tensors.as_parameters(outputs)
        residual = tensors.match_targets(mean, targets) - mean
        constant = np.log(self.scale) + 0.5 * np.log(2.0 * np.pi)
        return -tf.reduce_sum(
            0.5 * tf.square(residual / self.scale) + constant, axis=-1
        )

    def score(self, outputs: tf.Tensor, targets: tf.Tensor) -> tf.Tensor:
        """Computes `(y - mean) / scale²`; see `Head.score()`."""
        mean = tensors.as_parameters(outputs)
        residual = tensors.match_targets(mean, targets) - mean
        return residual / self.scale**2

    def fisher_factor_product(
        self, outputs: tf.Tensor, vector: tf.Tensor
    ) -> tf.Tensor:
        """Computes `v / scale`; see `Head.fisher_factor_product()`."""
        return self._divide(outputs, vector, self.scale)

    def fisher_factor_transpose_product(
        self, outputs: tf.Tensor, vector: tf.Tensor
    ) -> tf.Tensor:
        """Computes `v / scale`; the factor is symmetric."""
        return self._divide(outputs, vector, self.scale)

    def fisher_vector_product(
        self, outputs: tf.Tensor, vector: tf.Tensor
    ) -> tf.Tensor:
        """Computes `v / scale²`; see `Head.fisher_vector_product()`."""
        return self._divide(outputs, vector, self.scale**2)

    def natural_gradient(
        self, outputs: tf.Tensor, gradient: tf.Tensor
    ) -> tf.Tensor:
        """Computes `scale² g`; see `Head.natural_gradient()`."""
        return self._divide(outputs, gradient, self.scale**-2)

    def targets_in_support(
        self, outputs: tf.Tensor, targets: tf.Tensor
    ) -> tf.Tensor:
        """Tells whether all targets are finite numbers."""
        targets = tensors.match_targets(tensors.as_parameters(outputs), targets)
        return tf.reduce_all(tf.math.is_finite(targets))

    def describe_support(self, outputs_shape: Sequence[int | None]) -> str:
        """Says in words which targets the head accepts."""
        return "finite numbers; remove or mask missing values"

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments of the constructor."""
        return {"scale": self.scale}

    @staticmethod
    def _divide(
        outputs: tf.Tensor, vector: tf.Tensor, divisor: float
    ) -> tf.Tensor:
        return tensors.cast_like(vector, tensors.as_parameters(outputs)) / (
            divisor
        )
