"""The block-diagonal Fisher of a network: one block per layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from keras_natgrad.blocks import GradientBlock
from keras_natgrad.blocks.base import VariableFactory
from keras_natgrad.capture import Plan
from keras_natgrad.curvature.assignment import BlockOptions, Entry, make_entries
from keras_natgrad.curvature.captured_pass import Backward, CapturedPass
from keras_natgrad.curvature.cotangents import (
    OutputTerm,
    column_cotangents,
    random_cotangents,
)
from keras_natgrad.linalg import trace_norm_ratio

# Share of the damping that goes to the input factors, see `_global_ratio`.
_GLOBAL_RATIO = 0.2

Statistics = list[tuple[tf.Tensor, ...]]


class BlockDiagonal:
    """Owns the blocks of a network; statistics, inverses, preconditioning.

    Everything it does to tensors can be traced and compiled. Its state is
    created from the plan and the variables' shapes alone.

    Directions are lists of `[rows, columns]` matrices, one per entry; see
    `to_matrices` and `from_matrices`.

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
        self.entries = self.make_entries(shapes, options)
        self._variable_count = len(shapes)
        self._split_globally = options.damping_split == "global"

    def make_entries(
        self, shapes: Sequence[tuple[int, ...]], options: BlockOptions
    ) -> list[Entry]:
        """Returns one entry per captured layer and fallback variable."""
        return make_entries(self.plan, shapes, options)

    @property
    def captured(self) -> list[Entry]:
        """Entries of captured layers, in the order of the plan."""
        return [entry for entry in self.entries if entry.layer is not None]

    @property
    def size(self) -> int:
        """Number of parameters."""
        return sum(entry.block.shape.size for entry in self.entries)

    def build(
        self,
        names: Sequence[str],
        add_variable: VariableFactory,
        add_sum: VariableFactory | None = None,
    ) -> None:
        """Creates the state of every block.

        Args:
            names: Unique names of the variables, in order.
            add_variable: `VariableFactory`.
            add_sum: The same for running averages, see `Block.build`.
        """
        for entry in self.entries:
            name = names[entry.variables[0]]
            entry.block.build(
                _prefixed(add_variable, name),
                _prefixed(add_sum or add_variable, name),
            )

    # -- Statistics ------------------------------------------------------

    def statistics(
        self,
        captured: CapturedPass,
        kind: str,
        seed: tf.Tensor,
    ) -> Statistics:
        """Returns the statistics of one batch, one tuple per entry.

        Args:
            captured: The forward pass.
            kind: One of `FISHER_KINDS`.
            seed: int32 `[2]`.
        """
        first: Statistics = [
            entry.block.input_statistics(a, tf.cast(captured.weights, a.dtype))
            for entry, a in zip(self.captured, captured.inputs, strict=True)
        ]
        if captured.share is not None:
            # Every replica's mean counts by its weight.
            first = [
                tuple(tf.cast(captured.share, s.dtype) * s for s in each)
                for each in first
            ]
        first += [()] * (len(self.entries) - len(first))
        if not any(entry.block.uses_cotangents for entry in self.entries):
            return first
        if kind == "exact":
            second = self._sum_over_columns(captured, seed)
        else:
            backward = captured.backward(
                random_cotangents(captured.terms, kind, seed)
            )
            second = self._cotangent_statistics(captured, backward)
        return [a + g for a, g in zip(first, second, strict=True)]

    def _cotangent_statistics(
        self, captured: CapturedPass, backward: Backward
    ) -> Statistics:
        statistics = [
            entry.block.cotangent_statistics(a, g)
            for entry, a, g in zip(
                captured.captured,
                captured.inputs,
                backward.cotangents,
                strict=True,
            )
        ]
        for entry, gradient in zip(
            captured.fallbacks, backward.gradients, strict=True
        ):
            block = entry.block
            assert isinstance(block, GradientBlock)
            statistics.append(block.gradient_statistics(gradient))
        return statistics

    def _sum_over_columns(
        self, captured: CapturedPass, seed: tf.Tensor
    ) -> Statistics:
        """Sums the cotangent statistics over all columns of L."""
        return sum_over_columns(
            captured.terms,
            lambda cotangents: self._cotangent_statistics(
                captured, captured.backward(cotangents)
            ),
            seed,
        )

    def accumulate(
        self,
        statistics: Statistics,
        decay: float | tf.Tensor,
        keep_finite: bool = False,
    ) -> None:
        """Folds a batch's statistics into the running averages.

        Args:
            statistics: One tuple per entry.
            decay: Decay of the averages.
            keep_finite: See `Block.accumulate`.
        """
        for entry, new in zip(self.entries, statistics, strict=True):
            entry.block.accumulate(new, decay, keep_finite)

    def update_bases(self) -> bool:
        """Finds the bases that statistics are taken in.

        Returns:
            Whether there are any, so that the statistics of a single batch
            have to be taken once more.
        """
        return any([entry.block.update_basis() for entry in self.entries])

    # -- Curvature -------------------------------------------------------

    def mean_eigenvalue(self) -> tf.Tensor:
        """Returns a typical eigenvalue of the Fisher, the scale of damping.

        It is the harmonic mean, over all parameters, of their blocks' mean
        eigenvalues. An arithmetic mean would be that of the steepest layer
        alone (the last one, where the targets have a small unit), and a
        damping of its size would hold all others still. Layers that the loss
        does not reach have no say.
        """
        sizes = [entry.block.shape.size for entry in self.entries]
        means = [
            entry.block.trace() / size
            for entry, size in zip(self.entries, sizes, strict=True)
        ]
        return _harmonic_mean(means, sizes, [mean > 0 for mean in means])

    def refresh(
        self,
        damping: tf.Tensor,
        ridge: Sequence[float],
        devices: Sequence[str] = (),
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Recomputes every cached inverse.

        Args:
            damping: Scalar λ.
            ridge: Per variable, the curvature of its L2 regularizer. That of
                the kernel counts for the block.
            devices: Devices that share out the blocks; where there are none,
                all is done where it is called.

        Returns:
            Raised dampings and failed factorisations, int32 scalars.
        """
        return self.refresh_blocks(
            *self.refresh_arguments(damping, ridge), devices
        )

    def refresh_arguments(
        self, damping: tf.Tensor, ridge: Sequence[float]
    ) -> tuple[list[tf.Tensor], tf.Tensor | None]:
        """Returns the damping of every entry, and π where all share one.

        Args:
            damping: See `refresh`.
            ridge: See `refresh`.
        """
        ratio = self._global_ratio() if self._split_globally else None
        dampings = [
            damping + ridge[entry.variables[0]] for entry in self.entries
        ]
        return dampings, ratio

    def refresh_blocks(
        self,
        dampings: Sequence[tf.Tensor],
        ratio: tf.Tensor | None,
        devices: Sequence[str],
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Recomputes every cached inverse, each with its own damping.

        Args:
            dampings: Scalar λ of every entry.
            ratio: See `Block.refresh`.
            devices: See `refresh`.

        Returns:
            Raised dampings and failed factorisations, int32 scalars.
        """
        retries = tf.constant(0, tf.int32)
        failures = tf.constant(0, tf.int32)
        places = share_out(
            [e.block.refresh_cost for e in self.entries], devices
        )
        for entry, damping, device in zip(
            self.entries, dampings, places, strict=True
        ):
            with tf.device(device):
                more_retries, more_failures = entry.block.refresh(
                    damping, ratio
                )
            retries += more_retries
            failures += more_failures
        return retries, failures

    def _global_ratio(self) -> tf.Tensor | None:
        """Returns one π for all Kronecker products of the network.

        It compares the mean eigenvalues of all input and all output factors,
        `π = k √(ā / ḡ)`, where ā and ḡ are harmonic means over the features, so
        that one steep layer does not speak for all. With a π of its own every
        layer is damped alike; with a common one, layers whose cotangents are
        small are damped more. The constant k was measured.
        """
        scales = [entry.block.factor_scales() for entry in self.entries]
        found = [scale for scale in scales if scale is not None]
        if not found:
            return None
        # Layers that the loss does not reach have no say.
        reached = [scale.output_trace > 0 for scale in found]

        def mean(traces: list[tf.Tensor], sizes: list[int]) -> tf.Tensor:
            means = [t / n for t, n in zip(traces, sizes, strict=True)]
            return _harmonic_mean(means, sizes, reached)

        return _GLOBAL_RATIO * trace_norm_ratio(
            mean([s.input_trace for s in found], [s.input_size for s in found]),
            mean(
                [s.output_trace for s in found], [s.output_size for s in found]
            ),
        )

    def precondition(self, matrices: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        """Returns `(F + λ I)⁻¹` times a direction."""
        return [
            entry.block.precondition(matrix)
            for entry, matrix in zip(self.entries, matrices, strict=True)
        ]

    def damping_rows(self) -> list[tf.Tensor | None]:
        """Returns the metric of the damping of every entry."""
        return [entry.block.damping_rows() for entry in self.entries]

    def to_matrices(self, tensors: Sequence[Any]) -> list[tf.Tensor]:
        """Returns one matrix per entry from one tensor per variable."""
        return [entry.to_matrix(tensors) for entry in self.entries]

    def from_matrices(self, matrices: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        """Returns one tensor per variable from one matrix per entry."""
        tensors: list[Any] = [None] * self._variable_count
        for entry, matrix in zip(self.entries, matrices, strict=True):
            parts = entry.from_matrix(matrix)
            for index, part in zip(entry.variables, parts, strict=True):
                tensors[index] = part
        return tensors


def share_out(costs: Sequence[int], devices: Sequence[str]) -> list[Any]:
    """Returns a device for every piece of work, the largest pieces first.

    Args:
        costs: The cost of each piece.
        devices: The devices, if any; each piece goes to the one with the
            least work so far.

    Returns:
        One device per piece, `None` where there are no devices.
    """
    places: list[Any] = [None] * len(costs)
    load = dict.fromkeys(devices, 0)
    if load:
        for piece in sorted(range(len(costs)), key=lambda i: -costs[i]):
            device = min(load, key=lambda name: load[name])
            places[piece] = device
            load[device] += costs[piece]
    return places


def _harmonic_mean(
    means: Sequence[tf.Tensor],
    sizes: Sequence[int],
    used: Sequence[tf.Tensor],
) -> tf.Tensor:
    """Returns `Σ n / Σ (n / mean)` over the entries that are used."""
    counts = [
        tf.where(use, tf.constant(size, mean.dtype), 0)
        for use, size, mean in zip(used, sizes, means, strict=True)
    ]
    inverse = [
        tf.math.divide_no_nan(count, mean)
        for count, mean in zip(counts, means, strict=True)
    ]
    return tf.math.divide_no_nan(tf.add_n(counts), tf.add_n(inverse))


def _prefixed(add_variable: VariableFactory, prefix: str) -> VariableFactory:
    def add(name: str, shape: tuple[int, ...], initializer: str) -> Any:
        return add_variable(f"{prefix}_{name}", shape, initializer)

    return add


def sum_over_columns(
    terms: Sequence[OutputTerm],
    contribution: Callable[[list[tf.Tensor]], Any],
    seed: tf.Tensor,
) -> Any:
    """Sums a function of the cotangents over all columns of L of all terms.

    Args:
        terms: Outputs.
        contribution: Takes one cotangent per output.
        seed: int32 `[2]`.
    """
    total: Any = None
    for index, term in enumerate(terms):

        def one(column: tf.Tensor, index: int = index) -> Any:
            folded = tf.random.fold_in(seed, column, alg="philox")
            return contribution(column_cotangents(terms, index, column, folded))

        summed = sum_over(one, term.column_count())
        total = summed if total is None else _add(total, summed)
    return total


def _add(left: Any, right: Any) -> Any:
    return tf.nest.map_structure(tf.add, left, right)


def sum_over(function: Callable[[tf.Tensor], Any], count: tf.Tensor) -> Any:
    """Returns `function(0) + … + function(count − 1)`, in a loop.

    Args:
        function: Takes an int32 scalar, returns tensors.
        count: int32 scalar, at least one.
    """
    _, total = tf.while_loop(
        lambda index, _: index < count,
        lambda index, sums: (index + 1, _add(sums, function(index))),
        (tf.constant(1, tf.int32), function(tf.constant(0, tf.int32))),
    )
    return total
