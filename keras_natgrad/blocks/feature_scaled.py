"""Kronecker factors for inputs whose features have units of their own."""

from __future__ import annotations

import keras
import tensorflow as tf
from typing_extensions import override

from keras_natgrad.blocks.base import BlockShape
from keras_natgrad.blocks.kronecker import KroneckerBlock
from keras_natgrad.linalg import Rows, position_count, position_mean, to_dense

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
        shape: `BlockShape`, without groups.
        weight_sharing: `"expand"` or `"reduce"`.
        max_factor_size: Largest side of a dense factor.

    References:
        - Marquardt, 1963, doi:10.1137/0111030.
    """

    kind = "feature_scaled"
    treats_groups = False
    options = ("weight_sharing", "max_factor_size")

    def __init__(
        self,
        shape: BlockShape,
        weight_sharing: str = "expand",
        max_factor_size: int = 4096,
    ) -> None:
        if shape.groups is not None or shape.one_hot:
            raise ValueError(
                "The block 'feature_scaled' is for layers with one matrix and "
                "numbers as inputs; use 'kronecker'. "
                f"Received: shape={shape!r}"
            )
        super().__init__(shape, weight_sharing, max_factor_size)

    @override
    def build_state(self) -> None:
        super().build_state()
        rows = (self.shape.rows,)
        magnitude = self.add_average("magnitude", rows)
        # Averages stand in the order of the statistics: those of the inputs
        # before those of the cotangents.
        self._averages = [
            self._input.average,
            magnitude,
            self._output.average,
        ]
        self._metric: keras.Variable = self.add_cache("metric", rows)

    @override
    @classmethod
    def state_size(cls, shape: BlockShape) -> int:
        return super().state_size(shape) + 2 * shape.rows

    @override
    @property
    def memory(self) -> int:
        return super().memory + 2 * self.shape.rows

    @override
    def input_statistics(
        self, inputs: Rows, weights: tf.Tensor
    ) -> tuple[tf.Tensor, ...]:
        (moment,) = super().input_statistics(inputs, weights)
        if self.weight_sharing.value == "reduce":
            inputs = position_mean(inputs)
        weights = tf.math.divide_no_nan(weights, tf.reduce_sum(weights))
        shared = tf.cast(position_count(inputs), weights.dtype)
        magnitudes = tf.reduce_sum(tf.abs(to_dense(inputs)), axis=1)
        return moment, tf.linalg.matvec(
            magnitudes, weights / shared, transpose_a=True
        )

    @override
    def averages(self) -> tuple[tf.Tensor, ...]:
        left, _, right = super().averages()
        return left, right

    @override
    def factors(self) -> tuple[tf.Tensor, tf.Tensor]:
        left, right = self.averages()
        root = tf.sqrt(self._scales())
        if left.shape.rank == 1:
            return left / tf.square(root), right
        return left / root / root[:, tf.newaxis], right

    @override
    def factor_traces(self) -> tuple[tf.Tensor, tf.Tensor]:
        _, right = super().factor_traces()
        return tf.reduce_sum(self._squares() / self._scales()), right

    @override
    def refresh(
        self, damping: tf.Tensor, ratio: tf.Tensor | None = None
    ) -> tuple[tf.Tensor, tf.Tensor]:
        retries, failures = super().refresh(damping, ratio)
        # The inverse and the metric that it was computed in stay together.
        failed = failures > 0
        scales = self._scales()
        self._metric.assign(tf.where(failed, self._metric.value, scales))
        # D^-½ on both sides, once here and not at every step.
        root = tf.math.rsqrt(scales)
        inverse = self._input.inverse.value
        scaled = inverse * root
        scaled *= root if inverse.shape.rank == 1 else root[:, tf.newaxis]
        self._input.inverse.assign(tf.where(failed, inverse, scaled))
        return retries, failures

    @override
    def damping_rows(self) -> tf.Tensor | None:
        return self._metric.value

    @override
    def describe(self) -> str:
        return f"{super().describe()}, damped by feature"

    def _scales(self) -> tf.Tensor:
        """Returns D, `[rows]`."""
        square = self._squares()
        magnitude = self.debias(self._averages[1].value)
        scales = tf.square(tf.math.divide_no_nan(square, magnitude))
        rare = tf.square(magnitude) < _RARELY * square
        largest = tf.reduce_max(tf.where(rare, tf.zeros_like(scales), scales))
        known = (largest > 0) & ~rare & (scales > 0)
        relative = tf.math.divide_no_nan(scales, largest)
        ones = tf.ones_like(scales)
        return tf.where(known, tf.maximum(relative, _SMALLEST), ones)

    def _squares(self) -> tf.Tensor:
        """Returns the features' second moments, `[rows]`."""
        left = self._input.average.value
        return self.debias(
            left if left.shape.rank == 1 else tf.linalg.diag_part(left)
        )
