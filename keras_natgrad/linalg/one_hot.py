"""Rows that are multiples of unit vectors, without the zeros."""

from __future__ import annotations

from typing import TypeAlias

import tensorflow as tf


class OneHot:
    """Vectors `value · e_index`, as the inputs of an embedding are.

    It stands for the tensor `[batch, shared, depth]` with one nonzero in each
    row, and does with `batch · shared` numbers what blocks do with such a
    tensor.

    Args:
        indices: Integer tensor `[batch, shared]`, in `[0, depth)`; a row
            whose index lies outside is zero.
        values: Tensor `[batch, shared]`.
        depth: Length of the vectors.
    """

    def __init__(
        self, indices: tf.Tensor, values: tf.Tensor, depth: int
    ) -> None:
        inside = (indices >= 0) & (indices < depth)
        self.indices = tf.where(inside, indices, tf.zeros_like(indices))
        self.values = tf.where(inside, values, tf.zeros_like(values))
        self.depth = depth

    @property
    def dtype(self) -> tf.DType:
        """Dtype of the values."""
        return self.values.dtype

    def scale(self, factors: tf.Tensor) -> OneHot:
        """Returns the rows times factors, broadcast to `[batch, shared]`."""
        return OneHot(self.indices, self.values * factors, self.depth)

    def take(self, examples: tf.Tensor) -> OneHot:
        """Returns the rows of some examples."""
        return OneHot(
            tf.gather(self.indices, examples),
            tf.gather(self.values, examples),
            self.depth,
        )

    def squares(self) -> tf.Tensor:
        """Returns the diagonal of the sum of outer products, `[depth]`.

        That sum is diagonal: no row has two nonzeros.
        """
        return tf.math.unsorted_segment_sum(
            tf.reshape(tf.square(self.values), [-1]),
            tf.reshape(self.indices, [-1]),
            self.depth,
        )

    def matmul(self, matrix: tf.Tensor) -> tf.Tensor:
        """Returns the product with `[depth, m]`, `[batch, shared, m]`."""
        rows = tf.gather(matrix, self.indices)
        return self.values[..., tf.newaxis] * rows

    def to_dense(self) -> tf.Tensor:
        """Returns the tensor `[batch, shared, depth]`."""
        unit = tf.one_hot(self.indices, self.depth, dtype=self.dtype)
        return self.values[..., tf.newaxis] * unit


#: Canonical inputs of a layer.
Rows: TypeAlias = tf.Tensor | OneHot


def to_dense(rows: Rows) -> tf.Tensor:
    """Returns canonical inputs as a tensor."""
    return rows.to_dense() if isinstance(rows, OneHot) else rows
