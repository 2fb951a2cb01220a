"""Rows that are multiples of unit vectors, without the zeros."""

from __future__ import annotations

from collections.abc import Sequence

import tensorflow as tf
from typing_extensions import Self, override

from keras_natgrad.linalg.rows import StructuredRows


class OneHot(StructuredRows):
    """Vectors `value · e_index`, as the inputs of an embedding are.

    It stands for the tensor `[batch, shared, depth]` with one nonzero in each
    row, and does with `batch · shared` numbers what blocks do with such a
    tensor.

    Args:
        indices: int32 or int64 tensor `[batch, shared]`, in `[0, depth)`; a
            row whose index lies outside is zero.
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
    @override
    def dtype(self) -> tf.DType:
        return self.values.dtype

    @property
    @override
    def shared(self) -> tf.Tensor:
        return tf.shape(self.indices)[1]

    @override
    def cast(self, dtype: tf.DType | str) -> OneHot:
        return OneHot(self.indices, tf.cast(self.values, dtype), self.depth)

    @override
    def fold(self, batch: tf.Tensor) -> OneHot:
        return OneHot(
            tf.reshape(self.indices, [batch, -1]),
            tf.reshape(self.values, [batch, -1]),
            self.depth,
        )

    @override
    def scale(self, factors: tf.Tensor) -> OneHot:
        factors = factors[:, tf.newaxis]
        return OneHot(self.indices, self.values * factors, self.depth)

    @override
    def take(self, examples: tf.Tensor) -> OneHot:
        return OneHot(
            tf.gather(self.indices, examples),
            tf.gather(self.values, examples),
            self.depth,
        )

    @override
    def second_moment(self) -> tf.Tensor:
        return tf.linalg.diag(self.squares())

    @override
    def squares(self) -> tf.Tensor:
        """Returns the diagonal of the sum of outer products, `[depth]`.

        That sum is diagonal: no row has two nonzeros.
        """
        return tf.math.unsorted_segment_sum(
            tf.reshape(tf.square(self.values), [-1]),
            tf.reshape(self.indices, [-1]),
            self.depth,
        )

    @override
    def matmul(self, matrix: tf.Tensor) -> tf.Tensor:
        rows = tf.gather(matrix, self.indices)
        return self.values[..., tf.newaxis] * rows

    def gradient_squares(self, cotangents: tf.Tensor) -> tf.Tensor:
        """Returns `Σ_n (Σ_s ā_s g_sᵀ)²`, `[depth, m]`, entry by entry.

        With p = value · g, row i is `Σ_n Σ_s 1[i_s = i] p_s Σ_t 1[i_t = i_s]
        p_t`: the inner sum needs only the positions of one example.

        Args:
            cotangents: Tensor `[batch, shared, m]`.
        """
        products = self.values[..., tf.newaxis] * cotangents
        same = tf.equal(
            self.indices[:, :, tf.newaxis], self.indices[:, tf.newaxis]
        )
        sums = tf.matmul(tf.cast(same, products.dtype), products)
        return tf.math.unsorted_segment_sum(
            tf.reshape(products * sums, [-1, products.shape[-1]]),
            tf.reshape(self.indices, [-1]),
            self.depth,
        )

    @override
    def to_dense(self) -> tf.Tensor:
        unit = tf.one_hot(self.indices, self.depth, dtype=self.dtype)
        return self.values[..., tf.newaxis] * unit

    @override
    @classmethod
    def join(cls, parts: Sequence[Self]) -> OneHot:
        indices = [part.indices for part in parts]
        if len({each.dtype for each in indices}) > 1:
            indices = [tf.cast(each, tf.int64) for each in indices]
        return OneHot(
            tf.concat(indices, axis=1),
            tf.concat([part.values for part in parts], axis=1),
            parts[0].depth,
        )
