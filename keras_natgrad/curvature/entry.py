"""One block and the variables that it covers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from keras_natgrad.blocks import (
    Block,
    BlockShape,
    GradientDiagonalBlock,
    GradientScalarBlock,
    PlainGradientBlock,
    create,
)
from keras_natgrad.capture import LayerPlan, Plan

_FALLBACKS = {
    "diagonal": GradientDiagonalBlock,
    "first_order": GradientScalarBlock,
    "plain": PlainGradientBlock,
}


@dataclass(frozen=True)
class BlockOptions:
    """Which block each layer gets.

    Attributes:
        block: Block name for captured layers.
        weight_sharing: `"expand"` or `"reduce"`, for Kronecker factors.
        max_factor_size: Largest side of a dense Kronecker factor.
        fallback: `"diagonal"`, `"first_order"` or `"plain"`, for the rest.
        damping_split: `"layer"` or `"global"`, how Kronecker factors share
            the damping.
        damp_bias: Whether an input factor damps the bias too.
        relative_damping: Whether the damping of an input factor counts in
            its mean eigenvalues.
    """

    block: str = "kronecker"
    weight_sharing: str = "expand"
    max_factor_size: int = 4096
    fallback: str = "diagonal"
    damping_split: str = "layer"
    damp_bias: bool = True
    relative_damping: bool = False

    def __post_init__(self) -> None:
        if self.fallback not in _FALLBACKS:
            raise ValueError(
                f"`fallback` must be one of {sorted(_FALLBACKS)}. "
                f"Received: fallback={self.fallback!r}"
            )
        if self.damping_split not in ("layer", "global"):
            raise ValueError(
                "`damping_split` must be 'layer' or 'global'. "
                f"Received: damping_split={self.damping_split!r}"
            )
        if self.weight_sharing not in ("expand", "reduce"):
            raise ValueError(
                "`weight_sharing` must be 'expand' or 'reduce'. "
                f"Received: weight_sharing={self.weight_sharing!r}"
            )
        if self.max_factor_size < 1:
            raise ValueError(
                "`max_factor_size` must be a positive integer. "
                f"Received: max_factor_size={self.max_factor_size!r}"
            )


@dataclass(frozen=True)
class Entry:
    """A block, and how the variables form its matrix.

    Attributes:
        block: The `Block`.
        variables: Positions of its variables in the optimizer's list.
        layer: The captured layer, or `None` for a single fallback variable.
        shape: Shape of the fallback variable.
    """

    block: Block
    variables: tuple[int, ...]
    layer: LayerPlan | None = None
    shape: tuple[int, ...] = ()

    def to_matrix(self, tensors: Sequence[Any]) -> tf.Tensor:
        """Gathers this entry's part of one tensor per variable."""
        own = [
            tf.cast(tf.convert_to_tensor(tensors[i]), self.block.dtype)
            for i in self.variables
        ]
        if self.layer is None:
            return tf.reshape(own[0], [-1, 1])
        return self.layer.layout.to_matrix(own)

    def from_matrix(self, matrix: tf.Tensor) -> list[tf.Tensor]:
        """Returns one tensor per variable of this entry."""
        if self.layer is None:
            return [tf.reshape(matrix, self.shape)]
        return self.layer.layout.from_matrix(matrix)


def make_entries(
    plan: Plan, shapes: Sequence[tuple[int, ...]], options: BlockOptions
) -> list[Entry]:
    """Returns the captured layers' entries, then those of the fallbacks."""
    entries = []
    for layer in plan.layers:
        block = create(
            _kind(layer, options),
            BlockShape(
                layer.layout.rows,
                layer.layout.columns,
                groups=layer.layout.groups,
                one_hot=layer.layout.one_hot,
                biased=layer.layout.bias_shape is not None,
            ),
            weight_sharing=options.weight_sharing,
            max_factor_size=options.max_factor_size,
            damp_bias=options.damp_bias,
            relative_damping=options.relative_damping,
        )
        entries.append(Entry(block, layer.variables, layer))
    for index in plan.fallback:
        shape = tuple(shapes[index])
        fallback = _FALLBACKS[options.fallback](BlockShape(math.prod(shape), 1))
        entries.append(Entry(fallback, (index,), None, shape))
    return entries


def _kind(layer: LayerPlan, options: BlockOptions) -> str:
    """Returns the chosen block, or the layer's own where none was chosen."""
    if options.block == BlockOptions.block and layer.block is not None:
        return layer.block
    return options.block
