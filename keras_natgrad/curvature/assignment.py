"""One block and the variables that it covers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import tensorflow as tf

from keras_natgrad.blocks import (
    Block,
    BlockShape,
    GradientBlock,
    GradientDiagonalBlock,
    GradientKroneckerBlock,
    GradientScalarBlock,
    PlainGradientBlock,
    check_kind,
    create,
)
from keras_natgrad.capture import LayerPlan, Plan
from keras_natgrad.capture.selectors import (
    check_patterns,
    first_match,
    pattern_name,
)

_FALLBACKS: dict[str, type[GradientBlock]] = {
    "kronecker": GradientKroneckerBlock,
    "diagonal": GradientDiagonalBlock,
    "first_order": GradientScalarBlock,
    "plain": PlainGradientBlock,
}
_SHARING = ("expand", "reduce")
_AUTO = "auto"
# The two names of each block that is made of one Kronecker product. For all
# layers, they leave those with a block of their own with it.
_KRONECKER = ("kronecker", "kfac", "eigen", "ekfac")
# The two names of the block of the inputs alone, which has one matrix. For all
# layers, it leaves those with groups and those used both ways with their own.
_INPUT_FACTOR = ("input_factor", "foof")
# One name for all layers, or one per pattern.
Choices: TypeAlias = str | Mapping[Any, str]


@dataclass(frozen=True)
class BlockOptions:
    """Which block each layer gets.

    Attributes:
        block: Block name for captured layers, or a dictionary of patterns
            (see `capture.selectors`) and names. The first pattern that matches
            counts; layers without one get the default, `"auto"`:
            `"feature_scaled"` for dense layers that read the model's inputs,
            `"kronecker"` for the rest. With both of these and with
            `"ekfac"`, layers that a Kronecker product does not suit get their
            own block. With `"input_factor"` for all layers, those with
            groups keep their default, as do tied embeddings.
        weight_sharing: `"expand"` or `"reduce"`, for Kronecker factors, or a
            dictionary likewise.
        max_factor_size: Largest side of a dense Kronecker factor.
        fallback: Block of the rest: `"kronecker"`, `"diagonal"`,
            `"first_order"`, `"plain"` (undamped), or `"auto"`: Kronecker for
            matrices and kernels, diagonal for vectors and scalars.
        damping_split: `"layer"` or `"global"`, how Kronecker factors share
            the damping.
        damp_bias: Whether an input factor damps the bias too.
        relative_damping: Whether the damping of an input factor counts in
            its mean eigenvalues.
    """

    block: Choices = _AUTO
    weight_sharing: Choices = "expand"
    max_factor_size: int = 4096
    fallback: str = "auto"
    damping_split: str = "layer"
    damp_bias: bool = True
    relative_damping: bool = False

    def __post_init__(self) -> None:
        for argument in ("block", "weight_sharing"):
            choices = getattr(self, argument)
            if isinstance(choices, Mapping):
                named = {
                    pattern_name(pattern, argument): value
                    for pattern, value in choices.items()
                }
                object.__setattr__(self, argument, named)
        for kind in _values(self.block):
            if kind != _AUTO:
                check_kind(kind)
        for sharing in _values(self.weight_sharing):
            if sharing not in _SHARING:
                raise ValueError(
                    "`weight_sharing` must be 'expand' or 'reduce'. "
                    f"Received: weight_sharing={sharing!r}"
                )
        if self.fallback not in (*_FALLBACKS, "auto"):
            raise ValueError(
                f"`fallback` must be one of {sorted((*_FALLBACKS, 'auto'))}. "
                f"Received: fallback={self.fallback!r}"
            )
        if self.damping_split not in ("layer", "global"):
            raise ValueError(
                "`damping_split` must be 'layer' or 'global'. "
                f"Received: damping_split={self.damping_split!r}"
            )
        if self.max_factor_size < 1:
            raise ValueError(
                "`max_factor_size` must be a positive integer. "
                f"Received: max_factor_size={self.max_factor_size!r}"
            )

    def block_of(self, layer: LayerPlan) -> str:
        """Returns a layer's block: chosen, its own, or the default."""
        kind = self._kind_of(layer)
        # One Kronecker product does not hold both uses of a matrix.
        if layer.layout.two_way and kind in _KRONECKER:
            return "tied"
        return kind

    def _kind_of(self, layer: LayerPlan) -> str:
        chosen = self.block
        if isinstance(chosen, Mapping):
            chosen = first_match(chosen, layer.label) or _AUTO
            if chosen != _AUTO:
                return chosen
        if chosen in (_AUTO, *_KRONECKER) and layer.block:
            return layer.block
        layout = layer.layout
        if chosen in _INPUT_FACTOR and (layout.groups or layout.two_way):
            return layer.block or "kronecker"
        if chosen == _AUTO:
            scaled = layer.reads_inputs and not layer.layout.two_way
            return "feature_scaled" if scaled else "kronecker"
        return chosen

    def sharing_of(self, layer: LayerPlan) -> str:
        """Returns a layer's weight sharing: chosen, or the default."""
        if isinstance(self.weight_sharing, Mapping):
            return first_match(self.weight_sharing, layer.label) or _SHARING[0]
        return self.weight_sharing

    def check(self, plan: Plan) -> None:
        """Raises ValueError if a pattern matches no captured layer."""
        labels = [layer.label for layer in plan.layers]
        for argument in ("block", "weight_sharing"):
            choices = getattr(self, argument)
            if isinstance(choices, Mapping):
                check_patterns(choices, labels, argument)


def _values(choices: Choices) -> list[str]:
    return list(choices.values()) if isinstance(choices, Mapping) else [choices]


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
            return tf.reshape(own[0], self.block.shape.matrix)
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
    options.check(plan)
    entries = []
    for layer in plan.layers:
        block = create(
            options.block_of(layer),
            BlockShape(
                layer.layout.rows,
                layer.layout.columns,
                groups=layer.layout.groups,
                one_hot=layer.layout.one_hot,
                two_way=layer.layout.two_way,
                biased=layer.layout.bias_shape is not None,
            ),
            weight_sharing=options.sharing_of(layer),
            max_factor_size=options.max_factor_size,
            damp_bias=options.damp_bias,
            relative_damping=options.relative_damping,
        )
        entries.append(Entry(block, layer.variables, layer))
    for index in plan.fallback:
        shape = tuple(shapes[index])
        entries.append(Entry(_fallback(shape, options), (index,), None, shape))
    return entries


def _fallback(shape: tuple[int, ...], options: BlockOptions) -> Block:
    kind = options.fallback
    if len(shape) < 2 and kind in ("auto", "kronecker"):
        kind = "diagonal"
    block_class = _FALLBACKS["kronecker" if kind == "auto" else kind]
    matrix = block_class.view(shape)
    if block_class is GradientKroneckerBlock:
        return GradientKroneckerBlock(matrix, options.max_factor_size)
    return block_class(matrix)
