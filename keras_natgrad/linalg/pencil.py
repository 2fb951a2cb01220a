"""Two symmetric matrices that are diagonalised at once."""

from __future__ import annotations

import math
from typing import NamedTuple

import tensorflow as tf

from keras_natgrad.linalg.eigenbasis import eigenbasis
from keras_natgrad.linalg.psd import damped_inverse_root


class Pencil(NamedTuple):
    """Result of `pencil`.

    Attributes:
        basis: P, `[n, n]`, or `None` for the identity. NaN where no basis was
            found.
        weights: `[2, n]`, the diagonals of `Pᵀ A P` and `Pᵀ B P`.
        retries: Scalar int32, how often the sum had to be damped.
    """

    basis: tf.Tensor | None
    weights: tf.Tensor
    retries: tf.Tensor


def pencil(first: tf.Tensor, second: tf.Tensor) -> Pencil:
    """Returns P for which `Pᵀ A P` and `Pᵀ B P` are diagonal.

    With the mean eigenvalues α and β of A and B

        A/α + B/β = L Lᵀ,    L⁻¹ (A/α) L⁻ᵀ = Q D Qᵀ,    P = L⁻ᵀ Q,

    so that `Pᵀ A P = α D` and `Pᵀ B P = β (I − D)`; the scales keep a small
    matrix from being lost beside a large one. A zero matrix stays zero. For
    two diagonals P is the identity.

    Cost: about ten times `n³`, most of it for the eigenproblem.

    Args:
        first: A, symmetric positive semi-definite: `[n, n]`, or `[n]` for a
            diagonal matrix.
        second: B, likewise.

    References:
        - Golub & Van Loan, 2013, section 8.7 (the generalised eigenproblem).
    """
    if first.shape.rank == second.shape.rank == 1:
        weights = tf.stack([first, second])
        return Pencil(None, weights, tf.constant(0, tf.int32))
    first, second = _matrix(first), _matrix(second)
    alpha, beta = (
        tf.reduce_mean(tf.linalg.diag_part(each)) for each in (first, second)
    )
    scaled = tf.math.divide_no_nan(first, alpha)
    total = scaled + tf.math.divide_no_nan(second, beta)
    result = damped_inverse_root(total, tf.zeros([], total.dtype))
    root = result.inverse
    moment = tf.matmul(root, tf.matmul(scaled, root, transpose_b=True))
    # An eigenvalue routine may raise an error on what is not finite.
    moment = tf.where(result.succeeded, moment, tf.zeros_like(moment))
    values, vectors = eigenbasis(moment)
    basis = tf.matmul(root, vectors, transpose_a=True)
    nan = tf.constant(math.nan, basis.dtype)
    basis = tf.where(result.succeeded, basis, nan)
    share = tf.clip_by_value(values, 0, 1)
    weights = tf.stack([alpha * share, beta * (1 - share)])
    return Pencil(basis, weights, result.retries)


def _matrix(values: tf.Tensor) -> tf.Tensor:
    return tf.linalg.diag(values) if values.shape.rank == 1 else values
