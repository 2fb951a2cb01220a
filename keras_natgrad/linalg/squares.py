"""Sums of squared per-example gradients."""

from __future__ import annotations

import tensorflow as tf

from keras_natgrad.linalg.one_hot import OneHot
from keras_natgrad.linalg.rows import Rows, position_count, to_dense
from keras_natgrad.linalg.two_way import (
    TwoWayCotangents,
    TwoWayRows,
    contract_rows,
)


def gradient_squares(
    inputs: Rows | TwoWayRows,
    cotangents: tf.Tensor | TwoWayCotangents,
    basis: tf.Tensor | None = None,
) -> tf.Tensor:
    """Returns `Σ_n (Qᵀ Σ_s ā_s g_sᵀ)²`, the squares entry by entry.

    With one shared position the squares factor, `((ā Q)²)ᵀ g²`. With one-hot
    inputs and no basis `OneHot` has a way of its own. Otherwise the
    per-example gradients are formed, `N n m` memory.

    Args:
        inputs: `[(groups,) batch, shared, n]`, `StructuredRows`, or
            `TwoWayRows`.
        cotangents: `[(groups,) batch, shared, m]`, or `TwoWayCotangents`.
        basis: Q, `[(groups,) n, n]`, or `None` for the identity.

    Returns:
        Tensor `[(groups,) n, m]`.
    """

    def several_positions() -> tf.Tensor:
        gradients = contract_rows(inputs, cotangents)
        if basis is not None:
            turn = basis[..., tf.newaxis, :, :]
            gradients = tf.matmul(turn, gradients, transpose_a=True)
        return tf.reduce_sum(tf.square(gradients), axis=-3)

    if isinstance(inputs, TwoWayRows) or isinstance(
        cotangents, TwoWayCotangents
    ):
        return several_positions()

    def one_position() -> tf.Tensor:
        rows = to_dense(inputs)[..., 0, :]
        if basis is not None:
            rows = tf.matmul(rows, basis)
        squares = tf.square(cotangents[..., 0, :])
        return tf.matmul(tf.square(rows), squares, transpose_a=True)

    if isinstance(inputs, OneHot) and basis is None:
        return inputs.gradient_squares(cotangents)
    single = tf.equal(position_count(inputs), 1)
    return tf.cond(single, one_position, several_positions)
