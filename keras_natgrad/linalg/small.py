"""Moving the numbers of small matrices, without the kernels that do so.

On a CPU the kernels of `tf.transpose` and `tf.concat` hand their work to other
threads, which costs some 0.07 ms whatever the size; 81 × 80 numbers move
in a tenth of that.
"""

from __future__ import annotations

import tensorflow as tf

# Elements of a matrix from and up to which padding is cheaper on a CPU.
_FEW, _MANY = 2**14, 2**17
# Multiplications up to which a product with the identity is cheaper on a CPU.
_SMALL = 2**21


def transposed(matrix: tf.Tensor) -> tf.Tensor:
    """Returns the transpose of a matrix, the same numbers.

    A product with the identity is exact on a CPU (`0 · g` is zero: g must be
    finite). An accelerator transposes, as its products may round.

    Args:
        matrix: Tensor `[n, m]`.
    """
    matrix = tf.convert_to_tensor(matrix)
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


def append_row(matrix: tf.Tensor, row: tf.Tensor) -> tf.Tensor:
    """Returns the rows of a matrix and one more.

    Args:
        matrix: Tensor `[..., n, m]`.
        row: Tensor `[..., 1, m]`.
    """
    matrix = tf.convert_to_tensor(matrix)
    count = matrix.shape.num_elements()
    medium = count is not None and _FEW <= count <= _MANY
    if matrix.shape.rank != 2 or not medium or _has_accelerator():
        return tf.concat([matrix, row], axis=-2)
    above = tf.pad(matrix, [[0, 1], [0, 0]])
    return above + tf.pad(row, [[matrix.shape[0], 0], [0, 0]])


def _has_accelerator() -> bool:
    """Returns whether TensorFlow sees any device but CPUs."""
    devices = tf.config.get_visible_devices()
    return any(device.device_type != "CPU" for device in devices)
