"""Kronecker products in the row-major (Keras kernel) convention."""

from __future__ import annotations

import tensorflow as tf


def flatten_matrix(matrix: tf.Tensor) -> tf.Tensor:
    """Flattens `[n, m]` to `[n m]` row by row, as `A ⊗ G` expects it.

    With this order `(A ⊗ G) vec(V) = vec(A V Gᵀ)`.
    """
    return tf.reshape(matrix, [-1])


def kronecker_operator(
    left: tf.linalg.LinearOperator, right: tf.linalg.LinearOperator
) -> tf.linalg.LinearOperatorKronecker:
    """Returns the symmetric PSD operator `left ⊗ right`."""
    return tf.linalg.LinearOperatorKronecker(
        [left, right], is_self_adjoint=True, is_positive_definite=None
    )


def block_diagonal(
    operator: tf.linalg.LinearOperator, groups: int | None
) -> tf.linalg.LinearOperator:
    """Returns a batch of operators as one block-diagonal operator.

    Args:
        operator: Operator of batch shape `[groups]`, or of none.
        groups: Number of groups; without any the operator itself is returned.
    """
    if groups is None:
        return operator
    return tf.linalg.LinearOperatorBlockDiag(
        [operator[group] for group in range(groups)], is_self_adjoint=True
    )


def trace_norm_ratio(left: tf.Tensor, right: tf.Tensor) -> tf.Tensor:
    """Returns π = √((tr A / n) / (tr G / m)) from the two mean eigenvalues.

    Splitting the damping as `(A + π √λ I) ⊗ (G + √λ/π I)` with this π makes
    both factors equally damped relative to their own scale
    (Martens & Grosse 2015, section 6.3). Where one of the factors is zero,
    π is 1.

    Args:
        left: Mean eigenvalue of A, a scalar or one per group.
        right: Mean eigenvalue of G, likewise.

    Returns:
        Tensor π, of the same shape.
    """
    usable = tf.logical_and(left > 0, right > 0)
    safe_right = tf.where(usable, right, tf.ones_like(right))
    safe_left = tf.where(usable, left, tf.ones_like(left))
    return tf.sqrt(safe_left / safe_right)
