"""The block-diagonal Fisher of a network: one block per layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from keras_natgrad.blocks import GradientBlock
from keras_natgrad.blocks.base import Statistics, VariableFactory
from keras_natgrad.blocks.shape import FactorScales
from keras_natgrad.capture import Plan
from keras_natgrad.curvature.assignment import BlockOptions, Entry, make_entries
from keras_natgrad.curvature.captured_pass import Backward, CapturedPass
from keras_natgrad.curvature.cotangents import sum_over_columns
from keras_natgrad.curvature.stacks import Stack, make_stacks, share_out
from keras_natgrad.linalg import scalar, trace_norm_ratio

# Share of the damping that goes to the input factors, see `_global_ratio`.
_GLOBAL_RATIO = 0.2


class BlockDiagonal:
    """Owns the blocks of a network; statistics, inverses, preconditioning.

    Everything it does to tensors can be traced and compiled. Its state is
    created from the plan and the variables' shapes alone.

    Layers whose block class, shape and options are equal share one block, see
    `Stack`. Directions are lists of tensors `[layers, (groups,) rows,
    columns]`, one per stack; see `to_matrices` and `from_matrices`. Whatever
    is one number per layer is in the order of `entries`: stack by stack, those
    of captured layers first.

    Args:
        plan: `Plan` of the network.
        shapes: Shapes of the optimizer's variables.
        options: `BlockOptions`.
        stacked: Whether layers share blocks. Without, every block is that of
            a single layer, with all its methods.
    """

    def __init__(
        self,
        plan: Plan,
        shapes: Sequence[tuple[int, ...]],
        options: BlockOptions,
        stacked: bool = True,
    ) -> None:
        self.plan = plan
        self.stacks: list[Stack] = make_stacks(
            self.make_entries(shapes, options), stacked
        )
        self.entries = [e for stack in self.stacks for e in stack.entries]
        self._variable_count = len(shapes)
        self._split_globally = options.damping_split == "global"

    def make_entries(
        self, shapes: Sequence[tuple[int, ...]], options: BlockOptions
    ) -> list[Entry]:
        """Returns one entry per captured layer and fallback variable."""
        return make_entries(self.plan, shapes, options)

    @property
    def captured(self) -> list[Entry]:
        """Entries of captured layers."""
        return [entry for entry in self.entries if entry.layer is not None]

    @property
    def in_plan_order(self) -> list[Entry]:
        """Entries in the order of the plan, captured ones first."""
        return sorted(self.entries, key=lambda e: (e.layer is None, e.position))

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
        for stack in self.stacks:
            stack.build(names, add_variable, add_sum or add_variable)

    # -- Statistics ------------------------------------------------------

    def statistics(
        self,
        captured: CapturedPass,
        kind: str,
        seed: tf.Tensor,
    ) -> list[Statistics]:
        """Returns the statistics of one batch, those of every stack.

        Args:
            captured: The forward pass.
            kind: One of `FISHER_KINDS`.
            seed: int32 `[2]`.
        """
        first = self.stacked(
            [
                entry.block.input_statistics(
                    a, tf.cast(captured.weights, a.dtype)
                )
                for entry, a in zip(self.captured, captured.inputs, strict=True)
            ]
            + [{} for _ in captured.fallbacks]
        )
        if captured.share is not None:
            # Every replica's mean counts by its weight.
            share = captured.share
            first = [
                {name: tf.cast(share, s.dtype) * s for name, s in each.items()}
                for each in first
            ]
        if not self.uses_cotangents:
            return first

        def second(cotangents: list[tf.Tensor]) -> list[Statistics]:
            backward = captured.backward(cotangents)
            return self._cotangent_statistics(captured, backward)

        if kind == "exact":
            found = sum_over_columns(captured.terms, second, seed)
        else:
            found = self._cotangent_statistics(
                captured, captured.random_backward(kind, seed)
            )
        return [{**a, **g} for a, g in zip(first, found, strict=True)]

    def _cotangent_statistics(
        self, captured: CapturedPass, backward: Backward
    ) -> list[Statistics]:
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
        return self.stacked(statistics)

    def stacked(self, found: Sequence[Statistics]) -> list[Statistics]:
        """Returns the statistics of stacks from those of layers."""
        rest = iter(found)
        return [
            stack.stack_statistics([next(rest) for _ in stack.entries])
            for stack in self.stacks
        ]

    def accumulate(
        self,
        statistics: Sequence[Statistics],
        decay: float | tf.Tensor,
        keep_finite: bool = False,
    ) -> None:
        """Folds a batch's statistics into the running averages.

        Args:
            statistics: Those of every stack.
            decay: Decay of the averages.
            keep_finite: See `Block.accumulate`.
        """
        for stack, new in zip(self.stacks, statistics, strict=True):
            if isinstance(decay, float):
                decay = scalar(decay, stack.block.dtype)
            stack.block.accumulate(new, decay, keep_finite)

    @property
    def uses_cotangents(self) -> bool:
        """Whether any block has statistics of cotangents."""
        return any(stack.block.uses_cotangents for stack in self.stacks)

    @property
    def uses_gradients(self) -> bool:
        """Whether `observe_gradients` is to be called at every step."""
        return any(stack.block.uses_gradients for stack in self.stacks)

    def observe_gradients(self, matrices: Sequence[tf.Tensor]) -> None:
        """Shows the gradient of a step to the blocks that ask for it."""
        for stack, matrix in zip(self.stacks, matrices, strict=True):
            if stack.block.uses_gradients:
                stack.observe_gradient(matrix)

    def update_bases(self) -> bool:
        """Finds the bases that statistics are taken in.

        Returns:
            Whether there are any, so that the statistics of a single batch
            have to be taken once more.
        """
        return any([stack.block.update_basis() for stack in self.stacks])

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
        traces = tf.concat([stack.trace() for stack in self.stacks], axis=0)
        return _harmonic_mean(traces, sizes, traces > 0)

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
            devices: Devices that share out the layers; where there are none,
                all is done where it is called.

        Returns:
            Raised dampings and failed layers, int32 scalars.
        """
        return self.refresh_blocks(
            *self.refresh_arguments(damping, ridge), devices
        )

    def refresh_arguments(
        self, damping: tf.Tensor, ridge: Sequence[float]
    ) -> tuple[list[tf.Tensor], tf.Tensor | None]:
        """Returns the damping of every stack, and π where all share one.

        Args:
            damping: See `refresh`.
            ridge: See `refresh`.
        """
        ratio = self._global_ratio() if self._split_globally else None
        return [stack.damping(damping, ridge) for stack in self.stacks], ratio

    def refresh_blocks(
        self,
        dampings: Sequence[tf.Tensor],
        ratio: tf.Tensor | None,
        devices: Sequence[str],
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Recomputes every cached inverse, each stack with its own damping.

        Args:
            dampings: λ of every stack, scalars or one per layer.
            ratio: See `Block.refresh`.
            devices: See `refresh`.

        Returns:
            Raised dampings and failed layers, int32 scalars.
        """
        costs = [entry.block.refresh_cost for entry in self.entries]
        places = iter(share_out(costs, devices))
        counts = [
            stack.refresh_parts(
                damping, ratio, [next(places) for _ in stack.entries]
            )
            for stack, damping in zip(self.stacks, dampings, strict=True)
        ]
        retries, failures = zip(*counts, strict=True)
        return tf.add_n(retries), tf.add_n(failures)

    def _global_ratio(self) -> tf.Tensor | None:
        """Returns one π for all Kronecker products of the network.

        It compares the mean eigenvalues of all input and all output factors,
        `π = k √(ā / ḡ)`, where ā and ḡ are harmonic means over the features, so
        that one steep layer does not speak for all. With a π of its own every
        layer is damped alike; with a common one, layers whose cotangents are
        small are damped more. The constant k was measured.
        """
        found: list[tuple[Stack, FactorScales]] = []
        for stack in self.stacks:
            scales = stack.block.factor_scales()
            if scales is not None:
                found.append((stack, scales))
        if not found:
            return None

        def joined(name: str) -> tuple[tf.Tensor, list[int]]:
            traces, sizes = [], []
            for stack, scales in found:
                traces.append(stack.per_layer(getattr(scales, f"{name}_trace")))
                sizes += [getattr(scales, f"{name}_size")] * stack.count
            return tf.concat(traces, axis=0), sizes

        inputs, outputs = joined("input"), joined("output")
        # Layers that the loss does not reach have no say.
        reached = outputs[0] > 0
        return _GLOBAL_RATIO * trace_norm_ratio(
            _harmonic_mean(*inputs, reached), _harmonic_mean(*outputs, reached)
        )

    def precondition(self, matrices: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        """Returns `(F + λ I)⁻¹` times a direction."""
        return [
            stack.precondition(matrix)
            for stack, matrix in zip(self.stacks, matrices, strict=True)
        ]

    def damping_rows(self) -> list[tf.Tensor | None]:
        """Returns the metric of the damping of every stack.

        Tensors `[layers, rows]`, `None` for the identity.
        """
        found = []
        for stack in self.stacks:
            rows = stack.block.damping_rows()
            found.append(None if rows is None else stack.per_layer(rows))
        return found

    # -- Directions ------------------------------------------------------

    def to_matrices(self, tensors: Sequence[Any]) -> list[tf.Tensor]:
        """Returns a direction from one tensor per variable."""
        return [stack.to_matrices(tensors) for stack in self.stacks]

    def from_matrices(self, matrices: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        """Returns one tensor per variable from a direction."""
        tensors: list[Any] = [None] * self._variable_count
        for stack, matrix in zip(self.stacks, matrices, strict=True):
            for position, tensor in stack.from_matrices(matrix).items():
                tensors[position] = tensor
        return tensors

    def join(self, layers: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        """Returns a direction from one matrix per entry."""
        rest = iter(layers)
        return [
            tf.stack([next(rest) for _ in stack.entries])
            for stack in self.stacks
        ]

    def split(self, matrices: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        """Returns one matrix per entry from a direction."""
        return [layer for stack in matrices for layer in tf.unstack(stack)]


def _harmonic_mean(
    traces: tf.Tensor, sizes: Sequence[int], used: tf.Tensor
) -> tf.Tensor:
    """Returns the harmonic mean of mean eigenvalues over all that is used.

    It is `Σ n / Σ (n / mean)` with `mean = trace / n`.

    Args:
        traces: Tensor `[layers]`.
        sizes: n of every layer.
        used: Bool `[layers]`.
    """
    sizes = tf.constant(sizes, traces.dtype)
    counts = tf.where(used, sizes, tf.zeros_like(sizes))
    inverse = tf.math.divide_no_nan(counts * sizes, traces)
    return tf.math.divide_no_nan(tf.reduce_sum(counts), tf.reduce_sum(inverse))
