"""The contract of a Fisher block: the approximation for one layer."""

from __future__ import annotations

import abc
import copy
import math
from collections.abc import Callable, Mapping
from typing import Any

import tensorflow as tf
from typing_extensions import Self

from keras_natgrad.blocks.settings import Settings
from keras_natgrad.blocks.shape import BlockShape, FactorScales
from keras_natgrad.blocks.state import select
from keras_natgrad.linalg import Rows, expand_to, scalar

# Creates one named, saved optimizer variable: (name, shape, initializer).
VariableFactory = Callable[[str, tuple[int, ...], Any], Any]
#: Tensors by the name of the running average that they go into.
Statistics = dict[str, tf.Tensor]


class Block(Settings, abc.ABC):
    """Approximates the Fisher information of one layer's parameters.

    A block is made with its own options only, as in `EigenBlock()`, and is a
    prototype: `bind` returns the block of a layer's shape, and `build` creates
    its state.

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

    Layers of one shape may share a block, bound to their number: its state,
    statistics and gradients then have a first axis `layers`. Statistics are
    taken by blocks of single layers and stacked. `accumulate`, `refresh`,
    `precondition`, `trace`, `factor_scales`, `damping_rows` and `update_basis`
    work on all layers at once, and return one number per layer; everything
    else is for the block of one layer, see `of_layer`.

    Subclasses declare their running averages with `add_average`, their caches
    with `add_cache` and what follows the gradients with `add_state`, all in
    `build_state` and in shapes that start with `lead`.
    """

    #: Name under which the block is shown in the summary.
    kind = "block"
    #: Whether it has statistics of cotangents. Where no block of a network
    #: has any, no backward pass is made for them.
    uses_cotangents = True
    #: Whether `observe_gradient` is to be called at every step.
    uses_gradients = False
    #: Whether it can treat a matrix that is used as its transpose too.
    treats_two_way = False
    #: Whether it can treat a layer with a matrix per group of features.
    treats_groups = False
    #: Whether layers of one shape may share it.
    stacks = False
    #: Whether, as the choice for a whole model, it leaves a layer that one
    #: matrix does not suit (normalisation, tied embeddings) the block that
    #: belongs to that layer.
    leaves_special_layers = False

    shape: BlockShape
    layers: int | None

    def bind(self, shape: BlockShape, layers: int | None = None) -> Self:
        """Returns the unbuilt block for layers of a shape.

        Args:
            shape: `BlockShape` of each layer.
            layers: How many layers share the block, `None` for the block of
                one layer, whose tensors have no axis for them.

        Raises:
            ValueError: If the block is not for such a layer.
        """
        self.check_shape(shape)
        block = copy.copy(self)
        block.shape, block.layers = shape, layers
        block.prepare()
        return block

    def check_shape(self, shape: BlockShape) -> None:
        """Raises ValueError if the block is not for a layer of this shape."""
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

    def prepare(self) -> None:
        """Computes what follows from options, `shape` and `layers`."""

    @property
    def axis(self) -> tuple[int, ...]:
        """The axis of layers of all tensors, if there is one."""
        return () if self.layers is None else (self.layers,)

    @property
    def lead(self) -> tuple[int, ...]:
        """Axes before rows and columns: layers, then groups, if any."""
        return (*self.axis, *self.shape.lead)

    @property
    def matrix(self) -> tuple[int, ...]:
        """Shape of gradients, `[(layers,) (groups,) rows, columns]`."""
        return (*self.axis, *self.shape.matrix)

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
        self._averages: dict[str, Any] = {}
        self._caches: dict[str, Any] = {}
        self._others: dict[str, Any] = {}
        self._add_variable = add_variable
        self._add_sum = add_sum or add_variable
        self._weight = add_variable("weight", self.axis, "zeros")
        self.build_state()

    @abc.abstractmethod
    def build_state(self) -> None:
        """Declares running averages and caches."""

    def add_average(self, name: str, shape: tuple[int, ...]) -> Any:
        """Adds a running average of the statistic of this name."""
        self._averages[name] = self._add_sum(name, shape, "zeros")
        return self._averages[name]

    def add_cache(
        self, name: str, shape: tuple[int, ...], initializer: Any = "zeros"
    ) -> Any:
        """Adds a variable computed by `refresh`."""
        self._caches[name] = self._add_variable(name, shape, initializer)
        return self._caches[name]

    def add_state(
        self, name: str, shape: tuple[int, ...], initializer: Any = "zeros"
    ) -> Any:
        """Adds a variable that `observe_gradient` changes."""
        self._others[name] = self._add_variable(name, shape, initializer)
        return self._others[name]

    @property
    def variables(self) -> dict[str, Any]:
        """All state by name."""
        own = {"weight": self._weight, **self._averages, **self._caches}
        return {**own, **self._others}

    def copy_statistics(self, other: Block) -> None:
        """Takes the running averages of a block of the same kind and shape."""
        self._weight.assign(other._weight.value)
        for name, average in self._averages.items():
            average.assign(other._averages[name].value)

    def copy_inverse(self, other: Block) -> None:
        """Takes what the other block's last `refresh` has computed."""
        for name, cache in self._caches.items():
            cache.assign(other._caches[name].value)

    @property
    def dtype(self) -> str:
        """Dtype of the state."""
        return str(self._weight.dtype)

    @property
    def memory(self) -> int:
        """Number of state elements that the block keeps, of all layers."""
        sizes: list[int] = []

        def count(name: str, shape: tuple[int, ...], initializer: Any) -> None:
            if name != "weight":
                sizes.append(math.prod(shape))

        self.bind(self.shape, self.layers).build(count)
        return sum(sizes)

    @property
    def refresh_cost(self) -> int:
        """What the refresh of a layer costs beside those of other blocks."""
        rows, columns = self.shape.rows, self.shape.columns
        return (self.shape.groups or 1) * (rows**3 + columns**3)

    # -- Statistics ------------------------------------------------------

    @abc.abstractmethod
    def input_statistics(self, inputs: Rows, weights: tf.Tensor) -> Statistics:
        """Returns the statistics of the inputs alone, by name.

        Args:
            inputs: Tensor `[(groups,) batch, shared, rows]`, or
                `StructuredRows`.
            weights: Tensor `[batch]`, relative weights of the examples.
        """

    @abc.abstractmethod
    def cotangent_statistics(
        self, inputs: Rows, cotangents: tf.Tensor
    ) -> Statistics:
        """Returns the statistics of one column of the loss factor, by name.

        Args:
            inputs: Tensor `[(groups,) batch, shared, rows]`, or
                `StructuredRows`.
            cotangents: Tensor `[(groups,) batch, shared, columns]`.
        """

    def observe_gradient(self, gradient: tf.Tensor) -> None:
        """Sees the gradient of every step, where `uses_gradients` is set.

        It is called before `precondition`.

        Args:
            gradient: Tensor `[(layers,) (groups,) rows, columns]`.
        """

    def accumulate(
        self,
        statistics: Mapping[str, tf.Tensor],
        decay: float | tf.Tensor,
        keep_finite: bool = False,
    ) -> None:
        """Folds statistics into the running averages.

        Average and weight follow `s ← β s + (1 − β) ŝ`, `w ← β w + (1 − β)`;
        dividing by `w` makes the average unbiased from the first step on.

        Args:
            statistics: Those of inputs and of cotangents, by name.
            decay: Scalar β in [0, 1).
            keep_finite: Whether statistics of a layer that are not finite, as
                float16 may have them, or a head of one's own, change nothing:
                `β` is one for this layer. Otherwise they stay in the averages.
        """
        decay = scalar(decay, self.dtype)
        share = 1 - decay
        usable = None
        if keep_finite and statistics:
            sums = [self.layer_sums(new) for new in statistics.values()]
            usable = tf.math.is_finite(tf.add_n(sums))
        for name, average in self._averages.items():
            old = tf.convert_to_tensor(average.value)
            new = tf.cast(statistics[name], old.dtype)
            average.assign(select(usable, decay * old + share * new, old))
        old = tf.convert_to_tensor(self._weight.value)
        self._weight.assign(select(usable, decay * old + share, old))

    def update_basis(self) -> bool:
        """Finds the basis that statistics of cotangents are taken in, if any.

        `refresh` does so by itself. For who has a single batch, whose
        statistics are taken once more after this.

        Returns:
            Whether the block has one.
        """
        return False

    def averages(self) -> Statistics:
        """Returns the debiased running averages, by name."""
        return {name: self.average(name) for name in self._averages}

    def average(self, name: str) -> tf.Tensor:
        """Returns a debiased running average."""
        return self.debias(tf.convert_to_tensor(self._averages[name].value))

    def debias(self, value: tf.Tensor) -> tf.Tensor:
        """Corrects a running average, or what is linear in it.

        A trace is corrected for a fraction of what its whole matrix costs.

        Args:
            value: Tensor `[(layers,) ...]`.
        """
        weight = tf.convert_to_tensor(self._weight.value)
        return tf.math.divide_no_nan(value, expand_to(weight, value.shape.rank))

    def layer_sums(self, values: tf.Tensor) -> tf.Tensor:
        """Returns the sum over all axes but that of the layers."""
        axes = list(range(len(self.axis), values.shape.rank))
        return tf.reduce_sum(values, axis=axes) if axes else values

    # -- Curvature -------------------------------------------------------

    @abc.abstractmethod
    def trace(self) -> tf.Tensor:
        """Returns the trace of the undamped Fisher, of every layer."""

    @abc.abstractmethod
    def refresh(
        self, damping: tf.Tensor, ratio: tf.Tensor | None = None
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Recomputes the cached inverse.

        Where the factorisation of a layer fails for good, its last good
        inverse stays.

        Args:
            damping: λ, added to the Fisher, a scalar or one per layer.
            ratio: Scalar π that splits λ over two factors, for blocks that
                are products; their own where it is `None`.

        Returns:
            Two int32 scalars: raised dampings and layers that failed.
        """

    @abc.abstractmethod
    def precondition(self, gradient: tf.Tensor) -> tf.Tensor:
        """Returns `(F + λ I)⁻¹ vec(gradient)`, shaped like the gradient.

        Args:
            gradient: Tensor `[(layers,) (groups,) rows, columns]`.
        """

    @abc.abstractmethod
    def operator(self) -> tf.linalg.LinearOperator:
        """Returns the undamped Fisher of one layer as a linear operator.

        It acts on row-major flattened `[(groups,) rows, columns]` matrices.
        """

    def to_dense(self) -> tf.Tensor:
        """Returns the undamped Fisher of one layer, `[size, size]`."""
        return self.operator().to_dense()

    # -- Eigenvalues -----------------------------------------------------

    @property
    def spectrum_side(self) -> int:
        """Side of the largest matrix that `spectra` decomposes."""
        return self.shape.size

    def spectra(self) -> dict[str, tf.Tensor]:
        """Returns the eigenvalues of one layer's undamped Fisher, in parts.

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

        A tensor `[(layers,) rows]`, the same for all columns; `None` is the
        identity.
        """
        return None

    def describe(self) -> str:
        """Returns the approximation in a few words, for the summary."""
        return self.kind
