"""A Kronecker product for matrices whose layer is not captured."""

from __future__ import annotations

import math

import tensorflow as tf
from typing_extensions import override

from keras_natgrad.blocks.base import Statistics
from keras_natgrad.blocks.factors import make_factor, refresh_pair
from keras_natgrad.blocks.fallback import GradientBlock
from keras_natgrad.blocks.shape import BlockShape
from keras_natgrad.linalg import expand_to, kronecker_operator


class GradientKroneckerBlock(GradientBlock):
    r"""The Fisher of a matrix from the second moments of its batch gradient.

    A variable counts as a matrix, its last axis being the columns. With the
    batch gradient `g` of cotangents of random sign, `E[vec g vec gᵀ] = F`,

        L = E[g gᵀ],   R = E[gᵀ g],   F ≈ L ⊗ R / tr L.

    Both factors are partial traces of F, so that `tr L = tr R = tr F` and the
    trace of F is kept. The product is exact where F is a Kronecker product:
    `F = A ⊗ B` has `L = A tr B` and `R = B tr A`. Otherwise it is one step of
    the power iteration to the closest Kronecker product, started at the
    identity (Morwani et al. 2024); the factors are those of Shampoo, of the
    Fisher in place of the empirical gradients. One batch gives the factors the
    rank of one gradient, so that they are noisier than those of captured
    layers.

    Damping is factored as in `KroneckerBlock`, with the π of this layer alone:
    how the scale of F is split over L and R says nothing of other layers.
    A factor larger than `max_factor_size` is kept as its diagonal.

    Cost: `r c (r + c)` for the statistics and to precondition, `r³ + c³` for
    a refresh, `2 (r² + c²)` memory.

    Args:
        max_factor_size: Largest side of a dense factor.

    References:
        - Gupta, Koren & Singer, 2018, arXiv:1802.09568 (Shampoo).
        - Morwani et al., 2024, arXiv:2406.17748.
    """

    kind = "gradient_kronecker"

    stacks = True

    def __init__(self, max_factor_size: int = 4096) -> None:
        self.max_factor_size = max_factor_size

    @override
    def prepare(self) -> None:
        rows, columns = self.shape.rows, self.shape.columns
        self._left = make_factor(self, rows, self.max_factor_size)
        self._right = make_factor(self, columns, self.max_factor_size)

    @override
    @classmethod
    def view(cls, shape: tuple[int, ...]) -> BlockShape:
        return BlockShape(math.prod(shape[:-1]), shape[-1])

    @override
    def build_state(self) -> None:
        sides = (("left", self._left), ("right", self._right))
        for name, factor in sides:
            factor.average = self.add_average(f"{name}_factor", factor.shape)
        for name, factor in sides:
            factor.inverse = self.add_cache(f"{name}_inverse", factor.shape)

    @override
    def gradient_statistics(self, gradient: tf.Tensor) -> Statistics:
        transposed = tf.transpose(gradient)
        return {
            "left_factor": self._left.second_moment(transposed[tf.newaxis]),
            "right_factor": self._right.second_moment(gradient[tf.newaxis]),
        }

    def _factors(self) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns `L / √tr L` and `R / √tr L`, whose product is the Fisher."""
        left, right = self.averages().values()
        root = tf.sqrt(self._left.trace(left))
        return (
            tf.math.divide_no_nan(left, expand_to(root, left.shape.rank)),
            tf.math.divide_no_nan(right, expand_to(root, right.shape.rank)),
        )

    @override
    def trace(self) -> tf.Tensor:
        return self._left.trace(self.average("left_factor"))

    @override
    def refresh(
        self, damping: tf.Tensor, ratio: tf.Tensor | None = None
    ) -> tuple[tf.Tensor, tf.Tensor]:
        return refresh_pair(
            (self._left, self._right), self._factors(), damping, None
        )

    @override
    def precondition(self, gradient: tf.Tensor) -> tf.Tensor:
        return self._right.apply_right(self._left.apply_left(gradient))

    @override
    def operator(self) -> tf.linalg.LinearOperator:
        left, right = self._factors()
        return kronecker_operator(
            self._left.operator(left), self._right.operator(right)
        )

    @override
    @property
    def spectrum_side(self) -> int:
        return max(self._left.spectrum_side, self._right.spectrum_side)

    @override
    def spectra(self) -> dict[str, tf.Tensor]:
        left, right = self._factors()
        return {
            "left": self._left.eigenvalues(left),
            "right": self._right.eigenvalues(right),
        }

    @override
    def inverse_spectra(self) -> dict[str, tf.Tensor] | None:
        left, right = self._left, self._right
        return {
            "left": left.eigenvalues(left.inverse.value),
            "right": right.eigenvalues(right.inverse.value),
        }

    @override
    def describe(self) -> str:
        return f"{self._left.describe()} ⊗ {self._right.describe()}"
