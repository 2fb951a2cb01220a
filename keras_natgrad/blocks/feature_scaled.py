"""Kronecker factors for inputs whose features have units of their own."""

from __future__ import annotations

import tensorflow as tf
from typing_extensions import override

from keras_natgrad.blocks.base import Statistics
from keras_natgrad.blocks.factors import invert_pair
from keras_natgrad.blocks.kronecker import KroneckerBlock
from keras_natgrad.blocks.shape import BlockShape
from keras_natgrad.blocks.state import count_failures, keep_good
from keras_natgrad.linalg import (
    Rows,
    diagonal_of,
    position_count,
    position_mean,
    to_dense,
)

# A feature that is active less often shows too little to know its unit by.
_RARELY = 0.05
# Smallest entry of the metric: features 10⁶ times smaller than the largest.
_SMALLEST = 1e-12


class FeatureScaledBlock(KroneckerBlock):
    r"""K-FAC with the damping of every input feature in the feature's unit.

    Damping `λI` holds all weights equally. The weights of a feature that is
    measured in a unit 1000 times as large have to move 1000 times as far for
    the same effect, and are held too much (Marquardt 1963). Here the damping is
    `λ D ⊗ I` with the diagonal

        D_i = s_i² / max_j s_j²,   s_i = E[x_i²] / E|x_i|,

    s being the typical size of a feature where it is not zero. With `λI` for
    the standardised features this is the same step in other coordinates, up to
    a common factor. A feature with `(E|x|)² < 0.05 E[x²]` is zero nearly always
    and keeps `D_i = 1`; so does everything where all sizes are equal.

    The inverse is `D^-½ (D^-½ A D^-½ + π√λ I)⁻¹ D^-½ ⊗ (G + √λ/π I)⁻¹`, and
    `trace` is that of `(D⁻¹ A) ⊗ G`.

    Cost: that of `KroneckerBlock`, two more vectors as memory.

    Args:
        weight_sharing: `"expand"` or `"reduce"`.
        max_factor_size: Largest side of a dense factor.

    References:
        - Marquardt, 1963, doi:10.1137/0111030.
    """

    kind = "feature_scaled"
    treats_groups = False
    leaves_special_layers = False

    @override
    def check_shape(self, shape: BlockShape) -> None:
        if shape.groups is not None or shape.one_hot:
            raise ValueError(
                "The block 'feature_scaled' is for layers with one matrix and "
                "numbers as inputs; use 'kronecker'. "
                f"Received: shape={shape!r}"
            )
        super().check_shape(shape)

    @override
    def build_state(self) -> None:
        super().build_state()
        rows = (*self.lead, self.shape.rows)
        self.add_average("magnitude", rows)
        self._metric = self.add_cache("metric", rows)

    @override
    def input_statistics(self, inputs: Rows, weights: tf.Tensor) -> Statistics:
        statistics = super().input_statistics(inputs, weights)
        if self.weight_sharing.value == "reduce":
            inputs = position_mean(inputs)
        weights = tf.math.divide_no_nan(weights, tf.reduce_sum(weights))
        shared = tf.cast(position_count(inputs), weights.dtype)
        magnitudes = tf.reduce_sum(tf.abs(to_dense(inputs)), axis=1)
        magnitude = tf.linalg.matvec(
            magnitudes, weights / shared, transpose_a=True
        )
        return {**statistics, "magnitude": magnitude}

    @override
    def factors(self) -> tuple[tf.Tensor, tf.Tensor]:
        left, right = super().factors()
        return self._scaled(left, tf.math.rsqrt(self._scales())), right

    def _scaled(self, matrix: tf.Tensor, root: tf.Tensor) -> tf.Tensor:
        """Returns `diag(r) A diag(r)` of a matrix or of a diagonal one."""
        if matrix.shape.rank == root.shape.rank:
            return tf.square(root) * matrix
        return matrix * root[..., tf.newaxis, :] * root[..., tf.newaxis]

    @override
    def factor_traces(self) -> tuple[tf.Tensor, tf.Tensor]:
        _, right = super().factor_traces()
        left = tf.reduce_sum(self._squares() / self._scales(), axis=-1)
        return left, right

    @override
    def refresh(
        self, damping: tf.Tensor, ratio: tf.Tensor | None = None
    ) -> tuple[tf.Tensor, tf.Tensor]:
        result = invert_pair(
            (self._input, self._output), self.factors(), damping, ratio
        )
        scales = self._scales()
        # D^-½ on both sides, once here and not at every step. The inverse and
        # the metric that it was computed in stay together.
        left = self._scaled(result.left, tf.math.rsqrt(scales))
        keep_good(self._metric, scales, result.succeeded)
        self._input.store(left, result.succeeded)
        self._output.store(result.right, result.succeeded)
        return result.retries, count_failures(result.succeeded)

    @override
    def damping_rows(self) -> tf.Tensor | None:
        return tf.convert_to_tensor(self._metric.value)

    @override
    def describe(self) -> str:
        return f"{super().describe()}, damped by feature"

    def _scales(self) -> tf.Tensor:
        """Returns D, `[(layers,) rows]`."""
        square = self._squares()
        magnitude = self.average("magnitude")
        scales = tf.square(tf.math.divide_no_nan(square, magnitude))
        rare = tf.square(magnitude) < _RARELY * square
        usual = tf.where(rare, tf.zeros_like(scales), scales)
        largest = tf.reduce_max(usual, axis=-1, keepdims=True)
        known = (largest > 0) & ~rare & (scales > 0)
        relative = tf.math.divide_no_nan(scales, largest)
        ones = tf.ones_like(scales)
        return tf.where(known, tf.maximum(relative, _SMALLEST), ones)

    def _squares(self) -> tf.Tensor:
        """Returns the features' second moments, `[(layers,) rows]`."""
        left = tf.convert_to_tensor(self._input.average.value)
        dense = left.shape.rank > 1 + len(self.lead)
        return self.debias(diagonal_of(left) if dense else left)
