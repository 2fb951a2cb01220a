"""The exact Fisher block of a small layer."""

from __future__ import annotations

import tensorflow as tf
from typing_extensions import override

from keras_natgrad.blocks.base import Block, Statistics
from keras_natgrad.blocks.state import count_failures, keep_good
from keras_natgrad.linalg import (
    Rows,
    block_diagonal,
    contract_rows,
    damped_inverse,
    diagonal_of,
    expand_to,
)


class FullBlock(Block):
    """The full Fisher of a layer, `Σ_n vec(Σ_s ā g ᵀ) vec(Σ_s ā gᵀ)ᵀ`.

    Cost: `N (n m)²` for the statistics, `(n m)³` for a refresh, `2 (n m)²`
    memory; for layers of up to a few hundred parameters. A layer with groups
    has one such matrix per group.

    """

    kind = "full"
    treats_two_way = True
    treats_groups = True
    stacks = True

    @override
    def build_state(self) -> None:
        side = self.shape.matrix_size
        square = (*self.lead, side, side)
        self.add_average("fisher", square)
        self._inverse = self.add_cache("inverse", square)

    @override
    def input_statistics(self, inputs: Rows, weights: tf.Tensor) -> Statistics:
        return {}

    @override
    def cotangent_statistics(
        self, inputs: Rows, cotangents: tf.Tensor
    ) -> Statistics:
        gradients = tf.reshape(
            contract_rows(inputs, cotangents),
            [*self.shape.lead, -1, self.shape.matrix_size],
        )
        fisher = tf.matmul(gradients, gradients, transpose_a=True)
        return {"fisher": fisher}

    @override
    def trace(self) -> tf.Tensor:
        diagonal = diagonal_of(self._averages["fisher"].value)
        return self.debias(self.layer_sums(diagonal))

    @override
    def refresh(
        self, damping: tf.Tensor, ratio: tf.Tensor | None = None
    ) -> tuple[tf.Tensor, tf.Tensor]:
        damping = expand_to(damping, len(self.lead))
        units = len(self.axis)
        result = damped_inverse(self.average("fisher"), damping, units)
        keep_good(self._inverse, result.inverse, result.succeeded)
        return result.retries, count_failures(result.succeeded)

    @override
    def precondition(self, gradient: tf.Tensor) -> tf.Tensor:
        side = self.shape.matrix_size
        flat = tf.reshape(gradient, [*self.lead, side, 1])
        return tf.reshape(tf.matmul(self._inverse.value, flat), self.matrix)

    @override
    def operator(self) -> tf.linalg.LinearOperator:
        operator = tf.linalg.LinearOperatorFullMatrix(
            self.average("fisher"), is_self_adjoint=True
        )
        return block_diagonal(operator, self.shape.groups)

    @override
    @property
    def spectrum_side(self) -> int:
        return self.shape.matrix_size

    @override
    def spectra(self) -> dict[str, tf.Tensor]:
        return {"fisher": tf.linalg.eigvalsh(self.average("fisher"))}

    @override
    def inverse_spectra(self) -> dict[str, tf.Tensor] | None:
        return {"fisher": tf.linalg.eigvalsh(self._inverse.value)}
