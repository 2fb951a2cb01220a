"""The exact Fisher block of a small layer."""

from __future__ import annotations

import tensorflow as tf
from typing_extensions import override

from keras_natgrad.blocks.base import Block, BlockShape
from keras_natgrad.linalg import (
    Rows,
    block_diagonal,
    contract_rows,
    damped_inverse,
)


class FullBlock(Block):
    """The full Fisher of a layer, `Σ_n vec(Σ_s ā g ᵀ) vec(Σ_s ā gᵀ)ᵀ`.

    Cost: `N (n m)²` for the statistics, `(n m)³` for a refresh, `2 (n m)²`
    memory; for layers of up to a few hundred parameters. A layer with groups
    has one such matrix per group.

    Args:
        shape: `BlockShape`.
    """

    kind = "full"
    treats_two_way = True
    treats_groups = True

    @override
    def build_state(self) -> None:
        side = self.shape.matrix_size
        square = (*self.shape.lead, side, side)
        self.add_average("fisher", square)
        self._inverse = self.add_cache("inverse", square)

    @override
    @classmethod
    def state_size(cls, shape: BlockShape) -> int:
        return 2 * shape.size * shape.matrix_size

    @override
    def input_statistics(
        self, inputs: Rows, weights: tf.Tensor
    ) -> tuple[tf.Tensor, ...]:
        return ()

    @override
    def cotangent_statistics(
        self, inputs: Rows, cotangents: tf.Tensor
    ) -> tuple[tf.Tensor, ...]:
        gradients = tf.reshape(
            contract_rows(inputs, cotangents),
            [*self.shape.lead, -1, self.shape.matrix_size],
        )
        return (tf.matmul(gradients, gradients, transpose_a=True),)

    @override
    def trace(self) -> tf.Tensor:
        return self.debias(
            tf.reduce_sum(tf.linalg.trace(self._averages[0].value))
        )

    @override
    def refresh(
        self, damping: tf.Tensor, ratio: tf.Tensor | None = None
    ) -> tuple[tf.Tensor, tf.Tensor]:
        result = damped_inverse(self.averages()[0], damping)
        self._inverse.assign(
            tf.where(result.succeeded, result.inverse, self._inverse.value)
        )
        return result.retries, tf.cast(~result.succeeded, tf.int32)

    @override
    def precondition(self, gradient: tf.Tensor) -> tf.Tensor:
        side = self.shape.matrix_size
        flat = tf.reshape(gradient, [*self.shape.lead, side, 1])
        return tf.reshape(
            tf.matmul(self._inverse.value, flat), tf.shape(gradient)
        )

    @override
    def operator(self) -> tf.linalg.LinearOperator:
        operator = tf.linalg.LinearOperatorFullMatrix(
            self.averages()[0], is_self_adjoint=True
        )
        return block_diagonal(operator, self.shape.groups)

    @override
    @property
    def spectrum_side(self) -> int:
        return self.shape.matrix_size

    @override
    def spectra(self) -> dict[str, tf.Tensor]:
        return {"fisher": tf.linalg.eigvalsh(self.averages()[0])}

    @override
    def inverse_spectra(self) -> dict[str, tf.Tensor] | None:
        return {"fisher": tf.linalg.eigvalsh(self._inverse.value)}
