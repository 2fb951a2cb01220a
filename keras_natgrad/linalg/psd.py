"""Inverses of symmetric positive semi-definite matrices."""

from __future__ import annotations

from typing import NamedTuple

import tensorflow as tf

# A factorisation that fails is tried again with ten times the damping.
_RETRY_GROWTH = 10.0
_MAX_RETRIES = 8


class DampedInverse(NamedTuple):
    """Result of `damped_inverse`.

    Attributes:
        inverse: Tensor `[n, n]`, the inverse of the damped matrix.
        retries: Scalar int32, how often the damping had to be raised.
        succeeded: Scalar bool, whether `inverse` is finite. If it is not,
            `inverse` holds zeros and must not be used.
    """

    inverse: tf.Tensor
    retries: tf.Tensor
    succeeded: tf.Tensor


def symmetrize(matrix: tf.Tensor) -> tf.Tensor:
    """Returns the symmetric part `(M + Mᵀ) / 2` of `[..., n, n]` matrices."""
    return 0.5 * (matrix + tf.linalg.matrix_transpose(matrix))


def damped_inverse(matrix: tf.Tensor, damping: tf.Tensor) -> DampedInverse:
    """Returns `(M + damping I)⁻¹` of a symmetric PSD matrix by Cholesky.

    TensorFlow's Cholesky fills its result with NaN when the matrix is not
    numerically positive definite. The factorisation is then repeated in the
    graph with ten times the damping, at most eight times; nothing is raised,
    so that the function compiles under XLA and never stops training.

    Cost: `n³/3` multiplications for the factor, `n³/2` for its inverse and
    `n³` for the product; `n²` memory for the result.

    Args:
        matrix: Tensor `[n, n]`, symmetric positive semi-definite.
        damping: Scalar tensor, non-negative.

    Returns:
        A `DampedInverse`.
    """
    identity = tf.eye(tf.shape(matrix)[-1], dtype=matrix.dtype)
    mean_diagonal = tf.reduce_mean(tf.linalg.diag_part(matrix))
    # A retry must raise the damping to something that rounding can see, also
    # when it was zero or tiny.
    smallest = tf.cast(_rounding(matrix.dtype), matrix.dtype) * mean_diagonal

    def attempt(total: tf.Tensor) -> tf.Tensor:
        factor = tf.linalg.cholesky(matrix + total * identity)
        # M⁻¹ = L⁻ᵀ L⁻¹: the product is a matrix product, which is faster than
        # a second triangular solve.
        root = tf.linalg.triangular_solve(factor, identity)
        return tf.matmul(root, root, transpose_a=True)

    def failed(inverse: tf.Tensor) -> tf.Tensor:
        return tf.logical_not(tf.math.is_finite(tf.reduce_sum(inverse)))

    def body(
        total: tf.Tensor, inverse: tf.Tensor, retries: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        total = tf.maximum(_RETRY_GROWTH * total, smallest)
        return total, attempt(total), retries + 1

    damping = tf.cast(damping, matrix.dtype)
    _, inverse, retries = tf.while_loop(
        lambda _, inverse, retries: tf.logical_and(
            failed(inverse), retries < _MAX_RETRIES
        ),
        body,
        (damping, attempt(damping), tf.constant(0, tf.int32)),
    )
    succeeded = tf.logical_not(failed(inverse))
    inverse = tf.where(succeeded, symmetrize(inverse), tf.zeros_like(inverse))
    return DampedInverse(inverse, retries, succeeded)


def _rounding(dtype: tf.DType) -> float:
    """Returns a multiple of the rounding unit that a Cholesky can resist."""
    return 1e-5 if dtype == tf.float32 else 1e-13
