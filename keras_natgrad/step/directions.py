"""Arithmetic on directions: lists of matrices, one per block."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from keras_natgrad.linalg import scalar

Direction = Sequence[tf.Tensor]


class Ridge(NamedTuple):
    """Curvature of the L2 regularizers on the rows of a block's matrix.

    Attributes:
        rest: Of all rows but the last.
        last: Of the last row, the bias of a layer that has one.
    """

    rest: float
    last: float


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
    directions: Sequence[Direction],
    damping: tf.Tensor,
    ridge: Sequence[Ridge],
    metrics: Sequence[tf.Tensor | None],
) -> tf.Tensor:
    """Returns `δ_iᵀ (λ D + R) δ_j` with R the curvature of regularizers.

    Args:
        directions: One or two directions.
        damping: Scalar λ.
        ridge: `Ridge` of every block.
        metrics: The diagonal D of every block, see `metric_dot`.

    Returns:
        Tensor `[2, 2]`, padded with zeros.
    """

    def entry(left: Direction, right: Direction) -> tf.Tensor:
        parts = [damping * metric_dot(left, right, metrics)]
        for a, b, own in zip(left, right, ridge, strict=True):
            if own.rest:
                parts.append(scalar(own.rest, a.dtype) * _inner(a, b))
            if own.last != own.rest:
                extra = scalar(own.last - own.rest, a.dtype)
                parts.append(extra * _inner(a[..., -1, :], b[..., -1, :]))
        return tf.add_n(parts)

    first, *others = directions
    if not others:
        return pad_gram(entry(first, first)[tf.newaxis, tf.newaxis])
    cross = entry(first, others[0])
    return tf.stack(
        [
            tf.stack([entry(first, first), cross]),
            tf.stack([cross, entry(others[0], others[0])]),
        ]
    )


def metric_dot(
    left: Direction, right: Direction, metrics: Sequence[tf.Tensor | None]
) -> tf.Tensor:
    """Returns `δ_iᵀ D δ_j` for the diagonal metrics D of the blocks' damping.

    Args:
        left: One direction.
        right: Another.
        metrics: Per block a tensor `[rows]`, the entries of D for the rows of
            its matrix; `None` for the identity.
    """
    parts = []
    for a, b, rows in zip(left, right, metrics, strict=True):
        if rows is None:
            parts.append(_inner(a, b))
        else:
            products = tf.reduce_sum(a * b, axis=-1)
            parts.append(tf.reduce_sum(rows * products))
    return tf.add_n(parts)


def in_metric(matrix: tf.Tensor, rows: tf.Tensor | None) -> tf.Tensor:
    """Returns `D δ` for the diagonal metric D of a block's damping.

    Args:
        matrix: Tensor `[..., rows, columns]`.
        rows: Tensor `[rows]`, the entries of D; `None` for the identity.
    """
    return matrix if rows is None else rows[:, tf.newaxis] * matrix


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
    """Returns Σ a b; a fused kernel squares without a product tensor."""
    if left is right:
        return 2 * tf.nn.l2_loss(left)
    return tf.reduce_sum(left * right)
