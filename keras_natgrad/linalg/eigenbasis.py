"""Eigenvectors of symmetric matrices, as good under XLA as without."""

from __future__ import annotations

import tensorflow as tf


def eigenbasis(matrix: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns eigenvalues and eigenvectors of symmetric matrices.

    XLA computes eigenvectors by a Jacobi iteration that stops at a relative
    1e-6. One step of perturbation theory squares that error, except between
    eigenvalues that are nearly equal: with `M = Vᵀ A V = Λ + O` and the skew
    `E_ij = O_ij / (λ_j − λ_i)`, the rotation `exp E`, here to second order,
    takes O away to first order.

    Args:
        matrix: Tensor `[..., n, n]`, symmetric and finite: an eigenvalue
            routine may raise an error on what is not.

    Returns:
        Tensors `[..., n]` and `[..., n, n]`, the vectors in columns.
    """
    _, vectors = tf.linalg.eigh(matrix)
    rotated = tf.matmul(vectors, tf.matmul(matrix, vectors), transpose_a=True)
    values = tf.linalg.diag_part(rotated)
    gaps = values[..., tf.newaxis, :] - values[..., tf.newaxis]
    # A rotation that is not small is not given by its first orders.
    small = tf.abs(rotated) < 1e-4 * tf.abs(gaps)
    skew = tf.where(small, tf.math.divide_no_nan(rotated, gaps), 0)
    skew = (skew - tf.linalg.matrix_transpose(skew)) / 2
    turn = skew + tf.matmul(skew, skew) / 2
    return values, vectors + tf.matmul(vectors, turn)
