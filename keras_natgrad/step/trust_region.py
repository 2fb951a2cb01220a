"""A bound on the Fisher norm of the update."""

from __future__ import annotations

import tensorflow as tf

from keras_natgrad.linalg import scalar


def norm_scale(
    fisher_norm_squared: tf.Tensor, bound: float | tf.Tensor
) -> tf.Tensor:
    """Returns the factor that brings an update inside the trust region.

    The update δ keeps its direction and is shortened so that
    `δᵀ F δ ≤ bound`, twice the KL divergence that the step may cause
    (Ba, Grosse & Martens 2017; Osawa et al. 2019). Inside the region it is
    untouched.

    Args:
        fisher_norm_squared: Scalar `δᵀ F δ`.
        bound: Positive scalar.

    Returns:
        Scalar in (0, 1].
    """
    bound = scalar(bound, fisher_norm_squared.dtype)
    outside = fisher_norm_squared > bound
    safe = tf.where(outside, fisher_norm_squared, bound)
    return tf.sqrt(bound / safe)
