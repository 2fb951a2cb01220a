"""Canonical inputs of a layer, as a tensor or in a form that saves one."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import TypeAlias

import tensorflow as tf
from typing_extensions import Self


class StructuredRows(abc.ABC):
    """Stands for a tensor `[(groups,) batch, shared, n]` of row vectors.

    Blocks need sums over the rows and products with a matrix, which a
    structure (one-hot rows, patches of an image) gives without the tensor.
    The methods that have a body here form it.
    """

    @property
    @abc.abstractmethod
    def dtype(self) -> tf.DType:
        """Dtype of the rows."""

    @property
    @abc.abstractmethod
    def shared(self) -> tf.Tensor:
        """Number of shared positions, an int32 scalar."""

    @abc.abstractmethod
    def cast(self, dtype: tf.DType | str) -> Self:
        """Returns the rows in another dtype."""

    @abc.abstractmethod
    def fold(self, batch: tf.Tensor) -> Self:
        """Returns the rows of `batch` examples.

        Positions are taken out of a batch axis that they were folded into.
        """

    @abc.abstractmethod
    def scale(self, factors: tf.Tensor) -> Self:
        """Returns the rows of each example times its factor.

        Args:
            factors: Tensor `[batch]`.
        """

    @abc.abstractmethod
    def take(self, examples: tf.Tensor) -> Self:
        """Returns the rows of some examples."""

    @abc.abstractmethod
    def second_moment(self) -> tf.Tensor:
        """Returns the sum of outer products, `[(groups,) n, n]`."""

    @abc.abstractmethod
    def squares(self) -> tf.Tensor:
        """Returns the diagonal of `second_moment`, `[(groups,) n]`."""

    @abc.abstractmethod
    def matmul(self, matrix: tf.Tensor) -> tf.Tensor:
        """Returns the rows times a matrix.

        Args:
            matrix: Tensor `[(groups,) n, m]`.

        Returns:
            Tensor `[(groups,) batch, shared, m]`.
        """

    @abc.abstractmethod
    def to_dense(self) -> tf.Tensor:
        """Returns the tensor `[(groups,) batch, shared, n]`."""

    def mean(self) -> tf.Tensor:
        """Returns the means over positions, `[(groups,) batch, 1, n]`."""
        return tf.reduce_mean(self.to_dense(), axis=-2, keepdims=True)

    def contract(self, cotangents: tf.Tensor) -> tf.Tensor:
        """Returns `Σ_s ā_s g_sᵀ`, `[(groups,) batch, n, m]`.

        Args:
            cotangents: Tensor `[(groups,) batch, shared, m]`.
        """
        return tf.matmul(self.to_dense(), cotangents, transpose_a=True)

    def homogeneous(self) -> Rows:
        """Returns the rows with a one as last coordinate."""
        return homogeneous(self.to_dense())

    @classmethod
    def join(cls, parts: Sequence[Self]) -> Rows:
        """Returns the positions of several rows after each other."""
        if len(parts) == 1:
            return parts[0]
        return tf.concat([part.to_dense() for part in parts], axis=-2)


#: Canonical inputs of a layer.
Rows: TypeAlias = tf.Tensor | StructuredRows


def to_dense(rows: Rows) -> tf.Tensor:
    """Returns canonical inputs as a tensor."""
    return rows.to_dense() if isinstance(rows, StructuredRows) else rows


def homogeneous(rows: Rows) -> Rows:
    """Returns canonical inputs with a one as last coordinate."""
    if isinstance(rows, StructuredRows):
        return rows.homogeneous()
    paddings = [[0, 0]] * (rows.shape.rank - 1) + [[0, 1]]
    return tf.pad(rows, paddings, constant_values=1)


def position_count(rows: Rows) -> tf.Tensor:
    """Returns the number of shared positions."""
    if isinstance(rows, StructuredRows):
        return rows.shared
    static = rows.shape[-2]
    return tf.shape(rows)[-2] if static is None else tf.constant(static)


def position_mean(rows: Rows) -> tf.Tensor:
    """Returns the means over positions, `[(groups,) batch, 1, n]`."""
    if isinstance(rows, StructuredRows):
        return rows.mean()
    return tf.reduce_mean(rows, axis=-2, keepdims=True)


def scale_examples(rows: Rows, factors: tf.Tensor) -> Rows:
    """Returns the rows of each example times its factor, `[batch]`."""
    if isinstance(rows, StructuredRows):
        return rows.scale(factors)
    return tf.reshape(factors, [-1, 1, 1]) * rows


def take_examples(rows: Rows, examples: tf.Tensor) -> Rows:
    """Returns the rows of some examples."""
    if isinstance(rows, StructuredRows):
        return rows.take(examples)
    return tf.gather(rows, examples, axis=-3)


def multiply(rows: Rows, matrix: tf.Tensor) -> tf.Tensor:
    """Returns `[(groups,) batch, shared, n] × [(groups,) n, m]`."""
    if isinstance(rows, StructuredRows):
        return rows.matmul(matrix)
    if rows.shape.rank == 4:
        return tf.einsum("gbsn,gnm->gbsm", rows, matrix)
    return tf.einsum("bsn,nm->bsm", rows, matrix)
