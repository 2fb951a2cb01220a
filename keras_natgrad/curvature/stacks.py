"""Layers that share one block, and a direction as one tensor per stack."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from keras_natgrad.blocks import Block
from keras_natgrad.blocks.base import Statistics, VariableFactory
from keras_natgrad.blocks.state import LayerState, PendingState
from keras_natgrad.curvature.assignment import Entry


@dataclass(frozen=True)
class Stack:
    """Layers whose block class, shape and options are equal.

    A direction has one tensor `[layers, (groups,) rows, columns]` per stack.

    Attributes:
        block: The block of all layers. One that cannot be shared
            (`Block.stacks`) is that of its only layer, without an axis of
            layers.
        entries: The layers, each with a block that sees its own part of the
            state.
    """

    block: Block
    entries: tuple[Entry, ...]

    @property
    def count(self) -> int:
        """Number of layers."""
        return len(self.entries)

    def build(
        self,
        names: Sequence[str],
        add_variable: VariableFactory,
        add_sum: VariableFactory,
    ) -> None:
        """Creates the state of all layers, see `Block.build`."""
        name = names[self.entries[0].variables[0]]
        if self.count > 1:
            name = f"{name}_and_{self.count - 1}_more"

        def prefixed(add: VariableFactory) -> VariableFactory:
            return lambda own, *args: add(f"{name}_{own}", *args)

        self.block.build(prefixed(add_variable), prefixed(add_sum))
        if self.block.layers is None:
            return
        state = self.block.variables
        for index, entry in enumerate(self.entries):

            def part(name: str, *_: Any, index: int = index) -> LayerState:
                return LayerState(state[name], index)

            entry.block.build(part)

    # -- Tensors ---------------------------------------------------------

    def stack(self, parts: Sequence[tf.Tensor]) -> tf.Tensor:
        """Returns one tensor per layer as the tensor of the block."""
        return parts[0] if self.block.layers is None else tf.stack(parts)

    def stack_statistics(self, found: Sequence[Statistics]) -> Statistics:
        """Returns the statistics of single layers as those of the block."""
        return {
            name: self.stack([own[name] for own in found]) for name in found[0]
        }

    def to_matrices(self, tensors: Sequence[Any]) -> tf.Tensor:
        """Returns `[layers, (groups,) rows, columns]` of the variables.

        Args:
            tensors: One per variable of the network.
        """
        first, shape = self.entries[0], self.block.shape
        dtype = self.block.dtype
        stacked = [
            tf.stack(
                [
                    tf.cast(tf.convert_to_tensor(tensors[i]), dtype)
                    for i in positions
                ]
            )
            for positions in self._positions()
        ]
        if first.layer is None:
            return tf.reshape(stacked[0], [self.count, *shape.matrix])
        return first.layer.layout.to_matrices(stacked)

    def from_matrices(self, matrices: tf.Tensor) -> dict[int, tf.Tensor]:
        """Returns the tensor of every variable, by its position."""
        first = self.entries[0]
        if first.layer is None:
            shape = [self.count, *first.shape]
            stacked = [tf.reshape(matrices, shape)]
        else:
            stacked = first.layer.layout.from_matrices(matrices)
        found: dict[int, tf.Tensor] = {}
        for positions, parts in zip(self._positions(), stacked, strict=True):
            found.update(zip(positions, tf.unstack(parts), strict=True))
        return found

    def _positions(self) -> list[tuple[int, ...]]:
        """Returns the positions of all kernels, then of all biases."""
        return list(zip(*[e.variables for e in self.entries], strict=True))

    # -- Curvature -------------------------------------------------------

    def per_layer(self, value: tf.Tensor) -> tf.Tensor:
        """Returns a result of the block with an axis of layers."""
        return value[tf.newaxis] if self.block.layers is None else value

    def trace(self) -> tf.Tensor:
        """Returns the trace of every layer, `[layers]`."""
        return self.per_layer(self.block.trace())

    def precondition(self, matrices: tf.Tensor) -> tf.Tensor:
        """Returns `(F + λ I)⁻¹` times the stack's part of a direction."""
        if self.block.layers is not None:
            return self.block.precondition(matrices)
        return self.block.precondition(tf.squeeze(matrices, 0))[tf.newaxis]

    def observe_gradient(self, matrices: tf.Tensor) -> None:
        """Shows the gradient of a step to the block."""
        if self.block.layers is None:
            matrices = tf.squeeze(matrices, 0)
        self.block.observe_gradient(matrices)

    def damping(self, damping: tf.Tensor, ridge: Sequence[float]) -> tf.Tensor:
        """Returns λ with the curvature of the kernels' regularizers.

        Args:
            damping: Scalar λ.
            ridge: One number per variable of the network.
        """
        own = [ridge[entry.variables[0]] for entry in self.entries]
        if not any(own):
            return damping
        if len(set(own)) == 1:
            return damping + tf.constant(own[0], damping.dtype)
        return damping + tf.constant(own, damping.dtype)

    def refresh_parts(
        self,
        damping: tf.Tensor,
        ratio: tf.Tensor | None,
        places: Sequence[Any],
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Recomputes the inverses, layers on the devices that they are given.

        Args:
            damping: See `Block.refresh`.
            ratio: See `Block.refresh`.
            places: A device per layer. All layers of a stack cost the same:
                only how often each device is named counts.

        Returns:
            Raised dampings and failed layers, int32 scalars.
        """
        devices = list(dict.fromkeys(places))
        if len(devices) == 1:
            with tf.device(devices[0]):
                return self.block.refresh(damping, ratio)
        state = self.block.variables
        parts, counts, start = [], [], 0
        for device in devices:
            stop = start + places.count(device)
            with tf.device(device):
                part = self._part(start, stop)
                own = (
                    damping if damping.shape.rank == 0 else damping[start:stop]
                )
                counts.append(part.refresh(own, ratio))
            parts.append(part.variables)
            start = stop
        for name, variable in state.items():
            own = [part[name] for part in parts]
            if any(each.changed for each in own):
                variable.assign(tf.concat([each.value for each in own], 0))
        retries, failures = zip(*counts, strict=True)
        return tf.add_n(retries), tf.add_n(failures)

    def _part(self, start: int, stop: int) -> Block:
        """Returns the block of some layers, whose new state is pending."""
        state = self.block.variables
        part = self.block.bind(self.block.shape, stop - start)
        part.build(lambda name, *_: PendingState(state[name], start, stop))
        return part


def make_stacks(entries: Sequence[Entry], stacked: bool = True) -> list[Stack]:
    """Returns the stacks of a network's layers, in the order of first layers.

    Args:
        entries: One per captured layer and fallback variable.
        stacked: Whether layers share blocks.
    """
    groups: dict[Any, list[Entry]] = {}
    for index, entry in enumerate(entries):
        shared = stacked and entry.block.stacks
        groups.setdefault(_key(entry) if shared else index, []).append(entry)
    stacks = []
    for members in groups.values():
        block = members[0].block
        if stacked and block.stacks:
            block = block.bind(block.shape, len(members))
        stacks.append(Stack(block, tuple(members)))
    return stacks


def _key(entry: Entry) -> Any:
    """Returns what is equal for entries of one stack."""
    block = entry.block
    layout = None if entry.layer is None else entry.layer.layout
    options = repr(sorted(block.get_config().items()))
    return type(block), block.shape, options, layout, entry.shape


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
