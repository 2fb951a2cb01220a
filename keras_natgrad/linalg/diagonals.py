"""Diagonals of square matrices, and values that broadcast over them.

`tf.linalg.diag` and its relatives can place diagonals anywhere, and make up to
five constants per call to say where. The operations here know the main
diagonal only.
"""

from __future__ import annotations

import tensorflow as tf


def diagonal_matrix(values: tf.Tensor) -> tf.Tensor:
    """Returns diagonal matrices `[..., n, n]` of vectors `[..., n]`."""
    return tf.raw_ops.MatrixDiag(diagonal=values)


def diagonal_of(matrices: tf.Tensor) -> tf.Tensor:
    """Returns the diagonals `[..., n]` of matrices `[..., n, n]`."""
    return tf.raw_ops.MatrixDiagPart(input=matrices)


def add_to_diagonal(matrices: tf.Tensor, values: tf.Tensor) -> tf.Tensor:
    """Returns `M + diag(v)`.

    Args:
        matrices: Tensor `[..., n, n]`.
        values: Tensor that broadcasts to `[..., n]`.
    """
    return tf.raw_ops.MatrixSetDiag(
        input=matrices, diagonal=diagonal_of(matrices) + values
    )


def identity_matrix(size: int, dtype: tf.DType) -> tf.Tensor:
    """Returns the identity, `[n, n]`."""
    return diagonal_matrix(tf.ones([size], dtype))


def expand_to(values: tf.Tensor, rank: int) -> tf.Tensor:
    """Appends axes of one, so that values broadcast over a tensor's last axes.

    Args:
        values: Tensor of static shape; a scalar stays as it is.
        rank: Rank of the tensor.
    """
    own = values.shape.rank
    if own in (0, rank):
        return values
    return tf.reshape(values, [*values.shape, *[1] * (rank - own)])
