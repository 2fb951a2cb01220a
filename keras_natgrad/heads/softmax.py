"""Factor of the Fisher matrix of logits: `F = diag(p) − p pᵀ = L Lᵀ`.

`L = diag(√p) − p √pᵀ`, `p = softmax(logits)`. If one class `k` is nearly
certain, `F_kk = p_k (1 − p_k)` is far below the rounding of `p_k`, and the
plain differences in `L` would be only rounding. Both products therefore compute
`1 − p_k` from the other classes, whose probabilities have full relative
precision.
"""

import tensorflow as tf

from keras_natgrad.heads import tensors


def factor_product(logits: tf.Tensor, vector: tf.Tensor) -> tf.Tensor:
    """Computes `L v = √p v − p (√pᵀ v)`.

    The columns of `L` sum to zero, so the entry of the likeliest class is
    minus the sum of the others.

    Args:
        logits: Tensor of shape `[..., K]`.
        vector: Tensor of shape `[..., K]`.

    Returns:
        Tensor of shape `[..., K]`.
    """
    p = tf.nn.softmax(logits)
    scaled = tf.sqrt(p) * tensors.cast_like(vector, p)
    likeliest = _likeliest(logits)
    others = (1.0 - likeliest) * (
        scaled - p * tf.reduce_sum(scaled, axis=-1, keepdims=True)
    )
    return others - likeliest * tf.reduce_sum(others, axis=-1, keepdims=True)


def factor_transpose_product(logits: tf.Tensor, vector: tf.Tensor) -> tf.Tensor:
    """Computes `Lᵀ v = √p (v − pᵀ v)`.

    A constant added to `v` changes nothing, so the entry of the likeliest class
    is first made zero and does not enter the mean.

    Args:
        logits: Tensor of shape `[..., K]`.
        vector: Tensor of shape `[..., K]`.

    Returns:
        Tensor of shape `[..., K]`.
    """
    p = tf.nn.softmax(logits)
    vector = tensors.cast_like(vector, p)
    origin = tf.reduce_sum(_likeliest(logits) * vector, axis=-1, keepdims=True)
    vector = vector - origin
    mean = tf.reduce_sum(p * vector, axis=-1, keepdims=True)
    return tf.sqrt(p) * (vector - mean)


def _likeliest(logits: tf.Tensor) -> tf.Tensor:
    """Marks the class of the largest logit, the first of ties."""
    return tf.one_hot(
        tf.argmax(logits, axis=-1), tf.shape(logits)[-1], dtype=logits.dtype
    )
