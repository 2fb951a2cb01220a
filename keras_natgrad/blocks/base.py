"""The contract of a Fisher block: the approximation for one layer."""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from keras_natgrad.linalg import Rows, scalar

# Creates one named, saved optimizer variable: (name, shape, initializer).
VariableFactory = Callable[[str, tuple[int, ...], Any], keras.Variable]


def identities(shape: tuple[int, ...], dtype: Any = None) -> tf.Tensor:
    """Initializer of identity matrices, `[..., n, n]`."""
    dtype = keras.backend.standardize_dtype(dtype)
    return tf.eye(shape[-1], batch_shape=list(shape[:-2]), dtype=dtype)


@dataclass(frozen=True)
class BlockShape:
    """Canonical shape of a layer's parameters.

    Attributes:
        rows: Number of input features n, plus one where the layer has a bias
            (the homogeneous coordinate, last row).
        columns: Number of output features m.
        groups: Number of groups with a matrix of their own each, or `None`
            for a layer without groups. All tensors of a layer with groups
            have them as their first axis.
        one_hot: Whether the inputs are `linalg.OneHot`.
        biased: Whether the last row is that of a bias.
        two_way: Whether the matrix is used as its transpose too; inputs are
            `linalg.TwoWayRows` and cotangents `linalg.TwoWayCotangents`.
    """

    rows: int
    columns: int
    groups: int | None = None
    one_hot: bool = False
    biased: bool = False
    two_way: bool = False

    @property
    def size(self) -> int:
        """Number of parameters, `groups × rows × columns`."""
        return (self.groups or 1) * self.matrix_size

    @property
    def matrix_size(self) -> int:
        """Number of parameters of one group."""
        return self.rows * self.columns

    @property
    def lead(self) -> tuple[int, ...]:
        """Axes before rows and columns: the groups, if any."""
        return () if self.groups is None else (self.groups,)

    @property
    def matrix(self) -> tuple[int, ...]:
        """Shape of the parameters, `[(groups,) rows, columns]`."""
        return (*self.lead, self.rows, self.columns)


class FactorScales(NamedTuple):
    """Traces and sizes of the two factors of a Kronecker product."""

    input_trace: tf.Tensor
    input_size: int
    output_trace: tf.Tensor
    output_size: int


class Block(abc.ABC):
    """Approximates the Fisher information of one layer's parameters.

    The layer is seen in its canonical form only: inputs `ā` of shape
    `[batch, shared, rows]` (homogeneous coordinate included) and cotangents
    `g` of shape `[batch, shared, columns]` at its pre-activations. With the
    loss written as `Σ_i c_i ℓ_i`, the cotangents are `g_i = J_iᵀ √c_i L_i e`,
    so that the Fisher of the layer is the sum, over the columns `e` and over
    the batch, of the outer products of `vec(Σ_s ā_s g_sᵀ)`. A layer with
    groups has one such Fisher per group, and what crosses groups is left out.

    A step feeds a block in three calls. `input_statistics` is evaluated once
    and `cotangent_statistics` once per column (they are then summed);
    `accumulate` folds both into running averages that carry their true
    weight. `refresh` computes what `precondition` needs.

    Subclasses declare their running averages with `add_average` and their
    caches with `add_cache` in `build`.

    Args:
        shape: `BlockShape`.
    """

    #: Name under which the block is chosen and shown in the summary.
    kind = "block"
    #: Whether it has statistics of cotangents. Where no block of a network
    #: has any, no backward pass is made for them.
    uses_cotangents = True
    #: Options of `create` that the constructor takes.
    options: tuple[str, ...] = ()
    #: Whether it can treat a matrix that is used as its transpose too.
    treats_two_way = False
    #: Whether it can treat a layer with a matrix per group of features.
    treats_groups = False

    def __init__(self, shape: BlockShape) -> None:
        if shape.groups is not None and not self.treats_groups:
            raise ValueError(
                f"The block {self.kind!r} is not for a layer with groups, each "
                "with a matrix of its own (normalisation, grouped and "
                "depthwise convolutions); use 'kronecker', 'diagonal' or "
                "'full', or name the layers that get this block: "
                f'`block={{"dense*": {self.kind!r}}}`. '
                f"Received: shape={shape!r}"
            )
        if shape.two_way and not self.treats_two_way:
            raise ValueError(
                f"The block {self.kind!r} is not for a matrix that is used as "
                "its transpose too; use 'tied', 'diagonal' or 'full', or "
                "leave the layer out with `attach(model, exclude=[...])`. "
                f"Received: shape={shape!r}"
            )
        self.shape = shape
        self._averages: list[keras.Variable] = []
        self._caches: list[keras.Variable] = []
        self._add_variable: VariableFactory | None = None
        self._add_sum: VariableFactory | None = None

    # -- State -----------------------------------------------------------

    def build(
        self,
        add_variable: VariableFactory,
        add_sum: VariableFactory | None = None,
    ) -> None:
        """Creates the state through `add_variable(name, shape, init)`.

        Args:
            add_variable: `VariableFactory`.
            add_sum: The same for running averages, whose value is the sum of
                what each replica has seen.
        """
        self._add_variable = add_variable
        self._add_sum = add_sum or add_variable
        self._weight = add_variable("weight", (), "zeros")
        self.build_state()

    @abc.abstractmethod
    def build_state(self) -> None:
        """Declares running averages and caches."""

    def add_average(self, name: str, shape: tuple[int, ...]) -> keras.Variable:
        """Adds a running average, in the order of the statistics."""
        assert self._add_sum is not None, "build() has not been called"
        variable = self._add_sum(name, shape, "zeros")
        self._averages.append(variable)
        return variable

    def add_cache(
        self, name: str, shape: tuple[int, ...], initializer: Any = "zeros"
    ) -> keras.Variable:
        """Adds a variable computed by `refresh`."""
        assert self._add_variable is not None, "build() has not been called"
        variable = self._add_variable(name, shape, initializer)
        self._caches.append(variable)
        return variable

    def copy_statistics(self, other: Block) -> None:
        """Takes the running averages of a block of the same kind and shape."""
        self._weight.assign(other._weight.value)
        for own, new in zip(self._averages, other._averages, strict=True):
            own.assign(new.value)

    def copy_inverse(self, other: Block) -> None:
        """Takes what the other block's last `refresh` has computed."""
        for own, new in zip(self._caches, other._caches, strict=True):
            own.assign(new.value)

    @property
    def dtype(self) -> str:
        """Dtype of the state."""
        return self._weight.dtype

    @property
    def memory(self) -> int:
        """Number of state elements that the block keeps."""
        return self.state_size(self.shape)

    @property
    def refresh_cost(self) -> int:
        """What a refresh costs beside those of other blocks."""
        rows, columns = self.shape.rows, self.shape.columns
        return (self.shape.groups or 1) * (rows**3 + columns**3)

    @classmethod
    @abc.abstractmethod
    def state_size(cls, shape: BlockShape) -> int:
        """Returns the number of state elements for a layer of `shape`."""

    # -- Statistics ------------------------------------------------------

    @abc.abstractmethod
    def input_statistics(
        self, inputs: Rows, weights: tf.Tensor
    ) -> tuple[tf.Tensor, ...]:
        """Returns the statistics of the inputs alone.

        Args:
            inputs: Tensor `[(groups,) batch, shared, rows]`, or
                `StructuredRows`.
            weights: Tensor `[batch]`, relative weights of the examples.
        """

    @abc.abstractmethod
    def cotangent_statistics(
        self, inputs: Rows, cotangents: tf.Tensor
    ) -> tuple[tf.Tensor, ...]:
        """Returns the statistics of one column of the loss factor.

        Args:
            inputs: Tensor `[(groups,) batch, shared, rows]`, or
                `StructuredRows`.
            cotangents: Tensor `[(groups,) batch, shared, columns]`.
        """

    def accumulate(
        self,
        statistics: Sequence[tf.Tensor],
        decay: float | tf.Tensor,
        keep_finite: bool = False,
    ) -> None:
        """Folds statistics into the running averages.

        Average and weight follow `s ← β s + (1 − β) ŝ`, `w ← β w + (1 − β)`;
        dividing by `w` makes the average unbiased from the first step on.

        Args:
            statistics: Input statistics followed by cotangent statistics.
            decay: Scalar β in [0, 1).
            keep_finite: Whether statistics that are not finite, as float16 may
                have them, or a head of one's own, change nothing: `β` is one
                for this block. Otherwise they stay in the averages.
        """
        decay = scalar(decay, self.dtype)
        if keep_finite and statistics:
            finite = [
                tf.math.is_finite(tf.reduce_sum(new)) for new in statistics
            ]
            fine = tf.reduce_all(finite)
            decay = tf.where(fine, decay, tf.ones_like(decay))
            statistics = [
                tf.where(fine, new, tf.zeros_like(new)) for new in statistics
            ]
        for average, new in zip(self._averages, statistics, strict=True):
            average.assign(
                decay * average.value
                + (1 - decay) * tf.cast(new, average.dtype)
            )
        self._weight.assign(decay * self._weight.value + (1 - decay))

    def update_basis(self) -> bool:
        """Finds the basis that statistics of cotangents are taken in, if any.

        `refresh` does so by itself. For who has a single batch, whose
        statistics are taken once more after this.

        Returns:
            Whether the block has one.
        """
        return False

    def averages(self) -> tuple[tf.Tensor, ...]:
        """Returns the debiased running averages."""
        return tuple(self.debias(average.value) for average in self._averages)

    def debias(self, value: tf.Tensor) -> tf.Tensor:
        """Corrects a running average, or what is linear in it.

        A trace is corrected for a fraction of what its whole matrix costs.
        """
        weight = self._weight.value
        return value / tf.where(weight > 0, weight, tf.ones_like(weight))

    def is_empty(self) -> tf.Tensor:
        """Returns a scalar bool: no statistics have been seen yet."""
        return tf.equal(self._weight.value, 0)

    # -- Curvature -------------------------------------------------------

    @abc.abstractmethod
    def trace(self) -> tf.Tensor:
        """Returns the trace of the undamped Fisher block."""

    @abc.abstractmethod
    def refresh(
        self, damping: tf.Tensor, ratio: tf.Tensor | None = None
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Recomputes the cached inverse.

        Where a factorisation fails for good, the last good inverse stays.

        Args:
            damping: Scalar λ, added to the Fisher.
            ratio: Scalar π that splits λ over two factors, for blocks that
                are products; their own where it is `None`.

        Returns:
            Two int32 scalars: raised dampings and failed factorisations.
        """

    @abc.abstractmethod
    def precondition(self, gradient: tf.Tensor) -> tf.Tensor:
        """Returns `(F + λ I)⁻¹ vec(gradient)`, shaped like the gradient.

        Args:
            gradient: Tensor `[(groups,) rows, columns]`.
        """

    @abc.abstractmethod
    def operator(self) -> tf.linalg.LinearOperator:
        """Returns the undamped Fisher block as a linear operator.

        It acts on row-major flattened `[(groups,) rows, columns]` matrices.
        """

    def to_dense(self) -> tf.Tensor:
        """Returns the undamped Fisher block, `[size, size]`."""
        return self.operator().to_dense()

    # -- Eigenvalues -----------------------------------------------------

    @property
    def spectrum_side(self) -> int:
        """Side of the largest matrix that `spectra` decomposes."""
        return self.shape.size

    def spectra(self) -> dict[str, tf.Tensor]:
        """Returns the eigenvalues of the undamped Fisher block, in parts.

        The eigenvalues of the block are all products of one entry of each
        part's last axis, `λ_i(A) λ_j(G)` for `A ⊗ G`. Axes before the last
        (groups, units) are the same in all parts and stay apart.

        Cost: `spectrum_side³`.
        """
        return {"fisher": tf.linalg.eigvalsh(self.to_dense())}

    def inverse_spectra(self) -> dict[str, tf.Tensor] | None:
        """Returns the eigenvalues of what `precondition` applies, likewise.

        It is the inverse of the damped block as of the last refresh, zero
        before the first. `None` for a block that does not tell.
        """
        return None

    def factor_scales(self) -> FactorScales | None:
        """Returns the scales of two factors, `None` for no product."""
        return None

    def damping_rows(self) -> tf.Tensor | None:
        """Returns the diagonal metric D of the damping `λ D`.

        A tensor `[rows]`, the same for all columns; `None` is the identity.
        """
        return None

    def describe(self) -> str:
        """Returns the approximation in a few words, for the summary."""
        return self.kind
