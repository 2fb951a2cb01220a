"""The canonical form of a matrix that is used as W and as Wᵀ."""

from __future__ import annotations

from typing import NamedTuple

import tensorflow as tf

from keras_natgrad.linalg.rows import (
    Rows,
    StructuredRows,
    multiply,
    take_examples,
)


class TwoWayRows(NamedTuple):
    """Inputs of a matrix `[n, m]` that is used as W and as Wᵀ.

    The gradient of one example is `Σ_s ā_s g_sᵀ + Σ_t u_t h_tᵀ`, with the
    inputs ā and h known in the forward pass and the cotangents g and u in the
    backward pass.

    Attributes:
        direct: ā, `[batch, shared, n]`, or `StructuredRows`.
        transposed: h, `[batch, shared, m]`, with positions of its own.
    """

    direct: Rows
    transposed: tf.Tensor

    @property
    def dtype(self) -> tf.DType:
        """Dtype of the rows."""
        return self.transposed.dtype

    def take(self, examples: tf.Tensor) -> TwoWayRows:
        """Returns the rows of some examples."""
        return TwoWayRows(
            take_examples(self.direct, examples),
            take_examples(self.transposed, examples),
        )

    def contract(self, cotangents: TwoWayCotangents) -> tf.Tensor:
        """Returns the per-example gradients, `[batch, n, m]`."""
        transposed = tf.matmul(
            cotangents.transposed, self.transposed, transpose_a=True
        )
        return contract_rows(self.direct, cotangents.direct) + transposed


class TwoWayCotangents(NamedTuple):
    """Cotangents of a matrix `[n, m]` that is used as W and as Wᵀ.

    Attributes:
        direct: g, `[batch, shared, m]`.
        transposed: u, `[batch, shared, n]`, with positions of its own.
    """

    direct: tf.Tensor
    transposed: tf.Tensor


def contract_rows(
    inputs: Rows | TwoWayRows, cotangents: tf.Tensor | TwoWayCotangents
) -> tf.Tensor:
    """Returns the per-example gradients `Σ_s ā_s g_sᵀ`.

    Args:
        inputs: `[(groups,) batch, shared, n]`, `StructuredRows`, or
            `TwoWayRows`.
        cotangents: `[(groups,) batch, shared, m]`, or `TwoWayCotangents`.

    Returns:
        Tensor `[(groups,) batch, n, m]`.
    """
    if isinstance(inputs, (StructuredRows, TwoWayRows)):
        return inputs.contract(cotangents)
    return tf.matmul(inputs, cotangents, transpose_a=True)


def tangent_rows(
    inputs: Rows | TwoWayRows, direction: tf.Tensor
) -> tf.Tensor | TwoWayCotangents:
    """Returns `δᵀ ā_s`: how the layer's own weights move its responses.

    Args:
        inputs: See `contract_rows`.
        direction: δ, `[(groups,) n, m]`.

    Returns:
        Tensors of the shapes of the cotangents.
    """
    if isinstance(inputs, TwoWayRows):
        back = tf.linalg.matrix_transpose(direction)
        return TwoWayCotangents(
            multiply(inputs.direct, direction),
            multiply(inputs.transposed, back),
        )
    return multiply(inputs, direction)


def example_dots(
    left: tf.Tensor | TwoWayCotangents, right: tf.Tensor | TwoWayCotangents
) -> tf.Tensor:
    """Returns `Σ_s l_sᵀ r_s` of every example, `[batch]`.

    Args:
        left: `[(groups,) batch, shared, m]`, or `TwoWayCotangents`.
        right: The same.
    """
    if isinstance(left, TwoWayCotangents):
        assert isinstance(right, TwoWayCotangents)
        return example_dots(left.direct, right.direct) + example_dots(
            left.transposed, right.transposed
        )
    axes = "gbsm" if left.shape.rank == 4 else "bsm"
    return tf.einsum(f"{axes},{axes}->b", left, right)


def slopes(
    inputs: Rows | TwoWayRows,
    cotangents: tf.Tensor | TwoWayCotangents,
    direction: tf.Tensor,
) -> tf.Tensor:
    """Returns `⟨Σ_s ā_s g_sᵀ, δ⟩` of every example, `[batch]`.

    Args:
        inputs: See `contract_rows`.
        cotangents: See `contract_rows`.
        direction: δ, `[(groups,) n, m]`.
    """
    return example_dots(cotangents, tangent_rows(inputs, direction))
