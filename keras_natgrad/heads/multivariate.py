"""Heads whose outputs parametrise one multivariate distribution."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_natgrad.checks import check_integer
from keras_natgrad.heads import softmax, tensors
from keras_natgrad.heads.base import Head
from keras_natgrad.heads.links import get_link, link_config
from keras_natgrad.heads.probability import distributions, mathematics


@keras.saving.register_keras_serializable(package="keras_natgrad")
class MultivariateNormalTriL(Head):
    r"""Normal targets in d dimensions with a full covariance.

    The outputs are the mean, then the `d (d + 1) / 2` entries of a lower
    triangle in the order of `tfp.math.fill_triangular`; the link makes the
    diagonal of the scale T positive, covariance `T Tᵀ`. The Fisher matrix is

        loc: T⁻ᵀ T⁻¹,    dT: 2 Σ_i E_ii² + Σ_{i>j} E_ij²,  E = T⁻¹ dT,

    and the two do not interact. A product costs `d³` per example.

    Args:
        diagonal: Link of the diagonal of T. Defaults to `"softplus"`.

    Raises:
        ValueError: If `diagonal` is not a link for positive parameters.
    """

    def __init__(self, diagonal: Any = "softplus") -> None:
        self._link = get_link(diagonal, "diagonal", "positive")

    def distribution(self, outputs: tf.Tensor) -> Any:
        """Builds the `MultivariateNormalTriL`."""
        outputs = tensors.as_parameters(outputs)
        loc, scale, _ = self._parameters(outputs)
        return distributions().MultivariateNormalTriL(loc, scale)

    def log_prob(self, outputs: tf.Tensor, targets: tf.Tensor) -> tf.Tensor:
        """Computes the log-density; see `Head.log_prob()`."""
        outputs = tensors.as_parameters(outputs)
        loc, scale, _ = self._parameters(outputs)
        residual = tensors.match_targets(loc, targets) - loc
        white = tf.linalg.triangular_solve(scale, residual[..., tf.newaxis])
        log_diagonal = tf.math.log(tf.linalg.diag_part(scale))
        return -tf.reduce_sum(
            0.5 * tf.square(white[..., 0])
            + log_diagonal
            + 0.5 * math.log(2.0 * math.pi),
            axis=-1,
        )

    def fisher_factor_product(
        self, outputs: tf.Tensor, vector: tf.Tensor
    ) -> tf.Tensor:
        """Solves with `Tᵀ`, then goes back through the triangle."""
        outputs = tensors.as_parameters(outputs)
        loc, scale, slope = self._parameters(outputs)
        first, rest = self._split(tensors.cast_like(vector, outputs))
        scale = _broadcast(scale, first)
        matrix = _fill_triangular(rest)
        matrix += (math.sqrt(2.0) - 1.0) * _diagonal_of(matrix)
        both = tf.concat([first[..., tf.newaxis], matrix], axis=-1)
        solved = tf.linalg.triangular_solve(scale, both, adjoint=True)
        gradient = _scale_diagonal(solved[..., 1:], slope)
        return tf.concat([solved[..., 0], _take_triangular(gradient)], axis=-1)

    def fisher_factor_transpose_product(
        self, outputs: tf.Tensor, vector: tf.Tensor
    ) -> tf.Tensor:
        """Solves with `T`; the diagonal of `T⁻¹ dT` counts √2 times."""
        outputs = tensors.as_parameters(outputs)
        loc, scale, slope = self._parameters(outputs)
        first, rest = self._split(tensors.cast_like(vector, outputs))
        scale = _broadcast(scale, first)
        change = _scale_diagonal(_fill_triangular(rest), slope)
        both = tf.concat([first[..., tf.newaxis], change], axis=-1)
        solved = tf.linalg.triangular_solve(scale, both)
        matrix = solved[..., 1:]
        matrix += (math.sqrt(2.0) - 1.0) * _diagonal_of(matrix)
        return tf.concat([solved[..., 0], _take_triangular(matrix)], axis=-1)

    def validate(self, outputs_shape: Sequence[int | None]) -> None:
        """Checks that the outputs are d means and a triangle."""
        super().validate(outputs_shape)
        size = tuple(outputs_shape)[-1]
        if size is not None and size != _parameter_count(_dimension(size)):
            sizes = [_parameter_count(d) for d in range(1, 6)]
            raise ValueError(
                f"The head {self!r} takes d + d (d + 1) / 2 outputs for d "
                f"dimensions: one of {sizes} … Received: "
                f"outputs_shape={tuple(outputs_shape)}"
            )

    def targets_in_support(
        self, outputs: tf.Tensor, targets: tf.Tensor
    ) -> tf.Tensor:
        """Tells whether all targets are finite numbers."""
        loc, _ = self._split(tensors.as_parameters(outputs))
        targets = tensors.match_targets(loc, targets)
        return tf.reduce_all(tf.math.is_finite(targets))

    def describe_support(self, outputs_shape: Sequence[int | None]) -> str:
        """Says in words which targets the head accepts."""
        return "finite numbers; remove or mask missing values"

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments of the constructor."""
        return {"diagonal": link_config(self._link)}

    def _split(self, tensor: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        dimension = _dimension(tensor.shape[-1])
        return tensor[..., :dimension], tensor[..., dimension:]

    def _parameters(
        self, outputs: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """Returns loc, T, and the derivative of its diagonal."""
        loc, rest = self._split(outputs)
        raw = _fill_triangular(rest)
        diagonal = tf.linalg.diag_part(raw)
        value = self._link.value(diagonal)
        slope = value * self._link.slope(diagonal)
        return loc, tf.linalg.set_diag(raw, value), slope


@keras.saving.register_keras_serializable(package="keras_natgrad")
class Multinomial(Head):
    """Counts of `K` classes in a fixed number of draws, from logits.

    The Fisher matrix is n times that of one draw: `F = n (diag(p) − p pᵀ)`,
    `p = softmax(outputs)`. Products cost `O(K)`.

    Args:
        total_count: Positive number of draws n.

    Raises:
        ValueError: If `total_count` is not positive.
    """

    def __init__(self, total_count: float) -> None:
        self.total_count = float(check_integer("total_count", total_count))

    def distribution(self, outputs: tf.Tensor) -> Any:
        """Builds the `Multinomial` distribution."""
        logits = tensors.as_parameters(outputs)
        count = tf.constant(self.total_count, logits.dtype)
        return distributions().Multinomial(count, logits=logits)

    def log_prob(self, outputs: tf.Tensor, targets: tf.Tensor) -> tf.Tensor:
        """Computes the log-probability; see `Head.log_prob()`."""
        outputs = tensors.as_parameters(outputs)
        targets = tensors.match_targets(outputs, targets)
        return self.distribution(outputs).log_prob(targets)

    def fisher_factor_product(
        self, outputs: tf.Tensor, vector: tf.Tensor
    ) -> tf.Tensor:
        """Computes `√n (√p v − p (√pᵀ v))`."""
        logits = tensors.as_parameters(outputs)
        product = softmax.factor_product(logits, vector)
        return self.total_count**0.5 * product

    def fisher_factor_transpose_product(
        self, outputs: tf.Tensor, vector: tf.Tensor
    ) -> tf.Tensor:
        """Computes `√(n p) (v − pᵀ v)`."""
        logits = tensors.as_parameters(outputs)
        product = softmax.factor_transpose_product(logits, vector)
        return self.total_count**0.5 * product

    def targets_in_support(
        self, outputs: tf.Tensor, targets: tf.Tensor
    ) -> tf.Tensor:
        """Tells whether all targets are counts with the right total."""
        targets = tensors.match_targets(tensors.as_parameters(outputs), targets)
        return tensors.are_counts(targets, self.total_count)

    def describe_support(self, outputs_shape: Sequence[int | None]) -> str:
        """Says in words which targets the head accepts."""
        return f"counts per class that sum to {self.total_count:g}"

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments of the constructor."""
        return {"total_count": self.total_count}


def _dimension(size: int) -> int:
    """Returns the largest d with `d + d (d + 1) / 2 ≤ size`."""
    return int((math.isqrt(8 * size + 9) - 3) // 2)


def _parameter_count(dimension: int) -> int:
    return dimension + dimension * (dimension + 1) // 2


def _fill_triangular(entries: tf.Tensor) -> tf.Tensor:
    """Returns the lower triangular matrices of `[..., d (d + 1) / 2]`."""
    return mathematics().fill_triangular(entries)


def _take_triangular(matrix: tf.Tensor) -> tf.Tensor:
    """Returns the entries of the lower triangle, the inverse of filling."""
    return mathematics().fill_triangular_inverse(
        tf.linalg.band_part(matrix, -1, 0)
    )


def _diagonal_of(matrix: tf.Tensor) -> tf.Tensor:
    return tf.linalg.diag(tf.linalg.diag_part(matrix))


def _scale_diagonal(matrix: tf.Tensor, slope: tf.Tensor) -> tf.Tensor:
    return tf.linalg.set_diag(matrix, tf.linalg.diag_part(matrix) * slope)


def _broadcast(scale: tf.Tensor, vector: tf.Tensor) -> tf.Tensor:
    """Repeats T over the leading axes that only the vectors have."""
    leading = tf.broadcast_dynamic_shape(
        tf.shape(scale)[:-2], tf.shape(vector)[:-1]
    )
    shape = tf.concat([leading, tf.shape(scale)[-2:]], axis=0)
    return tf.broadcast_to(scale, shape)
