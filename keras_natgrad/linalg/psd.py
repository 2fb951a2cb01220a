"""Inverses of symmetric positive semi-definite matrices."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from keras_natgrad.linalg.diagonals import (
    add_to_diagonal,
    diagonal_of,
    expand_to,
    identity_matrix,
)

# A factorisation that fails is tried again with ten times the damping.
RETRY_GROWTH = 10.0
MAX_RETRIES = 8
# Side of the diagonal blocks that are left to the library's kernels.
_LEAF = 128


class DampedInverse(NamedTuple):
    """Result of `damped_inverse`.

    Attributes:
        inverse: Tensor `[..., n, n]`, the inverse of the damped matrix.
        retries: Scalar int32, how often a damping had to be raised.
        succeeded: Bool, scalar or one per unit, whether `inverse` is finite.
            Where it is not, `inverse` holds zeros and must not be used.
    """

    inverse: tf.Tensor
    retries: tf.Tensor
    succeeded: tf.Tensor


def damped_inverse(
    matrix: tf.Tensor, damping: tf.Tensor, units: int = 0
) -> DampedInverse:
    """Returns `(M + damping I)⁻¹` of a symmetric PSD matrix by Cholesky.

    TensorFlow's Cholesky fills its result with NaN when the matrix is not
    numerically positive definite. The factorisation is then repeated in the
    graph with ten times the damping, at most eight times; nothing is raised,
    so that the function compiles under XLA and never stops training.

    Cost: `n³` multiplications, see `inverse_by_blocks`; `n²` memory.

    Args:
        matrix: Tensor `[..., n, n]`, symmetric positive semi-definite.
        damping: Tensor `[...]` or scalar, non-negative.
        units: How many of the first axes count units that fail, and get more
            damping, each on its own: none, so that all matrices share their
            fate, or one.

    Returns:
        A `DampedInverse`.
    """
    return _retry(inverse_by_blocks, matrix, damping, units)


def _retry(
    function: Callable[[tf.Tensor], tf.Tensor],
    matrix: tf.Tensor,
    damping: tf.Tensor,
    units: int = 0,
) -> DampedInverse:
    """Returns `function(M + damping I)`, with more damping until finite.

    The loop makes the first attempt too, so that the function is traced once.

    Args:
        function: Takes the damped matrix, returns a tensor of its shape.
        matrix: M.
        damping: See `damped_inverse`.
        units: See `damped_inverse`.
    """
    rank = matrix.shape.rank
    mean_diagonal = tf.reduce_mean(diagonal_of(matrix), axis=-1)
    # A retry must raise the damping to something that rounding can see, also
    # when it was zero or tiny.
    smallest = rounding(matrix.dtype) * mean_diagonal

    def body(
        tries: tf.Tensor,
        retries: tf.Tensor,
        damping: tf.Tensor,
        result: tf.Tensor,
        failed: tf.Tensor,
    ) -> tuple[tf.Tensor, ...]:
        raised = tf.maximum(RETRY_GROWTH * damping, smallest)
        damping = tf.where(expand_to(failed, rank - 2), raised, damping)
        retries += tf.reduce_sum(tf.cast(failed, tf.int32))
        damped = add_to_diagonal(matrix, damping[..., tf.newaxis])
        result = function(damped)
        sums = tf.reduce_sum(result, axis=list(range(units, rank)))
        return tries + 1, retries, damping, result, ~tf.math.is_finite(sums)

    zero = tf.constant(0, tf.int32)
    damping = tf.cast(damping, matrix.dtype) + tf.zeros_like(mean_diagonal)
    _, retries, _, result, failed = tf.while_loop(
        lambda tries, retries, damping, result, failed: (
            tf.reduce_any(failed) & (tries <= MAX_RETRIES) | (tries < 1)
        ),
        body,
        (
            zero,
            zero,
            damping,
            tf.zeros_like(matrix),
            tf.zeros(matrix.shape[:units], tf.bool),
        ),
    )
    bad = expand_to(failed, rank)
    result = tf.where(bad, tf.zeros([], result.dtype), result)
    return DampedInverse(result, retries, ~failed)


def damped_inverse_root(matrix: tf.Tensor, damping: tf.Tensor) -> DampedInverse:
    """Returns `L⁻¹` of the Cholesky factor of `M + damping I = L Lᵀ`.

    A failed factorisation is repeated as in `damped_inverse`.

    Args:
        matrix: Tensor `[..., n, n]`, symmetric positive semi-definite.
        damping: Tensor `[...]` or scalar, non-negative.

    Returns:
        A `DampedInverse`, whose inverse is that of the factor.
    """
    return _retry(inverse_cholesky, matrix, damping)


class DampedSolution(NamedTuple):
    """Result of `damped_solve`.

    Attributes:
        solution: Tensor `[n, k]`.
        retries: Scalar int32, how often the damping had to be raised.
        succeeded: Scalar bool, whether `solution` is finite. If it is not,
            `solution` holds zeros.
    """

    solution: tf.Tensor
    retries: tf.Tensor
    succeeded: tf.Tensor


def damped_solve(
    matrix: tf.Tensor, right: tf.Tensor, damping: tf.Tensor
) -> DampedSolution:
    """Returns `(M + damping I)⁻¹ B` of a symmetric PSD matrix by Cholesky.

    A failed factorisation is repeated as in `damped_inverse`.

    Args:
        matrix: Tensor `[n, n]`, symmetric positive semi-definite.
        right: Tensor `[n, k]`, B.
        damping: Scalar tensor, non-negative.
    """
    factored = _retry(tf.linalg.cholesky, matrix, damping)
    solution = tf.linalg.cholesky_solve(factored.inverse, right)
    succeeded = factored.succeeded & tf.math.is_finite(tf.reduce_sum(solution))
    solution = tf.where(succeeded, solution, tf.zeros_like(solution))
    return DampedSolution(solution, factored.retries, succeeded)


def pseudo_inverse_solve(
    matrix: tf.Tensor, right: tf.Tensor, cutoff: float | None = None
) -> tf.Tensor:
    """Returns `M⁺ b` of symmetric PSD matrices, by their eigenvalues.

    Args:
        matrix: Tensor `[..., n, n]`, symmetric positive semi-definite.
        right: Tensor `[..., n]`, b.
        cutoff: Eigenvalues up to this times the largest count as zero.
            Defaults to n times the rounding unit.

    Returns:
        Tensor `[..., n]`.
    """
    values, vectors = tf.linalg.eigh(matrix)
    if cutoff is None:
        unit = np.finfo(matrix.dtype.as_numpy_dtype).eps
        cutoff = unit * tf.cast(tf.shape(matrix)[-1], matrix.dtype)
    kept = values > tf.cast(cutoff, matrix.dtype) * values[..., -1:]
    inverse = tf.where(kept, 1 / tf.where(kept, values, 1), 0)
    coordinates = tf.linalg.matvec(vectors, right, transpose_a=True)
    return tf.linalg.matvec(vectors, inverse * coordinates)


def inverse_by_blocks(matrix: tf.Tensor) -> tf.Tensor:
    """Returns the inverse of a symmetric positive definite matrix.

    It is `L⁻ᵀ L⁻¹` with the inverse Cholesky factor of `inverse_cholesky`,
    formed in two block rows so that the zeros of `L⁻¹` cost nothing. A matrix
    that is not positive definite gives NaN.

    Args:
        matrix: Tensor `[..., n, n]`, n known statically.

    Returns:
        Tensor `[..., n, n]`, symmetric to rounding.
    """
    size = matrix.shape[-1]
    if size <= _LEAF:
        return _inverse_by_kernels(matrix)
    x, z, y = _inverse_cholesky_blocks(matrix)
    corner = tf.matmul(x, x, transpose_a=True)
    corner += tf.matmul(z, z, transpose_a=True)
    below = tf.matmul(y, z, transpose_a=True)
    return tf.concat(
        [
            tf.concat([corner, tf.linalg.matrix_transpose(below)], axis=-1),
            tf.concat([below, tf.matmul(y, y, transpose_a=True)], axis=-1),
        ],
        axis=-2,
    )


def inverse_cholesky(matrix: tf.Tensor) -> tf.Tensor:
    """Returns `L⁻¹`, the inverse of the Cholesky factor, by halves.

    The kernels of Cholesky and of triangular solves run on one core or badly
    fill an accelerator, matrix products do not. With

        M = [[A, Bᵀ], [B, C]],   L⁻¹ = [[X, 0], [−Y K X, Y]],

    `X = inverse_cholesky(A)`, `K = B Xᵀ` and `Y = inverse_cholesky(C − K Kᵀ)`
    (the blocked Cholesky algorithm, Golub & Van Loan, section 4.2.9), nearly
    all work is matrix products, and only blocks of at most 128 are left to
    the kernels. It is as stable as they are.

    Args:
        matrix: Tensor `[..., n, n]`, symmetric positive definite, n known
            statically.

    Returns:
        Lower triangular tensor `[..., n, n]`.
    """
    size = matrix.shape[-1]
    if size <= _LEAF:
        return _inverse_cholesky_by_kernels(matrix)
    x, z, y = _inverse_cholesky_blocks(matrix)
    above = tf.concat([x, tf.zeros_like(tf.linalg.matrix_transpose(z))], -1)
    return tf.concat([above, tf.concat([z, y], axis=-1)], axis=-2)


def _inverse_cholesky_blocks(
    matrix: tf.Tensor,
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Returns the blocks X, −Y K X and Y of `inverse_cholesky`."""
    # Halves that are multiples of 16 keep the products aligned.
    size = matrix.shape[-1]
    half = -(-size // 32) * 16
    sides = tf.constant([half, size - half])
    above, below = tf.split(matrix, sides, axis=-2)
    x = inverse_cholesky(tf.split(above, sides, axis=-1)[0])
    left, corner = tf.split(below, sides, axis=-1)
    k = tf.matmul(left, x, transpose_b=True)
    y = inverse_cholesky(corner - tf.matmul(k, k, transpose_b=True))
    return x, -tf.matmul(y, tf.matmul(k, x)), y


def _inverse_cholesky_by_kernels(matrix: tf.Tensor) -> tf.Tensor:
    """Returns `L⁻¹` by one factorisation and one triangular solve."""
    factor = tf.linalg.cholesky(matrix)
    identity = identity_matrix(matrix.shape[-1], matrix.dtype)
    if matrix.shape.rank > 2:
        identity = tf.broadcast_to(identity, tf.shape(factor))
    return tf.linalg.triangular_solve(factor, identity)


def _inverse_by_kernels(matrix: tf.Tensor) -> tf.Tensor:
    """Returns the inverse `L⁻ᵀ L⁻¹`, not divided into blocks."""
    root = _inverse_cholesky_by_kernels(matrix)
    return tf.matmul(root, root, transpose_a=True)


def rounding(dtype: tf.DType) -> float:
    """Returns a multiple of the rounding unit that a Cholesky can resist."""
    return 1e-5 if dtype == tf.float32 else 1e-13
