"""The factors of a Kronecker product: dense or diagonal."""

from __future__ import annotations

import abc
from typing import Any, NamedTuple

import tensorflow as tf
from typing_extensions import override

from keras_natgrad.blocks.base import Block
from keras_natgrad.blocks.state import count_failures, keep_good
from keras_natgrad.linalg import (
    DampedInverse,
    Rows,
    StructuredRows,
    damped_inverse,
    diagonal_of,
    expand_to,
    trace_norm_ratio,
)


def make_factor(block: Block, size: int, bound: int) -> Factor:
    """Returns a dense or a diagonal factor of a bound block.

    Args:
        block: The block; it has a factor for each layer and group.
        size: The factor's side.
        bound: Largest side of a dense one.
    """
    kind = DenseFactor if size <= bound else DiagonalFactor
    return kind(block, size)


class Factor(abc.ABC):
    """One side of a Kronecker product: its average and its inverse.

    Args:
        block: The block; it has a factor for each layer and group.
        size: Side of the factor.
    """

    average: Any
    inverse: Any

    def __init__(self, block: Block, size: int) -> None:
        self.lead = block.lead
        #: Number of factors of a layer.
        self.groups = block.shape.groups or 1
        self.size = size
        # How many of the first axes count layers.
        self._units = len(block.axis)

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Shape of the average and of the inverse."""

    @abc.abstractmethod
    def second_moment(self, vectors: Rows) -> tf.Tensor:
        """Returns the sum of outer products of one layer's vectors.

        Args:
            vectors: `[(groups,) batch, shared, size]`, or `StructuredRows`.
        """

    @abc.abstractmethod
    def trace(self, average: tf.Tensor) -> tf.Tensor:
        """Returns the trace of the factor, of each layer and group."""

    @abc.abstractmethod
    def invert(self, average: tf.Tensor, damping: tf.Tensor) -> DampedInverse:
        """Returns the damped inverse of the factor."""

    def store(self, inverse: tf.Tensor, succeeded: tf.Tensor) -> None:
        """Keeps the inverses of the layers for which they are good."""
        keep_good(self.inverse, inverse, succeeded)

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
        groups = self.lead[self._units :]
        flat = tf.reshape(vectors, [*groups, -1, self.size])
        return tf.matmul(flat, flat, transpose_a=True)

    @override
    def trace(self, average: tf.Tensor) -> tf.Tensor:
        return tf.reduce_sum(diagonal_of(average), axis=-1)

    @override
    def invert(self, average: tf.Tensor, damping: tf.Tensor) -> DampedInverse:
        return damped_inverse(average, damping, self._units)

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
        inverse = tf.math.reciprocal(average + damping[..., tf.newaxis])
        axes = list(range(self._units, inverse.shape.rank))
        finite = tf.math.is_finite(tf.reduce_sum(inverse, axis=axes))
        return DampedInverse(inverse, tf.constant(0, tf.int32), finite)

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


class InversePair(NamedTuple):
    """The damped inverses of a Kronecker product's factors.

    Attributes:
        left: Of the input side.
        right: Of the output side.
        retries: Raised dampings, int32 scalar.
        succeeded: Bool, of every layer: both are good.
    """

    left: tf.Tensor
    right: tf.Tensor
    retries: tf.Tensor
    succeeded: tf.Tensor


def invert_pair(
    factors: tuple[Factor, Factor],
    averages: tuple[tf.Tensor, tf.Tensor],
    damping: tf.Tensor,
    ratio: tf.Tensor | None,
) -> InversePair:
    """Returns the inverses `(A + π√λ I)⁻¹` and `(G + √λ/π I)⁻¹`.

    Args:
        factors: The input and the output side.
        averages: A and G.
        damping: λ, a scalar or one per layer.
        ratio: Scalar π; that of the trace norms where it is `None`.
    """
    left, right = factors
    first_average, second_average = averages
    if ratio is None:
        ratio = trace_norm_ratio(
            left.trace(first_average) / left.size,
            right.trace(second_average) / right.size,
        )
    # One λ per layer, for all groups of it.
    root = tf.sqrt(tf.cast(damping, first_average.dtype))
    root = expand_to(root, len(left.lead))
    first = left.invert(first_average, ratio * root)
    second = right.invert(second_average, root / ratio)
    return InversePair(
        first.inverse,
        second.inverse,
        first.retries + second.retries,
        # Both factors or neither: one half of a stale pair fits no λ.
        first.succeeded & second.succeeded,
    )


def refresh_pair(
    factors: tuple[Factor, Factor],
    averages: tuple[tf.Tensor, tf.Tensor],
    damping: tf.Tensor,
    ratio: tf.Tensor | None,
) -> tuple[tf.Tensor, tf.Tensor]:
    """Recomputes and keeps the inverses of `invert_pair`.

    Args:
        factors: See `invert_pair`.
        averages: See `invert_pair`.
        damping: See `invert_pair`.
        ratio: See `invert_pair`.

    Returns:
        Raised dampings and layers that failed, int32 scalars.
    """
    result = invert_pair(factors, averages, damping, ratio)
    left, right = factors
    left.store(result.left, result.succeeded)
    right.store(result.right, result.succeeded)
    return result.retries, count_failures(result.succeeded)
