"""Arithmetic on directions: lists of matrices, one per block."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

Direction = Sequence[tf.Tensor]


def dot(left: Direction, right: Direction) -> tf.Tensor:
    """Returns the inner product of two directions."""
    return tf.add_n([_inner(a, b) for a, b in zip(left, right, strict=True)])


def pad_pair(values: Sequence[tf.Tensor]) -> tf.Tensor:
    """Stacks one or two scalars to `[2]`, a missing one being zero."""
    padded = [*values, tf.zeros_like(values[0])]
    return tf.stack(padded[:2])


def pad_gram(gram: tf.Tensor) -> tf.Tensor:
    """Pads a `[1, 1]` Gram matrix with zeros to `[2, 2]`."""
    missing = 2 - int(gram.shape[0])
    return tf.pad(gram, [[0, missing], [0, missing]])


def ridge_gram(
    directions: Sequence[Direction], damping: tf.Tensor, ridge: Sequence[Any]
) -> tf.Tensor:
    """Returns `δ_iᵀ (λ I + R) δ_j` with R the curvature of regularizers.

    Args:
        directions: One or two directions.
        damping: Scalar λ.
        ridge: R per block, a float or a column `[rows, 1]`.

    Returns:
        Tensor `[2, 2]`, padded with zeros.
    """
    plain = all(isinstance(r, float) and r == 0.0 for r in ridge)

    def entry(left: Direction, right: Direction) -> tf.Tensor:
        product = damping * dot(left, right)
        if plain:
            return product
        weighted = [
            tf.cast(r, a.dtype) * a for r, a in zip(ridge, left, strict=True)
        ]
        return product + dot(weighted, right)

    return pad_gram(
        tf.stack(
            [tf.stack([entry(a, b) for b in directions]) for a in directions]
        )
    )


def l2_curvature(regularizer: Any) -> float:
    """Returns the curvature of an L2 penalty `c ‖w‖²`, which is `2 c`.

    Other regularizers enter the gradient only.
    """
    if isinstance(regularizer, keras.regularizers.L2) or isinstance(
        regularizer, keras.regularizers.L1L2
    ):
        return 2.0 * float(regularizer.l2)
    return 0.0


def _inner(left: tf.Tensor, right: tf.Tensor) -> tf.Tensor:
    """Returns Σ a b in one pass over memory, without a product tensor."""
    row, column = tf.reshape(left, [1, -1]), tf.reshape(right, [-1, 1])
    return tf.matmul(row, column)[0, 0]
