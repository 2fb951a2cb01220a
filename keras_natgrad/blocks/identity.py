"""No curvature at all."""

from __future__ import annotations

import tensorflow as tf
from typing_extensions import override

from keras_natgrad.blocks.base import Block, BlockShape
from keras_natgrad.linalg import Rows


class IdentityBlock(Block):
    """Takes the Fisher of a layer for zero: damping alone, no statistics.

    The preconditioned gradient is the gradient over λ. It costs nothing; the
    optimizers that treat the whole network at once use it for the shapes.

    Args:
        shape: `BlockShape`.
    """

    kind = "identity"
    uses_cotangents = False
    treats_two_way = True
    treats_groups = True

    @override
    def build_state(self) -> None:
        self._damping = self.add_cache("damping", ())

    @override
    @classmethod
    def state_size(cls, shape: BlockShape) -> int:
        return 1

    @override
    def input_statistics(
        self, inputs: Rows, weights: tf.Tensor
    ) -> tuple[tf.Tensor, ...]:
        return ()

    @override
    def cotangent_statistics(
        self, inputs: Rows, cotangents: tf.Tensor
    ) -> tuple[tf.Tensor, ...]:
        return ()

    @override
    def trace(self) -> tf.Tensor:
        return tf.zeros([], self.dtype)

    @override
    def refresh(
        self, damping: tf.Tensor, ratio: tf.Tensor | None = None
    ) -> tuple[tf.Tensor, tf.Tensor]:
        self._damping.assign(tf.cast(damping, self.dtype))
        return tf.constant(0, tf.int32), tf.constant(0, tf.int32)

    @override
    def precondition(self, gradient: tf.Tensor) -> tf.Tensor:
        return tf.math.divide_no_nan(gradient, self._damping.value)

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
