"""Transposes of small matrices."""

from __future__ import annotations

import tensorflow as tf

# Multiplications up to which a product with the identity is cheaper on a CPU.
_SMALL = 2**21


def transposed(matrix: tf.Tensor) -> tf.Tensor:
    """Returns the transpose of a matrix, the same numbers.

    On a CPU, the kernel that transposes float32 costs some 0.07 ms however
    small the matrix is. A product with the identity takes a sixth of that for
    81 × 80, and is exact there (`0 · g` is zero: g must be finite). An
    accelerator transposes, as its products may round.

    Args:
        matrix: Tensor `[n, m]`.
    """
    sides = matrix.shape.as_list()
    small = None not in sides and min(sides) ** 2 * max(sides) <= _SMALL
    if not small or _has_accelerator():
        return tf.transpose(matrix)
    rows, columns = sides
    if rows <= columns:
        identity = tf.eye(rows, dtype=matrix.dtype)
        return tf.matmul(matrix, identity, transpose_a=True)
    identity = tf.eye(columns, dtype=matrix.dtype)
    return tf.matmul(identity, matrix, transpose_b=True)


def _has_accelerator() -> bool:
    """Returns whether TensorFlow sees any device but CPUs."""
    devices = tf.config.get_visible_devices()
    return any(device.device_type != "CPU" for device in devices)
