"""Inverses of many symmetric positive semi-definite matrices at once."""

from __future__ import annotations

from typing import NamedTuple

import tensorflow as tf

from keras_natgrad.linalg.psd import (
    MAX_RETRIES,
    RETRY_GROWTH,
    inverse_by_blocks,
    rounding,
)


class DampedInverses(NamedTuple):
    """Result of `damped_inverses`.

    Attributes:
        inverses: Tensor `[k, n, n]`. What is not finite must not be used.
        retries: Scalar int32, how many dampings had to be raised, each time.
        succeeded: Boolean tensor `[k]`, which of the inverses are good.
    """

    inverses: tf.Tensor
    retries: tf.Tensor
    succeeded: tf.Tensor


def damped_inverses(matrices: tf.Tensor, dampings: tf.Tensor) -> DampedInverses:
    """Returns `(M_i + λ_i I)⁻¹` of symmetric PSD matrices by Cholesky.

    One batched factorisation; where it fails it is repeated with ten times
    the damping of the matrices that failed, as in `damped_inverse`. A zero
    matrix without damping has no inverse, and is not tried again.

    Args:
        matrices: Tensor `[k, n, n]`, symmetric positive semi-definite.
        dampings: Tensor `[k]`, non-negative.

    Returns:
        A `DampedInverses`.
    """
    dtype = matrices.dtype
    means = tf.reduce_mean(tf.linalg.diag_part(matrices), axis=-1)
    smallest = tf.cast(rounding(dtype), dtype) * means
    dampings = tf.cast(dampings, dtype)
    usable = means + dampings > 0  # Not so for NaN either.
    dampings = tf.where(usable, dampings, tf.ones_like(dampings))

    def attempt(totals: tf.Tensor) -> tf.Tensor:
        diagonal = tf.linalg.diag_part(matrices) + totals[:, tf.newaxis]
        return _inverses(tf.linalg.set_diag(matrices, diagonal))

    def failed(inverses: tf.Tensor) -> tf.Tensor:
        sums = tf.reduce_sum(inverses, axis=[1, 2])
        return usable & ~tf.math.is_finite(sums)

    def body(
        totals: tf.Tensor,
        inverses: tf.Tensor,
        retries: tf.Tensor,
        tries: tf.Tensor,
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor, tf.Tensor]:
        again = failed(inverses)
        raised = tf.maximum(RETRY_GROWTH * totals, smallest)
        totals = tf.where(again, raised, totals)
        retries += tf.reduce_sum(tf.cast(again, tf.int32))
        return totals, attempt(totals), retries, tries + 1

    zero = tf.constant(0, tf.int32)
    _, inverses, retries, _ = tf.while_loop(
        lambda totals, inverses, retries, tries: (
            tf.reduce_any(failed(inverses)) & (tries < MAX_RETRIES)
        ),
        body,
        (dampings, attempt(dampings), zero, zero),
    )
    return DampedInverses(inverses, retries, usable & ~failed(inverses))


def _inverses(matrices: tf.Tensor) -> tf.Tensor:
    if matrices.shape[0] == 1:
        return inverse_by_blocks(matrices[0])[tf.newaxis]
    factors = tf.linalg.cholesky(matrices)
    identity = tf.eye(matrices.shape[-1], dtype=matrices.dtype)
    roots = tf.linalg.triangular_solve(
        factors, tf.broadcast_to(identity, tf.shape(matrices))
    )
    return tf.matmul(roots, roots, transpose_a=True)
