"""Blocks for variables whose layer has no captured linear map."""

from __future__ import annotations

import tensorflow as tf
from typing_extensions import override

from keras_natgrad.blocks.base import Block, BlockShape


class GradientDiagonalBlock(Block):
    """The Fisher's diagonal from gradients summed over the batch.

    With cotangents of independent random sign per example, the square of the
    batch gradient `Σ_n ± J_nᵀ u_n` averages to `Σ_n (J_nᵀ u_n)²`, the
    diagonal, because the cross terms cancel. It needs nothing of the layer
    but its gradient, and is noisier than `DiagonalBlock`.

    The block takes the gradient as its only statistic; the variable counts as
    a `[size, 1]` matrix.

    Args:
        shape: `BlockShape`.
    """

    kind = "gradient_diagonal"

    @override
    def build_state(self) -> None:
        self.add_average("diagonal", self._state_shape)
        self._inverse = self.add_cache("inverse", self._state_shape)

    @property
    def _state_shape(self) -> tuple[int, ...]:
        return (self.shape.rows, self.shape.columns)

    @override
    @classmethod
    def state_size(cls, shape: BlockShape) -> int:
        return 2 * shape.size

    @override
    def input_statistics(
        self, inputs: tf.Tensor, weights: tf.Tensor
    ) -> tuple[tf.Tensor, ...]:
        return ()

    @override
    def cotangent_statistics(
        self, inputs: tf.Tensor, cotangents: tf.Tensor
    ) -> tuple[tf.Tensor, ...]:
        raise TypeError(f"{type(self).__name__} takes gradient_statistics.")

    def gradient_statistics(self, gradient: tf.Tensor) -> tuple[tf.Tensor, ...]:
        """Returns the squared `[rows, columns]` gradient."""
        return (tf.square(gradient),)

    @override
    def trace(self) -> tf.Tensor:
        return tf.reduce_sum(self.averages()[0])

    @override
    def refresh(
        self, damping: tf.Tensor, ratio: tf.Tensor | None = None
    ) -> tuple[tf.Tensor, tf.Tensor]:
        (diagonal,) = self.averages()
        inverse = tf.math.reciprocal(
            diagonal + tf.cast(damping, diagonal.dtype)
        )
        finite = tf.math.is_finite(tf.reduce_sum(inverse))
        self._inverse.assign(tf.where(finite, inverse, self._inverse.value))
        return tf.constant(0, tf.int32), tf.cast(~finite, tf.int32)

    @override
    def precondition(self, gradient: tf.Tensor) -> tf.Tensor:
        return self._inverse.value * gradient

    @override
    def operator(self) -> tf.linalg.LinearOperator:
        (diagonal,) = self.averages()
        flat = tf.reshape(
            tf.broadcast_to(diagonal, [self.shape.rows, self.shape.columns]),
            [-1],
        )
        return tf.linalg.LinearOperatorDiag(flat, is_self_adjoint=True)


class GradientScalarBlock(GradientDiagonalBlock):
    """First order: the gradient, scaled by the mean of the diagonal.

    The variable moves along its plain gradient; only the length of the step
    knows the curvature.

    Args:
        shape: `BlockShape`.
    """

    kind = "first_order"

    @property
    def _state_shape(self) -> tuple[int, ...]:
        return ()

    @override
    @classmethod
    def state_size(cls, shape: BlockShape) -> int:
        return 2

    @override
    def gradient_statistics(self, gradient: tf.Tensor) -> tuple[tf.Tensor, ...]:
        return (tf.reduce_mean(tf.square(gradient)),)

    @override
    def trace(self) -> tf.Tensor:
        return self.shape.size * self.averages()[0]
