"""Kronecker-factored blocks (K-FAC)."""

from __future__ import annotations

import abc
import math
from enum import Enum

import keras
import tensorflow as tf
from typing_extensions import override

from keras_natgrad.blocks.base import Block, BlockShape, FactorScales
from keras_natgrad.linalg import (
    DampedInverse,
    Rows,
    StructuredRows,
    block_diagonal,
    damped_inverse,
    kronecker_operator,
    position_count,
    position_mean,
    scale_examples,
    trace_norm_ratio,
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
    no layer can ask for a 25 000² inverse. With `sides` only the input or
    only the output factor is used, the other one being a multiple of the
    identity with the same trace (one-sided K-FAC). The input factor of one-hot
    inputs is diagonal by itself. A layer with groups has a pair of factors for
    each group.

    Cost per layer: `N S (n² + m²)` for the statistics, `n³ + m³` for a
    refresh, `n m (n + m)` to precondition, `2 (n² + m²)` memory.

    Args:
        shape: `BlockShape`.
        weight_sharing: `"expand"` or `"reduce"`.
        max_factor_size: Largest side of a dense factor.
        sides: `"both"`, `"input"` or `"output"`.

    References:
        - Martens & Grosse, 2015, arXiv:1503.05671.
        - Eschenhagen et al., 2023, arXiv:2311.00636.
    """

    kind = "kronecker"

    def __init__(
        self,
        shape: BlockShape,
        weight_sharing: str | WeightSharing = WeightSharing.EXPAND,
        max_factor_size: int = 4096,
        sides: str = "both",
    ) -> None:
        super().__init__(shape)
        self.weight_sharing = WeightSharing(weight_sharing)
        if sides not in ("both", "input", "output"):
            raise ValueError(
                "`sides` must be 'both', 'input' or 'output'. "
                f"Received: sides={sides!r}"
            )
        bound = 0 if shape.one_hot else max_factor_size
        self._input = _factor(shape.lead, shape.rows, bound, sides != "output")
        self._output = _factor(
            shape.lead, shape.columns, max_factor_size, sides != "input"
        )

    @override
    def build_state(self) -> None:
        for name, factor in (("input", self._input), ("output", self._output)):
            factor.average = self.add_average(f"{name}_factor", factor.shape)
        for name, factor in (("input", self._input), ("output", self._output)):
            factor.inverse = self.add_cache(f"{name}_inverse", factor.shape)

    @override
    @classmethod
    def state_size(cls, shape: BlockShape) -> int:
        squares = shape.rows**2 + shape.columns**2
        return 2 * (shape.groups or 1) * squares

    @override
    @property
    def memory(self) -> int:
        return 2 * (self._input.elements + self._output.elements)

    @override
    def input_statistics(
        self, inputs: Rows, weights: tf.Tensor
    ) -> tuple[tf.Tensor, ...]:
        weights = tf.math.divide_no_nan(weights, tf.reduce_sum(weights))
        if self.weight_sharing is WeightSharing.REDUCE:
            inputs = position_mean(inputs)
        shared = tf.cast(position_count(inputs), inputs.dtype)
        scaled = scale_examples(inputs, tf.sqrt(weights / shared))
        return (self._input.second_moment(scaled),)

    @override
    def cotangent_statistics(
        self, inputs: Rows, cotangents: tf.Tensor
    ) -> tuple[tf.Tensor, ...]:
        if self.weight_sharing is WeightSharing.REDUCE:
            cotangents = tf.reduce_sum(cotangents, axis=-2, keepdims=True)
        return (self._output.second_moment(cotangents),)

    @override
    def trace(self) -> tf.Tensor:
        left, right = self.averages()
        return tf.reduce_sum(
            self._input.trace(left) * self._output.trace(right)
        )

    @override
    def refresh(
        self, damping: tf.Tensor, ratio: tf.Tensor | None = None
    ) -> tuple[tf.Tensor, tf.Tensor]:
        left, right = self.averages()
        if ratio is None:
            ratio = trace_norm_ratio(
                self._input.trace(left) / self._input.size,
                self._output.trace(right) / self._output.size,
            )
        root = tf.sqrt(tf.cast(damping, left.dtype))
        first = self._input.invert(left, ratio * root)
        second = self._output.invert(right, root / ratio)
        # Both factors or neither: one half of a stale pair fits no λ.
        succeeded = first.succeeded & second.succeeded
        self._input.store(first.inverse, succeeded)
        self._output.store(second.inverse, succeeded)
        retries = first.retries + second.retries
        return retries, tf.cast(~succeeded, tf.int32)

    @override
    def factor_scales(self) -> FactorScales:
        left, right = self.averages()
        return FactorScales(
            tf.reduce_sum(self._input.trace(left)),
            self._input.size * self._input.groups,
            tf.reduce_sum(self._output.trace(right)),
            self._output.size * self._output.groups,
        )

    @override
    def precondition(self, gradient: tf.Tensor) -> tf.Tensor:
        return self._output.apply_right(self._input.apply_left(gradient))

    @override
    def operator(self) -> tf.linalg.LinearOperator:
        left, right = self.averages()
        product = kronecker_operator(
            self._input.operator(left), self._output.operator(right)
        )
        return block_diagonal(product, self.shape.groups)

    @override
    def describe(self) -> str:
        sides = f"{self._input.describe()} ⊗ {self._output.describe()}"
        if self.shape.groups is not None:
            sides = f"{self.shape.groups} × ({sides})"
        return f"{sides}, {self.weight_sharing.value}"


def _factor(
    lead: tuple[int, ...], size: int, bound: int, used: bool
) -> _Factor:
    if not used:
        return _ScalarFactor(lead, size)
    if size <= bound:
        return _DenseFactor(lead, size)
    return _DiagonalFactor(lead, size)


class _Factor(abc.ABC):
    """One side of a Kronecker product: its average and its inverse.

    Args:
        lead: The axis of groups, if any: one factor for each.
        size: Side of the factor.
    """

    average: keras.Variable
    inverse: keras.Variable

    def __init__(self, lead: tuple[int, ...], size: int) -> None:
        self.lead = lead
        self.size = size

    @property
    def groups(self) -> int:
        """Number of factors."""
        return math.prod(self.lead)

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Shape of the average and of the inverse."""

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @abc.abstractmethod
    def second_moment(self, vectors: Rows) -> tf.Tensor:
        """Returns the sum of outer products of `[..., batch, shared, size]`."""

    @abc.abstractmethod
    def trace(self, average: tf.Tensor) -> tf.Tensor:
        """Returns the trace of the factor."""

    @abc.abstractmethod
    def invert(self, average: tf.Tensor, damping: tf.Tensor) -> DampedInverse:
        """Returns the damped inverse of the factor."""

    def store(self, inverse: tf.Tensor, succeeded: tf.Tensor) -> None:
        """Keeps an inverse, if it is a good one."""
        self.inverse.assign(tf.where(succeeded, inverse, self.inverse.value))

    @abc.abstractmethod
    def apply_left(self, matrix: tf.Tensor) -> tf.Tensor:
        """Returns the inverse times a matrix."""

    @abc.abstractmethod
    def apply_right(self, matrix: tf.Tensor) -> tf.Tensor:
        """Returns a matrix times the inverse."""

    @abc.abstractmethod
    def operator(self, average: tf.Tensor) -> tf.linalg.LinearOperator:
        """Returns the undamped factor as an operator."""

    @abc.abstractmethod
    def describe(self) -> str:
        """Returns the factor in a few characters."""


class _DenseFactor(_Factor):
    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.lead, self.size, self.size)

    def second_moment(self, vectors: Rows) -> tf.Tensor:
        if isinstance(vectors, StructuredRows):
            return vectors.second_moment()
        flat = tf.reshape(vectors, [*self.lead, -1, self.size])
        return tf.matmul(flat, flat, transpose_a=True)

    def trace(self, average: tf.Tensor) -> tf.Tensor:
        return tf.linalg.trace(average)

    def invert(self, average: tf.Tensor, damping: tf.Tensor) -> DampedInverse:
        return damped_inverse(average, damping)

    def apply_left(self, matrix: tf.Tensor) -> tf.Tensor:
        return tf.matmul(self.inverse.value, matrix)

    def apply_right(self, matrix: tf.Tensor) -> tf.Tensor:
        return tf.matmul(matrix, self.inverse.value)

    def operator(self, average: tf.Tensor) -> tf.linalg.LinearOperator:
        return tf.linalg.LinearOperatorFullMatrix(average, is_self_adjoint=True)

    def describe(self) -> str:
        return f"{self.size}²"


class _DiagonalFactor(_Factor):
    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.lead, self.size)

    def second_moment(self, vectors: Rows) -> tf.Tensor:
        if isinstance(vectors, StructuredRows):
            return vectors.squares()
        return tf.reduce_sum(tf.square(vectors), axis=[-3, -2])

    def trace(self, average: tf.Tensor) -> tf.Tensor:
        return tf.reduce_sum(average, axis=-1)

    def invert(self, average: tf.Tensor, damping: tf.Tensor) -> DampedInverse:
        return _reciprocal(average + damping[..., tf.newaxis])

    def apply_left(self, matrix: tf.Tensor) -> tf.Tensor:
        return self.inverse.value[..., tf.newaxis] * matrix

    def apply_right(self, matrix: tf.Tensor) -> tf.Tensor:
        return matrix * self.inverse.value[..., tf.newaxis, :]

    def operator(self, average: tf.Tensor) -> tf.linalg.LinearOperator:
        return tf.linalg.LinearOperatorDiag(average, is_self_adjoint=True)

    def describe(self) -> str:
        return f"diag {self.size}"


class _ScalarFactor(_Factor):
    """A multiple of the identity with the trace of the true factor."""

    @property
    def shape(self) -> tuple[int, ...]:
        return self.lead

    def second_moment(self, vectors: Rows) -> tf.Tensor:
        if isinstance(vectors, StructuredRows):
            return tf.reduce_mean(vectors.squares(), axis=-1)
        squares = tf.reduce_sum(tf.square(vectors), axis=[-3, -2, -1])
        return squares / self.size

    def trace(self, average: tf.Tensor) -> tf.Tensor:
        return self.size * average

    def invert(self, average: tf.Tensor, damping: tf.Tensor) -> DampedInverse:
        return _reciprocal(average + damping)

    def apply_left(self, matrix: tf.Tensor) -> tf.Tensor:
        return self.inverse.value[..., tf.newaxis, tf.newaxis] * matrix

    def apply_right(self, matrix: tf.Tensor) -> tf.Tensor:
        return self.apply_left(matrix)

    def operator(self, average: tf.Tensor) -> tf.linalg.LinearOperator:
        return tf.linalg.LinearOperatorScaledIdentity(self.size, average)

    def describe(self) -> str:
        return f"scalar {self.size}"


def _reciprocal(values: tf.Tensor) -> DampedInverse:
    inverse = tf.math.reciprocal(values)
    finite = tf.math.is_finite(tf.reduce_sum(inverse))
    return DampedInverse(inverse, tf.constant(0, tf.int32), finite)
