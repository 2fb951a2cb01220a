"""The diagonal of the Fisher, and what all diagonal blocks share."""

from __future__ import annotations

import tensorflow as tf
from typing_extensions import override

from keras_natgrad.blocks.base import Block, BlockShape
from keras_natgrad.linalg import Rows, gradient_squares


class DiagonalCurvature(Block):
    """A block whose Fisher is a diagonal: one average and its inverse.

    Both have `state_shape`, which broadcasts to `[(groups,) rows, columns]`.
    Subclasses say what statistic the diagonal is the average of.

    Args:
        shape: `BlockShape`.
    """

    @property
    def state_shape(self) -> tuple[int, ...]:
        """Shape of the average and of the inverse."""
        return self.shape.matrix

    @override
    def build_state(self) -> None:
        self.add_average("diagonal", self.state_shape)
        self._inverse = self.add_cache("inverse", self.state_shape)

    @override
    @classmethod
    def state_size(cls, shape: BlockShape) -> int:
        return 2 * shape.size

    @override
    def input_statistics(
        self, inputs: Rows, weights: tf.Tensor
    ) -> tuple[tf.Tensor, ...]:
        return ()

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
        flat = self._flat(self.averages()[0])
        return tf.linalg.LinearOperatorDiag(flat, is_self_adjoint=True)

    @override
    @property
    def spectrum_side(self) -> int:
        return 1

    @override
    def spectra(self) -> dict[str, tf.Tensor]:
        return {"fisher": self._flat(self.averages()[0])}

    @override
    def inverse_spectra(self) -> dict[str, tf.Tensor] | None:
        return {"fisher": self._flat(self._inverse.value)}

    def _flat(self, diagonal: tf.Tensor) -> tf.Tensor:
        return tf.reshape(tf.broadcast_to(diagonal, self.shape.matrix), [-1])


class DiagonalBlock(DiagonalCurvature):
    """The diagonal of a layer's Fisher, `Σ_n (Σ_s ā_s g_sᵀ)²`.

    Where a layer has one shared position the squares factor, and the
    diagonal is `(ā²)ᵀ g²` without per-example gradients. With one-hot inputs
    only positions of one token meet, `N S²` memory for the time of the update.
    Otherwise the gradients are formed, `N n m`.

    Args:
        shape: `BlockShape`.
    """

    kind = "diagonal"
    treats_two_way = True
    treats_groups = True

    @override
    def cotangent_statistics(
        self, inputs: Rows, cotangents: tf.Tensor
    ) -> tuple[tf.Tensor, ...]:
        return (gradient_squares(inputs, cotangents),)
