"""The second moment of a layer's inputs alone (FOOF, PRONG)."""

from __future__ import annotations

import tensorflow as tf
from typing_extensions import override

from keras_natgrad.blocks.base import Block, Statistics
from keras_natgrad.blocks.factors import DiagonalFactor, make_factor
from keras_natgrad.blocks.kronecker import WeightSharing
from keras_natgrad.blocks.state import count_failures, keep_good
from keras_natgrad.linalg import (
    Rows,
    append_row,
    kronecker_operator,
    to_dense,
)
from keras_natgrad.linalg.psd import rounding


class InputFactorBlock(Block):
    r"""One-sided K-FAC with `G = I`: the Fisher of a layer as `A ⊗ I`.

    `A = E[ā āᵀ]` is the second moment of the homogeneous inputs `ā = (h, 1)`.
    No cotangent enters it, so that no backward pass is made for it. With the
    mean μ and the covariance Σ of h

        A = [[Σ + μμᵀ, μ], [μᵀ, 1]]

    and `A + λ diag(1, …, 1, 0)` has the inverse

        [[P, −Pμ], [−μᵀP, 1 + μᵀPμ]],   P = (Σ + λI)⁻¹.

    With `damp_bias=False` this is what preconditions: the damping is on the
    centred covariance only, and one step of gradient descent is one on the
    weights of whitened inputs (PRONG). With `damp_bias=True` the last
    diagonal entry is damped too (FOOF); the formula is then that of the inputs
    `(h, √(1 + λ))`.

    Above `max_factor_size` inputs, only the diagonal of Σ is kept (each input
    standardised). Without a bias there is no μ, and Σ stands for `E[hhᵀ]`.

    Cost per layer: `N S n²` for the statistics, `n³` for a refresh, `n² m` to
    precondition, `2 (n² + n)` memory.

    Args:
        weight_sharing: `"expand"` counts shared positions as examples,
            `"reduce"` takes their mean first.
        max_factor_size: Largest side of a dense factor.
        damp_bias: Whether λ is added to the bias's entry as well.
        relative_damping: Whether λ counts in mean eigenvalues of Σ.

    References:
        - Desjardins et al., 2015, arXiv:1507.00210 (PRONG).
        - Benzing, 2022, arXiv:2201.12250 (FOOF).
    """

    kind = "input_factor"
    uses_cotangents = False
    stacks = True
    leaves_special_layers = True

    def __init__(
        self,
        weight_sharing: str | WeightSharing = WeightSharing.EXPAND,
        max_factor_size: int = 4096,
        damp_bias: bool = True,
        relative_damping: bool = False,
    ) -> None:
        self.weight_sharing = WeightSharing(weight_sharing)
        self.max_factor_size = max_factor_size
        self.damp_bias = damp_bias
        self.relative_damping = relative_damping

    @override
    def prepare(self) -> None:
        self._features = self.shape.rows - self.shape.biased
        self._factor = make_factor(self, self._features, self.max_factor_size)

    # -- State -----------------------------------------------------------

    @override
    def build_state(self) -> None:
        self._factor.average = self.add_average(
            "input_factor", self._factor.shape
        )
        self._factor.inverse = self.add_cache(
            "input_inverse", self._factor.shape
        )
        if self.shape.biased:
            # E[ā]; the last entry is 1 unless the layer was left out.
            rows = (*self.lead, self.shape.rows)
            self.add_average("input_mean", rows)
            # (μ, 1/c) of the last refresh, with c the damped last entry.
            self._centre = self.add_cache("centre", rows)

    # -- Statistics ------------------------------------------------------

    @override
    def input_statistics(self, inputs: Rows, weights: tf.Tensor) -> Statistics:
        inputs = to_dense(inputs)
        weights = tf.math.divide_no_nan(weights, tf.reduce_sum(weights))
        if self.weight_sharing is WeightSharing.REDUCE:
            inputs = tf.reduce_mean(inputs, axis=1, keepdims=True)
        shared = tf.cast(tf.shape(inputs)[1], inputs.dtype)
        scale = (weights / shared)[:, tf.newaxis, tf.newaxis]
        features = inputs[..., : self._features]
        moment = self._factor.second_moment(tf.sqrt(scale) * features)
        if not self.shape.biased:
            return {"input_factor": moment}
        mean = tf.reduce_sum(scale * inputs, axis=[0, 1])
        return {"input_factor": moment, "input_mean": mean}

    @override
    def cotangent_statistics(
        self, inputs: Rows, cotangents: tf.Tensor
    ) -> Statistics:
        return {}

    # -- Curvature -------------------------------------------------------

    def _covariance(
        self, moment: tf.Tensor, sums: tf.Tensor, corner: tf.Tensor
    ) -> tf.Tensor:
        """Returns the Schur complement of c in `[[moment, s], [sᵀ, c]]`."""
        root = tf.math.divide_no_nan(sums, tf.sqrt(corner)[..., tf.newaxis])
        if isinstance(self._factor, DiagonalFactor):
            # Rounding may leave the variance of a constant below zero.
            return tf.nn.relu(moment - tf.square(root))
        return moment - _outer(root)

    def _scale_of(self, moment: tf.Tensor, covariance: tf.Tensor) -> tf.Tensor:
        """Returns tr Σ, or what stands for it where the inputs are constant.

        A covariance that is rounding, of constant inputs or of one example,
        is no scale; that of the moment is one, and inputs of zero need none.
        """
        total = self._factor.trace(covariance)
        raw = self._factor.trace(moment)
        least = rounding(moment.dtype) * raw
        raw = tf.where(raw > 0, raw, tf.ones_like(raw))
        return tf.where(total > least, total, raw)

    @override
    def trace(self) -> tf.Tensor:
        moment, mean = self._moments()
        total = self._factor.trace(moment)
        if mean is not None:
            total += mean[..., -1]
        return self.shape.columns * total

    @override
    def refresh(
        self, damping: tf.Tensor, ratio: tf.Tensor | None = None
    ) -> tuple[tf.Tensor, tf.Tensor]:
        moment, mean = self._moments()
        damping = tf.cast(damping, moment.dtype)
        covariance = moment
        if mean is not None:
            sums, corner = mean[..., :-1], mean[..., -1]
            covariance = self._covariance(moment, sums, corner)
        if self.relative_damping:
            size = tf.constant(self._features, moment.dtype)
            damping *= self._scale_of(moment, covariance) / size
        if mean is not None and self.damp_bias:
            # A + λI has the last entry c + λ, and a mean smaller by as much.
            corner += damping
            covariance = self._covariance(moment, sums, corner)
        result = self._factor.invert(covariance, damping)
        self._factor.store(result.inverse, result.succeeded)
        if mean is not None:
            inverse = tf.math.reciprocal_no_nan(corner)[..., tf.newaxis]
            centre = tf.concat([sums * inverse, inverse], axis=-1)
            keep_good(self._centre, centre, result.succeeded)
        return result.retries, count_failures(result.succeeded)

    @override
    def precondition(self, gradient: tf.Tensor) -> tf.Tensor:
        if not self.shape.biased:
            return self._factor.apply_left(gradient)
        # X = P (∇W − μ ∇bᵀ), and below it ∇b / c − Xᵀμ.
        sides = [self._features, 1]
        kernel, bias = tf.split(gradient, sides, axis=-2)
        centre, scale = tf.split(
            self._centre.value[..., tf.newaxis], sides, axis=-2
        )
        kernel = self._factor.apply_left(kernel - centre * bias)
        bias = scale * bias
        bias -= tf.matmul(centre, kernel, transpose_a=True)
        return append_row(kernel, bias)

    @override
    def operator(self) -> tf.linalg.LinearOperator:
        moment = self._input_moment()
        return kronecker_operator(
            tf.linalg.LinearOperatorFullMatrix(moment, is_self_adjoint=True),
            tf.linalg.LinearOperatorIdentity(
                self.shape.columns, dtype=moment.dtype
            ),
        )

    @override
    @property
    def spectrum_side(self) -> int:
        return self.shape.rows

    @override
    def spectra(self) -> dict[str, tf.Tensor]:
        return {
            "input": tf.linalg.eigvalsh(self._input_moment()),
            "output": tf.ones([self.shape.columns], self.dtype),
        }

    @override
    def inverse_spectra(self) -> dict[str, tf.Tensor] | None:
        inverse = self.precondition(tf.eye(self.shape.rows, dtype=self.dtype))
        return {
            "input": tf.linalg.eigvalsh(inverse),
            "output": tf.ones([self.shape.columns], self.dtype),
        }

    def _input_moment(self) -> tf.Tensor:
        """Returns A of one layer, `[rows, rows]`."""
        moment, mean = self._moments()
        if isinstance(self._factor, DiagonalFactor):
            moment = self._dense_moment(moment, mean)
        if mean is not None:
            column = mean[:-1, tf.newaxis]
            moment = tf.concat(
                [tf.concat([moment, column], axis=1), mean[tf.newaxis]],
                axis=0,
            )
        return moment

    def _moments(self) -> tuple[tf.Tensor, tf.Tensor | None]:
        """Returns the second moment of h, and E[ā] where there is a bias."""
        mean = self.average("input_mean") if self.shape.biased else None
        return self.average("input_factor"), mean

    def _dense_moment(
        self, moment: tf.Tensor, mean: tf.Tensor | None
    ) -> tf.Tensor:
        """Returns `diag Σ + μμᵀ` from the diagonal of the second moment."""
        if mean is None:
            return tf.linalg.diag(moment)
        root = tf.math.divide_no_nan(mean[:-1], tf.sqrt(mean[-1]))
        return tf.linalg.diag(moment - root**2) + _outer(root)

    @override
    def describe(self) -> str:
        centred = " centred" if self.shape.biased else ""
        return (
            f"{self._factor.describe()}{centred} ⊗ I, "
            f"{self.weight_sharing.value}"
        )


def _outer(vectors: tf.Tensor) -> tf.Tensor:
    """Returns `v vᵀ` of vectors `[..., n]`."""
    return vectors[..., tf.newaxis] * vectors[..., tf.newaxis, :]
