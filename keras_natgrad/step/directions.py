"""Arithmetic on directions: a tensor `[layers, ...]` for every stack.

Layers of one shape are stacked (see `curvature.Stack`); what is one number per
layer is in the order of the stacks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf

Direction = Sequence[tf.Tensor]


class Ridge(NamedTuple):
    """Curvature of the L2 regularizers on the rows of a layer's matrix.

    Attributes:
        rest: Of all rows but the last.
        last: Of the last row, the bias of a layer that has one.
    """

    rest: float
    last: float


def dots(left: Direction, right: Direction) -> tf.Tensor:
    """Returns the inner product of every layer, `[layers]`."""
    parts = [_inner(a, b) for a, b in zip(left, right, strict=True)]
    return tf.concat(parts, axis=0)


def pad(values: tf.Tensor, size: int) -> tf.Tensor:
    """Pads every axis of a vector or square matrix with zeros to `size`."""
    missing = size - int(values.shape[0])
    return tf.pad(values, [[0, missing]] * values.shape.rank)


def ridge_gram(
    directions: Sequence[Direction],
    damping: tf.Tensor,
    ridge: Sequence[Ridge],
    metrics: Sequence[tf.Tensor | None],
    by_layer: bool = False,
) -> tf.Tensor:
    """Returns `δ_iᵀ (λ D + R) δ_j` with R the curvature of regularizers.

    Args:
        directions: One or two directions.
        damping: Scalar λ.
        ridge: `Ridge` of every layer.
        metrics: The diagonal D of every stack, see `metric_dots`.
        by_layer: Whether every layer's part of the first direction is a
            direction of its own.

    Returns:
        Tensor `[2, 2]`, or `[layers + 1, layers + 1]`, padded with zeros.
    """

    def entries(left: Direction, right: Direction) -> tf.Tensor:
        found = damping * metric_dots(left, right, metrics)
        if any(own.rest for own in ridge):
            rest = tf.constant([own.rest for own in ridge], found.dtype)
            found += rest * dots(left, right)
        if any(own.last != own.rest for own in ridge):
            extra = [own.last - own.rest for own in ridge]
            last = dots(
                [a[..., -1, :] for a in left], [b[..., -1, :] for b in right]
            )
            found += tf.constant(extra, found.dtype) * last
        return found

    first, *others = directions
    own = entries(first, first)
    corner = tf.linalg.diag(own) if by_layer else _total(own)[:, tf.newaxis]
    if not others:
        return pad(corner, int(corner.shape[0]) + 1)
    cross = entries(first, others[0])
    cross = cross if by_layer else _total(cross)
    last = _total(entries(others[0], others[0]))
    return tf.concat(
        [
            tf.concat([corner, cross[:, tf.newaxis]], axis=1),
            tf.concat([cross, last], axis=0)[tf.newaxis],
        ],
        axis=0,
    )


def metric_dots(
    left: Direction, right: Direction, metrics: Sequence[tf.Tensor | None]
) -> tf.Tensor:
    """Returns `δ_iᵀ D δ_j` of every layer, D the metric of the damping.

    Args:
        left: One direction.
        right: Another.
        metrics: Per stack a tensor `[layers, rows]`, the entries of D for the
            rows of the matrices; `None` for the identity.

    Returns:
        Tensor `[layers]`.
    """
    found = []
    for a, b, rows in zip(left, right, metrics, strict=True):
        if rows is None:
            found.append(_inner(a, b))
        else:
            products = tf.reduce_sum(a * b, axis=-1)
            found.append(tf.reduce_sum(rows * products, axis=-1))
    return tf.concat(found, axis=0)


def in_metric(matrix: tf.Tensor, rows: tf.Tensor | None) -> tf.Tensor:
    """Returns `D δ` for the diagonal metric D of a block's damping.

    Args:
        matrix: Tensor `[layers, rows, columns]`.
        rows: Tensor `[layers, rows]`, the entries of D; `None` for the
            identity.
    """
    return matrix if rows is None else rows[..., tf.newaxis] * matrix


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
    """Returns Σ a b of every layer, `[layers]`."""
    axes = list(range(1, left.shape.rank))
    if left is right:
        if left.shape[0] == 1:
            # A fused kernel squares without a product tensor.
            return tf.reshape(2 * tf.nn.l2_loss(left), [1])
        return tf.reduce_sum(tf.square(left), axis=axes)
    return tf.reduce_sum(left * right, axis=axes)


def _total(values: tf.Tensor) -> tf.Tensor:
    """Returns the sum of a vector, `[1]`."""
    return tf.reduce_sum(values, keepdims=True)
