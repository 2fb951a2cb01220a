"""No curvature at all."""

from __future__ import annotations

import tensorflow as tf
from typing_extensions import override

from keras_natgrad.blocks.base import Block, Statistics
from keras_natgrad.linalg import Rows, expand_to


class IdentityBlock(Block):
    """Takes the Fisher of a layer for zero: damping alone, no statistics.

    The preconditioned gradient is the gradient over λ. It costs nothing; the
    optimizers that treat the whole network at once use it for the shapes.
    """

    kind = "identity"
    uses_cotangents = False
    treats_two_way = True
    treats_groups = True
    stacks = True

    @override
    def build_state(self) -> None:
        self._damping = self.add_cache("damping", self.axis)

    @override
    def input_statistics(self, inputs: Rows, weights: tf.Tensor) -> Statistics:
        return {}

    @override
    def cotangent_statistics(
        self, inputs: Rows, cotangents: tf.Tensor
    ) -> Statistics:
        return {}

    @override
    def trace(self) -> tf.Tensor:
        return tf.zeros(self.axis, self.dtype)

    @override
    def refresh(
        self, damping: tf.Tensor, ratio: tf.Tensor | None = None
    ) -> tuple[tf.Tensor, tf.Tensor]:
        damping = tf.cast(damping, self.dtype)
        self._damping.assign(tf.broadcast_to(damping, self.axis))
        return tf.constant(0, tf.int32), tf.constant(0, tf.int32)

    @override
    def precondition(self, gradient: tf.Tensor) -> tf.Tensor:
        damping = tf.convert_to_tensor(self._damping.value)
        damping = expand_to(damping, len(self.matrix))
        return tf.math.divide_no_nan(gradient, damping)

    @override
    def operator(self) -> tf.linalg.LinearOperator:
        return tf.linalg.LinearOperatorZeros(
            self.shape.size, dtype=tf.as_dtype(self.dtype), is_self_adjoint=True
        )

    @override
    @property
    def spectrum_side(self) -> int:
        return 1

    @override
    def spectra(self) -> dict[str, tf.Tensor]:
        return {"fisher": tf.zeros([self.shape.size], self.dtype)}

    @override
    def inverse_spectra(self) -> dict[str, tf.Tensor] | None:
        ones = tf.ones([self.shape.size], self.dtype)
        return {"fisher": tf.math.divide_no_nan(ones, self._damping.value)}
