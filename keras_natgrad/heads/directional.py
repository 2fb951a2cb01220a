"""Directions: unit vectors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_natgrad.heads import tensors
from keras_natgrad.heads.base import Head
from keras_natgrad.heads.probability import distributions
from keras_natgrad.heads.special import sphere_ratios


@keras.saving.register_keras_serializable(package="keras_natgrad")
class VonMisesFisher(Head):
    r"""Unit vectors in d dimensions, by their natural parameter.

    The d outputs are the vector `η = κ μ`: its direction is the mean direction
    μ, its length the concentration κ. No output is redundant, and there is no
    singularity: `η = 0` is the uniform distribution. With
    `A(κ) = I_{d/2}(κ) / I_{d/2−1}(κ)` the Fisher matrix is the covariance of
    the targets,

        F = A'(κ) μ μᵀ + A(κ)/κ (I − μ μᵀ),

    and its symmetric square root is a factor. Products cost `O(d)`.

    References:
        - Mardia & Jupp, 2000.

    Example:

    >>> head = keras_natgrad.heads.VonMisesFisher()
    >>> head.fisher(tf.zeros([1, 2])).numpy().round(6)
    array([[[0.5, 0. ],
            [0. , 0.5]]], dtype=float32)
    """

    def distribution(self, outputs: tf.Tensor) -> Any:
        """Builds the `VonMisesFisher`."""
        outputs = tensors.as_parameters(outputs)
        return self._make(outputs, lambda concentration: concentration)

    def sample(self, outputs: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        """Draws one target per example; see `Head.sample()`."""
        outputs = tensors.as_parameters(outputs)
        # TFP's sampler in three dimensions divides rounding errors by κ.
        least = float(np.sqrt(np.finfo(outputs.dtype.as_numpy_dtype).eps))
        made = self._make(outputs, lambda kappa: tf.maximum(kappa, least))
        return made.sample(seed=tf.cast(seed, tf.int32))

    def log_prob(self, outputs: tf.Tensor, targets: tf.Tensor) -> tf.Tensor:
        """Computes `ηᵀ y − log Z(κ)`; see `Head.log_prob()`."""
        outputs = tensors.as_parameters(outputs)
        targets = tensors.match_targets(outputs, targets)
        # In float64: for large κ it is the difference of two large numbers.
        wide = tf.cast(outputs, tf.float64)
        along = tf.reduce_sum(wide * tf.cast(targets, tf.float64), axis=-1)
        return tf.cast(along - _log_partition(wide), outputs.dtype)

    def score(self, outputs: tf.Tensor, targets: tf.Tensor) -> tf.Tensor:
        """Computes `y − A(κ) μ`."""
        outputs = tensors.as_parameters(outputs)
        targets = tensors.match_targets(outputs, targets)
        score = tf.cast(targets, tf.float64) - _mean(
            tf.cast(outputs, tf.float64)
        )
        return tf.cast(score, outputs.dtype)

    def mean(self, outputs: tf.Tensor) -> tf.Tensor:
        """Returns the mean `A(κ) μ` of the targets."""
        outputs = tensors.as_parameters(outputs)
        return tf.cast(_mean(tf.cast(outputs, tf.float64)), outputs.dtype)

    def stddev(self, outputs: tf.Tensor) -> tf.Tensor:
        """Returns the standard deviation, the root of the diagonal of F."""
        direction, across, along = self._factor(outputs)
        variance = tf.square(across) * (1.0 - tf.square(direction))
        return tf.sqrt(variance + tf.square(along * direction))

    def fisher_factor_product(
        self, outputs: tf.Tensor, vector: tf.Tensor
    ) -> tf.Tensor:
        """Computes `√(A/κ) (v − μ μᵀ v) + √A' μ μᵀ v`."""
        direction, across, along = self._factor(outputs)
        vector = tensors.cast_like(vector, direction)
        inner = tf.reduce_sum(direction * vector, axis=-1, keepdims=True)
        return across * vector + (along - across) * direction * inner

    def fisher_factor_transpose_product(
        self, outputs: tf.Tensor, vector: tf.Tensor
    ) -> tf.Tensor:
        """Computes the same: the factor is symmetric."""
        return self.fisher_factor_product(outputs, vector)

    def natural_gradient(
        self, outputs: tf.Tensor, gradient: tf.Tensor
    ) -> tf.Tensor:
        """Computes `κ/A (g − μ μᵀ g) + μ μᵀ g / A'`."""
        direction, across, along = self._factor(outputs)
        gradient = tensors.cast_like(gradient, direction)
        inner = tf.reduce_sum(direction * gradient, axis=-1, keepdims=True)
        tangent = (gradient - direction * inner) / tf.square(across)
        return tangent + direction * inner / tf.square(along)

    def validate(self, outputs_shape: Sequence[int | None]) -> None:
        """Checks that there are at least two dimensions."""
        super().validate(outputs_shape)
        if tuple(outputs_shape)[-1] == 1:
            raise ValueError(
                "A von Mises–Fisher head needs one output per dimension, at "
                "least two; for angles use keras_natgrad.heads.VonMises(). "
                f"Received: outputs_shape={tuple(outputs_shape)}"
            )

    def targets_in_support(
        self, outputs: tf.Tensor, targets: tf.Tensor
    ) -> tf.Tensor:
        """Tells whether all targets have length one."""
        targets = tensors.match_targets(tensors.as_parameters(outputs), targets)
        length = tf.norm(targets, axis=-1)
        return tf.reduce_all(tf.abs(length - 1.0) < 1e-3)

    def describe_support(self, outputs_shape: Sequence[int | None]) -> str:
        """Says in words which targets the head accepts."""
        return "vectors of length 1; divide them by their norms"

    @staticmethod
    def _make(outputs: tf.Tensor, limit: Callable[[tf.Tensor], Any]) -> Any:
        direction, kappa = _polar(outputs)
        # The uniform distribution takes any direction.
        first = tf.one_hot(0, outputs.shape[-1], dtype=outputs.dtype)
        direction = tf.where(kappa > 0, direction, first)
        return distributions().VonMisesFisher(direction, limit(kappa[..., 0]))

    @staticmethod
    def _factor(
        outputs: tf.Tensor,
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """Returns μ and the roots of the eigenvalues across and along it."""
        outputs = tensors.as_parameters(outputs)
        direction, kappa = _polar(tf.cast(outputs, tf.float64))
        across, along = sphere_ratios(kappa, int(outputs.shape[-1]))
        return (
            tf.cast(direction, outputs.dtype),
            tf.cast(tf.sqrt(across), outputs.dtype),
            tf.cast(tf.sqrt(along), outputs.dtype),
        )


def _polar(outputs: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns the direction, zero for zero outputs, and the length."""
    largest = tf.reduce_max(tf.abs(outputs), axis=-1, keepdims=True)
    # Squares of large or small outputs must not overflow or vanish.
    scaled = tf.math.divide_no_nan(outputs, largest)
    length = tf.norm(scaled, axis=-1, keepdims=True)
    return tf.math.divide_no_nan(scaled, length), largest * length


def _mean(outputs: tf.Tensor) -> tf.Tensor:
    """Returns `A(κ) μ` from float64 outputs."""
    _, kappa = _polar(outputs)
    across, _ = sphere_ratios(kappa, int(outputs.shape[-1]))
    return across * outputs


@tf.custom_gradient
def _log_partition(outputs: tf.Tensor) -> tuple[tf.Tensor, Any]:
    """Returns `log Z(κ)`, whose gradient is the mean."""
    # Tapes see inside a custom gradient, and XLA does not compile the gradient
    # of TFP's loops.
    kappa = tf.stop_gradient(_polar(outputs)[1][..., 0])
    # log Z(κ) − log Z(0) = κ²/2d + …, below rounding there.
    kappa = tf.maximum(kappa, 1e-9)
    origin = tf.zeros_like(outputs)
    value = -distributions().VonMisesFisher(origin, kappa).log_prob(origin)

    def gradient(upstream: tf.Tensor) -> tf.Tensor:
        return upstream[..., tf.newaxis] * _mean(outputs)

    return value, gradient
