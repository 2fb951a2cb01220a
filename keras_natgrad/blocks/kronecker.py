"""Kronecker-factored blocks (K-FAC)."""

from __future__ import annotations

from enum import Enum

import tensorflow as tf
from typing_extensions import override

from keras_natgrad.blocks.base import Block, Statistics
from keras_natgrad.blocks.factors import Factor, make_factor, refresh_pair
from keras_natgrad.blocks.shape import FactorScales
from keras_natgrad.linalg import (
    Rows,
    block_diagonal,
    kronecker_operator,
    position_count,
    position_mean,
    scale_examples,
)


class WeightSharing(str, Enum):
    """How positions that share the weights enter the Kronecker factors.

    `EXPAND` treats every position as an example of its own; it is exact for a
    deep linear network applied position by position. `REDUCE` sums over the
    positions first; it is exact where the network averages over them
    (Eschenhagen et al. 2023).
    """

    EXPAND = "expand"
    REDUCE = "reduce"


def input_moment(
    factor: Factor, inputs: Rows, weights: tf.Tensor, sharing: WeightSharing
) -> tf.Tensor:
    """Returns the second moment of inputs, the A of `KroneckerBlock`.

    Args:
        factor: What is kept of it.
        inputs: `[(groups,) batch, shared, n]`, or `StructuredRows`.
        weights: `[batch]`, relative weights of the examples.
        sharing: `WeightSharing`.
    """
    weights = tf.math.divide_no_nan(weights, tf.reduce_sum(weights))
    if sharing is WeightSharing.REDUCE:
        inputs = position_mean(inputs)
    shared = tf.cast(position_count(inputs), inputs.dtype)
    scaled = scale_examples(inputs, tf.sqrt(weights / shared))
    return factor.second_moment(scaled)


def output_moment(
    factor: Factor, cotangents: tf.Tensor, sharing: WeightSharing
) -> tf.Tensor:
    """Returns the second moment of cotangents, the G of `KroneckerBlock`.

    Args:
        factor: What is kept of it.
        cotangents: `[(groups,) batch, shared, m]`.
        sharing: `WeightSharing`.
    """
    if sharing is WeightSharing.REDUCE:
        cotangents = tf.reduce_sum(cotangents, axis=-2, keepdims=True)
    return factor.second_moment(cotangents)


class KroneckerBlock(Block):
    r"""K-FAC: the Fisher of a layer as `A ⊗ G`.

    `A` is the second moment of the homogeneous inputs and `G` that of the
    cotangents. With weight sharing "expand" over S shared positions

        A = 1/(N S) Σ_n Σ_s ā ā ᵀ,      G = Σ_n Σ_s g gᵀ,

    and with "reduce"

        A = 1/N Σ_n (mean_s ā)(mean_s ā)ᵀ,  G = Σ_n (Σ_s g)(Σ_s g)ᵀ

    (the cotangents carry the 1/N). Damping is factored (Martens & Grosse
    2015, section 6.3): the inverse is `(A + π√λ I)⁻¹ ⊗ (G + √λ/π I)⁻¹` with
    the trace-norm π of `linalg.trace_norm_ratio`.

    A factor larger than `max_factor_size` is kept as its diagonal, so that
    no layer can ask for a 25 000² inverse. The input factor of one-hot inputs
    is diagonal by itself. A layer with groups has a pair of factors for each
    group.

    Cost per layer: `N S (n² + m²)` for the statistics, `n³ + m³` for a
    refresh, `n m (n + m)` to precondition, `2 (n² + m²)` memory.

    Args:
        weight_sharing: `"expand"` or `"reduce"`.
        max_factor_size: Largest side of a dense factor.

    References:
        - Martens & Grosse, 2015, arXiv:1503.05671.
        - Eschenhagen et al., 2023, arXiv:2311.00636.
    """

    kind = "kronecker"
    treats_groups = True
    stacks = True
    leaves_special_layers = True

    def __init__(
        self,
        weight_sharing: str | WeightSharing = WeightSharing.EXPAND,
        max_factor_size: int = 4096,
    ) -> None:
        self.weight_sharing = WeightSharing(weight_sharing)
        self.max_factor_size = max_factor_size

    @override
    def prepare(self) -> None:
        bound = 0 if self.shape.one_hot else self.max_factor_size
        self._input = make_factor(self, self.shape.rows, bound)
        self._output = make_factor(
            self, self.shape.columns, self.max_factor_size
        )

    @override
    def build_state(self) -> None:
        for name, factor in (("input", self._input), ("output", self._output)):
            factor.average = self.add_average(f"{name}_factor", factor.shape)
        for name, factor in (("input", self._input), ("output", self._output)):
            factor.inverse = self.add_cache(f"{name}_inverse", factor.shape)

    @override
    def input_statistics(self, inputs: Rows, weights: tf.Tensor) -> Statistics:
        moment = input_moment(self._input, inputs, weights, self.weight_sharing)
        return {"input_factor": moment}

    @override
    def cotangent_statistics(
        self, inputs: Rows, cotangents: tf.Tensor
    ) -> Statistics:
        moment = output_moment(self._output, cotangents, self.weight_sharing)
        return {"output_factor": moment}

    def factors(self) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns A and G in the units that the damping is added in."""
        return self._moments()

    def _moments(self) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns A and G."""
        return self.average("input_factor"), self.average("output_factor")

    def factor_traces(self) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns the traces of `factors`, of each layer and group."""
        left, right = self._input, self._output
        return (
            self.debias(left.trace(left.average.value)),
            self.debias(right.trace(right.average.value)),
        )

    @override
    def trace(self) -> tf.Tensor:
        left, right = self.factor_traces()
        return self.layer_sums(left * right)

    @override
    def refresh(
        self, damping: tf.Tensor, ratio: tf.Tensor | None = None
    ) -> tuple[tf.Tensor, tf.Tensor]:
        return refresh_pair(
            (self._input, self._output), self.factors(), damping, ratio
        )

    @override
    def factor_scales(self) -> FactorScales:
        left, right = self.factor_traces()
        return FactorScales(
            self.layer_sums(left),
            self._input.size * self._input.groups,
            self.layer_sums(right),
            self._output.size * self._output.groups,
        )

    @override
    def precondition(self, gradient: tf.Tensor) -> tf.Tensor:
        return self._output.apply_right(self._input.apply_left(gradient))

    @override
    def operator(self) -> tf.linalg.LinearOperator:
        left, right = self._moments()
        product = kronecker_operator(
            self._input.operator(left), self._output.operator(right)
        )
        return block_diagonal(product, self.shape.groups)

    @override
    @property
    def spectrum_side(self) -> int:
        return max(self._input.spectrum_side, self._output.spectrum_side)

    @override
    def spectra(self) -> dict[str, tf.Tensor]:
        left, right = self._moments()
        return {
            "input": self._input.eigenvalues(left),
            "output": self._output.eigenvalues(right),
        }

    @override
    def inverse_spectra(self) -> dict[str, tf.Tensor] | None:
        left, right = self._input, self._output
        return {
            "input": left.eigenvalues(left.inverse.value),
            "output": right.eigenvalues(right.inverse.value),
        }

    @override
    def describe(self) -> str:
        sides = f"{self._input.describe()} ⊗ {self._output.describe()}"
        if self.shape.groups is not None:
            sides = f"{self.shape.groups} × ({sides})"
        return f"{sides}, {self.weight_sharing.value}"
