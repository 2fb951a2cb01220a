"""The diagonal of the Fisher, and what all diagonal blocks share."""

from __future__ import annotations

import tensorflow as tf
from typing_extensions import override

from keras_natgrad.blocks.base import Block, Statistics
from keras_natgrad.blocks.state import count_failures, keep_good
from keras_natgrad.linalg import Rows, expand_to, gradient_squares


class DiagonalCurvature(Block):
    """A block whose Fisher is a diagonal: one average and its inverse.

    Both have `state_shape`, which broadcasts to `matrix`. Subclasses say what
    statistic the diagonal is the average of.
    """

    stacks = True

    @property
    def state_shape(self) -> tuple[int, ...]:
        """Shape of the average and of the inverse."""
        return self.matrix

    @override
    def build_state(self) -> None:
        self.add_average("diagonal", self.state_shape)
        self._inverse = self.add_cache("inverse", self.state_shape)

    @override
    def input_statistics(self, inputs: Rows, weights: tf.Tensor) -> Statistics:
        return {}

    @override
    def trace(self) -> tf.Tensor:
        diagonal = tf.convert_to_tensor(self._averages["diagonal"].value)
        return self.debias(self.layer_sums(diagonal))

    @override
    def refresh(
        self, damping: tf.Tensor, ratio: tf.Tensor | None = None
    ) -> tuple[tf.Tensor, tf.Tensor]:
        diagonal = self.average("diagonal")
        damping = expand_to(
            tf.cast(damping, diagonal.dtype), diagonal.shape.rank
        )
        inverse = tf.math.reciprocal(diagonal + damping)
        finite = tf.math.is_finite(self.layer_sums(inverse))
        keep_good(self._inverse, inverse, finite)
        return tf.constant(0, tf.int32), count_failures(finite)

    @override
    def precondition(self, gradient: tf.Tensor) -> tf.Tensor:
        inverse = tf.convert_to_tensor(self._inverse.value)
        return expand_to(inverse, len(self.matrix)) * gradient

    @override
    def operator(self) -> tf.linalg.LinearOperator:
        flat = self._flat(self.average("diagonal"))
        return tf.linalg.LinearOperatorDiag(flat, is_self_adjoint=True)

    @override
    @property
    def spectrum_side(self) -> int:
        return 1

    @override
    def spectra(self) -> dict[str, tf.Tensor]:
        return {"fisher": self._flat(self.average("diagonal"))}

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
    """

    kind = "diagonal"
    treats_two_way = True
    treats_groups = True

    @override
    def cotangent_statistics(
        self, inputs: Rows, cotangents: tf.Tensor
    ) -> Statistics:
        return {"diagonal": gradient_squares(inputs, cotangents)}
