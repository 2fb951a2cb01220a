"""The factors of a Kronecker product: dense, diagonal or scalar."""

from __future__ import annotations

import abc
import math

import keras
import tensorflow as tf
from typing_extensions import override

from keras_natgrad.linalg import (
    DampedInverse,
    Rows,
    StructuredRows,
    damped_inverse,
    trace_norm_ratio,
)


def make_factor(
    lead: tuple[int, ...], size: int, bound: int, used: bool = True
) -> Factor:
    """Returns a dense, a diagonal or, where it is not used, a scalar factor.

    Args:
        lead: The axis of groups, if any: one factor for each.
        size: Its side.
        bound: Largest side of a dense one.
        used: Whether it is more than a multiple of the identity.
    """
    if not used:
        return ScalarFactor(lead, size)
    if size <= bound:
        return DenseFactor(lead, size)
    return DiagonalFactor(lead, size)


class Factor(abc.ABC):
    """One side of a Kronecker product: its average and its inverse.

    Args:
        lead: The axis of groups, if any: one factor for each.
        size: Side of the factor.
    """

    average: keras.Variable
    inverse: keras.Variable

    def __init__(self, lead: tuple[int, ...], size: int) -> None:
        self.lead = lead
        self.size = size

    @property
    def groups(self) -> int:
        """Number of factors."""
        return math.prod(self.lead)

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Shape of the average and of the inverse."""

    @property
    def elements(self) -> int:
        """Number of elements of the average, and of the inverse."""
        return math.prod(self.shape)

    @abc.abstractmethod
    def second_moment(self, vectors: Rows) -> tf.Tensor:
        """Returns the sum of outer products of `[..., batch, shared, size]`."""

    @abc.abstractmethod
    def trace(self, average: tf.Tensor) -> tf.Tensor:
        """Returns the trace of the factor, one per group."""

    @abc.abstractmethod
    def invert(self, average: tf.Tensor, damping: tf.Tensor) -> DampedInverse:
        """Returns the damped inverse of the factor."""

    def store(self, inverse: tf.Tensor, succeeded: tf.Tensor) -> None:
        """Keeps an inverse, if it is a good one."""
        self.inverse.assign(tf.where(succeeded, inverse, self.inverse.value))

    @abc.abstractmethod
    def apply_left(self, matrix: tf.Tensor) -> tf.Tensor:
        """Returns the inverse times a matrix."""

    @abc.abstractmethod
    def apply_right(self, matrix: tf.Tensor) -> tf.Tensor:
        """Returns a matrix times the inverse."""

    @abc.abstractmethod
    def operator(self, average: tf.Tensor) -> tf.linalg.LinearOperator:
        """Returns the undamped factor as an operator."""

    @property
    def spectrum_side(self) -> int:
        """Side of the matrix that `eigenvalues` decomposes."""
        return 1

    @abc.abstractmethod
    def eigenvalues(self, values: tf.Tensor) -> tf.Tensor:
        """Returns the eigenvalues `[..., size]` of an average or inverse."""

    @abc.abstractmethod
    def describe(self) -> str:
        """Returns the factor in a few characters."""


class DenseFactor(Factor):
    """A whole matrix."""

    @override
    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.lead, self.size, self.size)

    @override
    def second_moment(self, vectors: Rows) -> tf.Tensor:
        if isinstance(vectors, StructuredRows):
            return vectors.second_moment()
        flat = tf.reshape(vectors, [*self.lead, -1, self.size])
        return tf.matmul(flat, flat, transpose_a=True)

    @override
    def trace(self, average: tf.Tensor) -> tf.Tensor:
        return tf.linalg.trace(average)

    @override
    def invert(self, average: tf.Tensor, damping: tf.Tensor) -> DampedInverse:
        return damped_inverse(average, damping)

    @override
    def apply_left(self, matrix: tf.Tensor) -> tf.Tensor:
        return tf.matmul(self.inverse.value, matrix)

    @override
    def apply_right(self, matrix: tf.Tensor) -> tf.Tensor:
        return tf.matmul(matrix, self.inverse.value)

    @override
    def operator(self, average: tf.Tensor) -> tf.linalg.LinearOperator:
        return tf.linalg.LinearOperatorFullMatrix(average, is_self_adjoint=True)

    @override
    @property
    def spectrum_side(self) -> int:
        return self.size

    @override
    def eigenvalues(self, values: tf.Tensor) -> tf.Tensor:
        return tf.linalg.eigvalsh(values)

    @override
    def describe(self) -> str:
        return f"{self.size}²"


class DiagonalFactor(Factor):
    """The diagonal of the true factor."""

    @override
    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.lead, self.size)

    @override
    def second_moment(self, vectors: Rows) -> tf.Tensor:
        if isinstance(vectors, StructuredRows):
            return vectors.squares()
        return tf.reduce_sum(tf.square(vectors), axis=[-3, -2])

    @override
    def trace(self, average: tf.Tensor) -> tf.Tensor:
        return tf.reduce_sum(average, axis=-1)

    @override
    def invert(self, average: tf.Tensor, damping: tf.Tensor) -> DampedInverse:
        return _reciprocal(average + damping[..., tf.newaxis])

    @override
    def apply_left(self, matrix: tf.Tensor) -> tf.Tensor:
        return self.inverse.value[..., tf.newaxis] * matrix

    @override
    def apply_right(self, matrix: tf.Tensor) -> tf.Tensor:
        return matrix * self.inverse.value[..., tf.newaxis, :]

    @override
    def operator(self, average: tf.Tensor) -> tf.linalg.LinearOperator:
        return tf.linalg.LinearOperatorDiag(average, is_self_adjoint=True)

    @override
    def eigenvalues(self, values: tf.Tensor) -> tf.Tensor:
        return tf.identity(values)

    @override
    def describe(self) -> str:
        return f"diag {self.size}"


class ScalarFactor(Factor):
    """A multiple of the identity with the trace of the true factor."""

    @override
    @property
    def shape(self) -> tuple[int, ...]:
        return self.lead

    @override
    def second_moment(self, vectors: Rows) -> tf.Tensor:
        if isinstance(vectors, StructuredRows):
            return tf.reduce_mean(vectors.squares(), axis=-1)
        squares = tf.reduce_sum(tf.square(vectors), axis=[-3, -2, -1])
        return squares / self.size

    @override
    def trace(self, average: tf.Tensor) -> tf.Tensor:
        return self.size * average

    @override
    def invert(self, average: tf.Tensor, damping: tf.Tensor) -> DampedInverse:
        return _reciprocal(average + damping)

    @override
    def apply_left(self, matrix: tf.Tensor) -> tf.Tensor:
        return self.inverse.value[..., tf.newaxis, tf.newaxis] * matrix

    @override
    def apply_right(self, matrix: tf.Tensor) -> tf.Tensor:
        return self.apply_left(matrix)

    @override
    def operator(self, average: tf.Tensor) -> tf.linalg.LinearOperator:
        return tf.linalg.LinearOperatorScaledIdentity(self.size, average)

    @override
    def eigenvalues(self, values: tf.Tensor) -> tf.Tensor:
        return tf.repeat(values[..., tf.newaxis], self.size, axis=-1)

    @override
    def describe(self) -> str:
        return f"scalar {self.size}"


def refresh_pair(
    factors: tuple[Factor, Factor],
    averages: tuple[tf.Tensor, tf.Tensor],
    damping: tf.Tensor,
    ratio: tf.Tensor | None,
) -> tuple[tf.Tensor, tf.Tensor]:
    """Recomputes the inverses `(A + π√λ I)⁻¹` and `(G + √λ/π I)⁻¹`.

    Args:
        factors: The input and the output side.
        averages: A and G.
        damping: Scalar λ.
        ratio: π; that of the trace norms where it is `None`.

    Returns:
        Raised dampings and failed pairs, int32 scalars.
    """
    left, right = factors
    first_average, second_average = averages
    if ratio is None:
        ratio = trace_norm_ratio(
            left.trace(first_average) / left.size,
            right.trace(second_average) / right.size,
        )
    root = tf.sqrt(tf.cast(damping, first_average.dtype))
    first = left.invert(first_average, ratio * root)
    second = right.invert(second_average, root / ratio)
    # Both factors or neither: one half of a stale pair fits no λ.
    succeeded = first.succeeded & second.succeeded
    left.store(first.inverse, succeeded)
    right.store(second.inverse, succeeded)
    return first.retries + second.retries, tf.cast(~succeeded, tf.int32)


def _reciprocal(values: tf.Tensor) -> DampedInverse:
    inverse = tf.math.reciprocal(values)
    finite = tf.math.is_finite(tf.reduce_sum(inverse))
    return DampedInverse(inverse, tf.constant(0, tf.int32), finite)
