"""Blocks for variables whose layer has no captured linear map."""

from __future__ import annotations

import abc
import math

import tensorflow as tf
from typing_extensions import override

from keras_natgrad.blocks.base import Block, Statistics
from keras_natgrad.blocks.diagonal import DiagonalCurvature
from keras_natgrad.blocks.shape import BlockShape
from keras_natgrad.linalg import Rows


class GradientBlock(Block):
    """A block that needs nothing of its layer but batch gradients.

    With cotangents of independent random sign per example, the products of
    two entries of the batch gradient `Σ_n ± J_nᵀ u_n` average to those of
    `Σ_n (J_nᵀ u_n)(J_nᵀ u_n)ᵀ`, the Fisher, because the cross terms cancel:
    `E[vec g vec gᵀ] = F`.

    It is bound to the shape that `view` makes of the variable's.
    """

    @classmethod
    def view(cls, shape: tuple[int, ...]) -> BlockShape:
        """Returns the matrix that a variable of this shape counts as."""
        return BlockShape(math.prod(shape), 1)

    @override
    def input_statistics(self, inputs: Rows, weights: tf.Tensor) -> Statistics:
        return {}

    @override
    def cotangent_statistics(
        self, inputs: Rows, cotangents: tf.Tensor
    ) -> Statistics:
        raise TypeError(f"{type(self).__name__} takes gradient_statistics.")

    @abc.abstractmethod
    def gradient_statistics(self, gradient: tf.Tensor) -> Statistics:
        """Returns the statistics of one `[rows, columns]` batch gradient."""


class GradientDiagonalBlock(GradientBlock, DiagonalCurvature):
    """The Fisher's diagonal from gradients summed over the batch.

    The square of a batch gradient with random signs averages to the diagonal.
    It is noisier than `DiagonalBlock`. The variable counts as a `[size, 1]`
    matrix.
    """

    kind = "gradient_diagonal"

    @override
    def gradient_statistics(self, gradient: tf.Tensor) -> Statistics:
        return {"diagonal": tf.square(gradient)}


class GradientScalarBlock(GradientDiagonalBlock):
    """First order: the gradient, scaled by the mean of the diagonal.

    The variable moves along its plain gradient; only the length of the step
    knows the curvature.
    """

    kind = "first_order"

    @override
    @property
    def state_shape(self) -> tuple[int, ...]:
        return self.axis

    @override
    def gradient_statistics(self, gradient: tf.Tensor) -> Statistics:
        return {"diagonal": tf.reduce_mean(tf.square(gradient))}

    @override
    def trace(self) -> tf.Tensor:
        return self.shape.size * self.average("diagonal")


class PlainGradientBlock(GradientDiagonalBlock):
    """No curvature: the variable moves along its plain gradient, undamped.

    As the layers of `InputFactorBlock` would, had they white inputs.
    """

    kind = "plain"
    uses_cotangents = False

    @override
    def build_state(self) -> None:
        """There is none."""

    @override
    def gradient_statistics(self, gradient: tf.Tensor) -> Statistics:
        return {}

    @override
    def trace(self) -> tf.Tensor:
        return tf.fill(self.axis, tf.constant(self.shape.size, self.dtype))

    @override
    def refresh(
        self, damping: tf.Tensor, ratio: tf.Tensor | None = None
    ) -> tuple[tf.Tensor, tf.Tensor]:
        return tf.constant(0, tf.int32), tf.constant(0, tf.int32)

    @override
    def precondition(self, gradient: tf.Tensor) -> tf.Tensor:
        return gradient

    @override
    def operator(self) -> tf.linalg.LinearOperator:
        return tf.linalg.LinearOperatorIdentity(
            self.shape.size, dtype=tf.as_dtype(self.dtype)
        )

    @override
    def spectra(self) -> dict[str, tf.Tensor]:
        return {"fisher": tf.ones([self.shape.size], self.dtype)}

    @override
    def inverse_spectra(self) -> dict[str, tf.Tensor] | None:
        return self.spectra()
