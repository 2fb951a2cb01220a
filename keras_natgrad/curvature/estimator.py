"""The block-diagonal Fisher of a network: one block per layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import tensorflow as tf

from keras_natgrad.blocks import (
    Block,
    BlockShape,
    GradientDiagonalBlock,
    GradientScalarBlock,
    create,
)
from keras_natgrad.blocks.base import VariableFactory
from keras_natgrad.capture import LayerPlan, LayerRecord, Plan
from keras_natgrad.curvature.cotangents import (
    OutputTerm,
    column_cotangents,
    example_weights,
    random_cotangents,
)

_FALLBACKS = {
    "diagonal": GradientDiagonalBlock,
    "first_order": GradientScalarBlock,
}


@dataclass(frozen=True)
class BlockOptions:
    """Which block each layer gets.

    Attributes:
        block: Block name for captured layers.
        weight_sharing: `"expand"` or `"reduce"`, for Kronecker factors.
        max_factor_size: Largest side of a dense Kronecker factor.
        fallback: `"diagonal"` or `"first_order"`, for the rest.
    """

    block: str = "kronecker"
    weight_sharing: str = "expand"
    max_factor_size: int = 4096
    fallback: str = "diagonal"

    def __post_init__(self) -> None:
        if self.fallback not in _FALLBACKS:
            raise ValueError(
                f"`fallback` must be one of {sorted(_FALLBACKS)}. "
                f"Received: fallback={self.fallback!r}"
            )


@dataclass(frozen=True)
class _Entry:
    """One block and the variables that it covers."""

    block: Block
    variables: tuple[int, ...]
    layer: LayerPlan | None = None
    shape: tuple[int, ...] = field(default=())

    def to_matrix(self, tensors: Sequence[tf.Tensor]) -> tf.Tensor:
        own = [tf.convert_to_tensor(tensors[i]) for i in self.variables]
        own = [tf.cast(tensor, self.block.dtype) for tensor in own]
        if self.layer is None:
            return tf.reshape(own[0], [-1, 1])
        return self.layer.layout.to_matrix(own)

    def from_matrix(self, matrix: tf.Tensor) -> list[tf.Tensor]:
        if self.layer is None:
            return [tf.reshape(matrix, self.shape)]
        return self.layer.layout.from_matrix(matrix)


class BlockDiagonal:
    """Owns the blocks of a network; statistics, inverses, preconditioning.

    Everything it does to tensors can be traced and compiled. Its state is
    created from the plan and the variables' shapes alone.

    Args:
        plan: `Plan` of the network.
        shapes: Shapes of the optimizer's variables.
        options: `BlockOptions`.
    """

    def __init__(
        self,
        plan: Plan,
        shapes: Sequence[tuple[int, ...]],
        options: BlockOptions,
    ) -> None:
        self.plan = plan
        self.entries: list[_Entry] = []
        for layer in plan.layers:
            block = create(
                options.block,
                BlockShape(layer.layout.rows, layer.layout.columns),
                weight_sharing=options.weight_sharing,
                max_factor_size=options.max_factor_size,
            )
            self.entries.append(_Entry(block, layer.variables, layer))
        for index in plan.fallback:
            shape = tuple(shapes[index])
            block = _FALLBACKS[options.fallback](
                BlockShape(math.prod(shape), 1)
            )
            self.entries.append(_Entry(block, (index,), None, shape))

    @property
    def captured(self) -> list[_Entry]:
        """Entries of captured layers, in the order of the plan."""
        return [entry for entry in self.entries if entry.layer is not None]

    @property
    def fallbacks(self) -> list[_Entry]:
        """Entries of single variables that fall back."""
        return [entry for entry in self.entries if entry.layer is None]

    @property
    def size(self) -> int:
        """Number of parameters."""
        return sum(entry.block.shape.size for entry in self.entries)

    def build(self, names: Sequence[str], add_variable: Any) -> None:
        """Creates the state of every block.

        Args:
            names: Unique names of the variables, in order.
            add_variable: `VariableFactory`.
        """
        for entry in self.entries:
            prefix = names[entry.variables[0]]

            def factory(
                name: str,
                shape: tuple[int, ...],
                init: str,
                prefix: str = prefix,
            ) -> Any:
                return add_variable(f"{prefix}_{name}", shape, init)

            make: VariableFactory = factory
            entry.block.build(make)

    # -- Statistics ------------------------------------------------------

    def statistics(
        self,
        tape: tf.GradientTape,
        terms: Sequence[OutputTerm],
        records: Sequence[LayerRecord],
        variables: Sequence[tf.Variable],
        kind: str,
        seed: tf.Tensor,
    ) -> list[tuple[tf.Tensor, ...]]:
        """Returns the statistics of one batch, one tuple per entry.

        Args:
            tape: Persistent tape of the forward pass.
            terms: The network's outputs.
            records: One `LayerRecord` per captured layer.
            variables: All variables, for the fallbacks.
            kind: One of `FISHER_KINDS`.
            seed: int32 `[2]`.
        """
        inputs = [
            record.canonical_inputs(entry.block.dtype)
            for entry, record in zip(self.captured, records, strict=True)
        ]
        weights = example_weights(terms)
        first = [
            entry.block.input_statistics(a, tf.cast(weights, a.dtype))
            for entry, a in zip(self.captured, inputs, strict=True)
        ] + [() for _ in self.fallbacks]

        def one_pass(
            cotangents: Sequence[tf.Tensor],
        ) -> list[tuple[tf.Tensor, ...]]:
            return self._backward(
                tape, terms, records, inputs, variables, cotangents
            )

        if kind == "exact":
            second = self._sum_over_columns(terms, seed, one_pass)
        else:
            second = one_pass(random_cotangents(terms, kind, seed))
        return [a + g for a, g in zip(first, second, strict=True)]

    def _backward(
        self,
        tape: tf.GradientTape,
        terms: Sequence[OutputTerm],
        records: Sequence[LayerRecord],
        inputs: Sequence[tf.Tensor],
        variables: Sequence[tf.Variable],
        cotangents: Sequence[tf.Tensor],
    ) -> list[tuple[tf.Tensor, ...]]:
        """Sends cotangents back once; returns the cotangent statistics."""
        sources = [list(record.preactivations) for record in records]
        rest = [variables[entry.variables[0]] for entry in self.fallbacks]
        gradients, rest_gradients = tape.gradient(
            [term.outputs for term in terms],
            (sources, rest),
            output_gradients=list(cotangents),
        )
        statistics = []
        for entry, record, a, g in zip(
            self.captured, records, inputs, gradients, strict=True
        ):
            canonical = record.canonical_cotangents(g, entry.block.dtype)
            statistics.append(entry.block.cotangent_statistics(a, canonical))
        for entry, variable, gradient in zip(
            self.fallbacks, rest, rest_gradients, strict=True
        ):
            if gradient is None:
                gradient = tf.zeros_like(variable)
            flat = tf.reshape(
                tf.cast(tf.convert_to_tensor(gradient), entry.block.dtype),
                [-1, 1],
            )
            block = entry.block
            assert isinstance(block, GradientDiagonalBlock)
            statistics.append(block.gradient_statistics(flat))
        return statistics

    def _sum_over_columns(
        self, terms: Sequence[OutputTerm], seed: tf.Tensor, one_pass: Any
    ) -> list[tuple[tf.Tensor, ...]]:
        """Sums the cotangent statistics over all columns of L."""
        total: Any = None
        for index, term in enumerate(terms):
            count = term.column_count()

            def contribution(
                column: tf.Tensor, index: int = index
            ) -> list[tuple[tf.Tensor, ...]]:
                folded = tf.random.fold_in(seed, column, alg="philox")
                return one_pass(column_cotangents(terms, index, column, folded))

            start = contribution(tf.constant(0, tf.int32))
            _, summed = tf.while_loop(
                lambda column, _, count=count: column < count,
                lambda column, sums, contribution=contribution: (
                    column + 1,
                    tf.nest.map_structure(tf.add, sums, contribution(column)),
                ),
                (tf.constant(1, tf.int32), start),
            )
            total = (
                summed
                if total is None
                else tf.nest.map_structure(tf.add, total, summed)
            )
        return total

    def accumulate(
        self, statistics: Sequence[tuple[tf.Tensor, ...]], decay: tf.Tensor
    ) -> None:
        """Folds a batch's statistics into the running averages."""
        for entry, new in zip(self.entries, statistics, strict=True):
            entry.block.accumulate(new, decay)

    # -- Curvature -------------------------------------------------------

    def mean_eigenvalue(self) -> tf.Tensor:
        """Returns the trace of the Fisher over the number of parameters."""
        traces = [
            tf.cast(entry.block.trace(), self.entries[0].block.dtype)
            for entry in self.entries
        ]
        return tf.add_n(traces) / self.size

    def refresh(
        self, damping: tf.Tensor, ridge: Sequence[float]
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Recomputes every cached inverse.

        Args:
            damping: Scalar λ.
            ridge: Per variable, the curvature of its L2 regularizer.

        Returns:
            Raised dampings and failed factorisations, int32 scalars.
        """
        retries = tf.constant(0, tf.int32)
        failures = tf.constant(0, tf.int32)
        for entry in self.entries:
            total = damping + ridge[entry.variables[0]]
            more_retries, more_failures = entry.block.refresh(total)
            retries += more_retries
            failures += more_failures
        return retries, failures

    def precondition(self, gradients: Sequence[Any]) -> list[tf.Tensor]:
        """Returns `(F + λ I)⁻¹` times a gradient per variable.

        Variables without a gradient (`None`) get a direction of zero.
        """
        directions: list[Any] = [None] * len(gradients)
        for entry in self.entries:
            matrix = entry.to_matrix(gradients)
            solved = entry.from_matrix(entry.block.precondition(matrix))
            for index, direction in zip(entry.variables, solved, strict=True):
                directions[index] = direction
        return directions
