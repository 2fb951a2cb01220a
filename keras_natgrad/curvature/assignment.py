"""One block and the variables that it covers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import keras
import tensorflow as tf

from keras_natgrad.blocks import (
    Block,
    BlockShape,
    EigenBlock,
    GradientBlock,
    GradientDiagonalBlock,
    GradientKroneckerBlock,
    GradientScalarBlock,
    KroneckerBlock,
    PlainGradientBlock,
    check_kind,
    prototype,
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
# One choice for all layers, or one per pattern.
Choices: TypeAlias = Any


@dataclass(frozen=True)
class BlockOptions:
    """Which block each layer gets.

    Attributes:
        block: Block of captured layers, a name or an unbound `Block` with
            options of its own, or a dictionary of patterns (see
            `capture.selectors`) and blocks. The first pattern that matches
            counts; layers without one get the default, `"auto"`:
            `"feature_scaled"` for dense layers that read the model's inputs,
            `"kronecker"` for the rest. One choice for all layers leaves those
            that it does not suit their own block, where it says so
            (`Block.leaves_special_layers`).
        weight_sharing: `"expand"` or `"reduce"`, for Kronecker factors of
            blocks chosen by name, or a dictionary likewise.
        max_factor_size: Largest side of a dense Kronecker factor, likewise.
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
            if isinstance(choices, Mapping) and not _is_config(choices):
                named = {
                    pattern_name(pattern, argument): value
                    for pattern, value in choices.items()
                }
                object.__setattr__(self, argument, named)
        block = self.block
        if isinstance(block, Mapping) and not _is_config(block):
            block = {key: _block(value) for key, value in block.items()}
        else:
            block = _block(block)
        object.__setattr__(self, "block", block)
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

    def block_of(self, layer: LayerPlan) -> Block:
        """Returns a layer's block, unbound: chosen, its own, or the default."""
        chosen, for_all = self.block, True
        if isinstance(chosen, Mapping):
            chosen = first_match(chosen, layer.label) or _AUTO
            for_all = chosen == _AUTO
        if chosen == _AUTO:
            layout = layer.layout
            scaled = layer.reads_inputs and not layout.two_way
            chosen = "feature_scaled" if scaled else "kronecker"
            if layer.block:
                chosen = layer.block
        block = self._named(chosen, layer)
        if (
            for_all
            and block.leaves_special_layers
            and _is_special(layer, block)
        ):
            block = self._named(layer.block or "kronecker", layer)
        # One Kronecker product does not hold both uses of a matrix.
        if layer.layout.two_way and isinstance(
            block, (KroneckerBlock, EigenBlock)
        ):
            return self._named("tied", layer)
        return block

    def _named(self, choice: Any, layer: LayerPlan) -> Block:
        """Returns a block as it is, or that of a name with these options."""
        if isinstance(choice, Block):
            return choice
        return prototype(
            choice,
            weight_sharing=self.sharing_of(layer),
            max_factor_size=self.max_factor_size,
            damp_bias=self.damp_bias,
            relative_damping=self.relative_damping,
        )

    def block_config(self) -> Any:
        """Returns `block` as plain data for an optimizer's config."""
        if isinstance(self.block, Mapping):
            return {key: _plain(value) for key, value in self.block.items()}
        return _plain(self.block)

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


def _values(choices: Choices) -> list[Any]:
    return list(choices.values()) if isinstance(choices, Mapping) else [choices]


def _is_config(value: Any) -> bool:
    """Returns whether a dictionary is the config of one block."""
    return isinstance(value, Mapping) and {"class_name", "config"} <= set(value)


def _block(choice: Any) -> Any:
    """Returns a name or a block, from its config too."""
    if isinstance(choice, Block):
        return choice
    if _is_config(choice):
        return _block(keras.saving.deserialize_keras_object(choice))
    return choice if choice == _AUTO else check_kind(choice)


def _plain(choice: Any) -> Any:
    if isinstance(choice, Block):
        return keras.saving.serialize_keras_object(choice)
    return choice


def _is_special(layer: LayerPlan, block: Block) -> bool:
    """Returns whether a layer has a block of its own, or the block no way."""
    layout = layer.layout
    return bool(
        layer.block
        or (layout.groups and not block.treats_groups)
        or (layout.two_way and not block.treats_two_way)
    )


@dataclass(frozen=True)
class Entry:
    """A block, and how the variables form its matrix.

    Attributes:
        block: The `Block`.
        variables: Positions of its variables in the optimizer's list.
        layer: The captured layer, or `None` for a single fallback variable.
        shape: Shape of the fallback variable.
        position: Of the layer in the plan, or of the variable among those
            that fall back.
    """

    block: Block
    variables: tuple[int, ...]
    layer: LayerPlan | None = None
    shape: tuple[int, ...] = ()
    position: int = 0

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
    for position, layer in enumerate(plan.layers):
        shape = BlockShape(
            layer.layout.rows,
            layer.layout.columns,
            groups=layer.layout.groups,
            one_hot=layer.layout.one_hot,
            two_way=layer.layout.two_way,
            biased=layer.layout.bias_shape is not None,
        )
        block = options.block_of(layer).bind(shape)
        entries.append(Entry(block, layer.variables, layer, position=position))
    for position, index in enumerate(plan.fallback):
        own = tuple(shapes[index])
        block = _fallback(own, options)
        entries.append(Entry(block, (index,), None, own, position))
    return entries


def _fallback(shape: tuple[int, ...], options: BlockOptions) -> Block:
    kind = options.fallback
    if len(shape) < 2 and kind in ("auto", "kronecker"):
        kind = "diagonal"
    block_class = _FALLBACKS["kronecker" if kind == "auto" else kind]
    if issubclass(block_class, GradientKroneckerBlock):
        block: Block = block_class(options.max_factor_size)
    else:
        block = block_class()
    return block.bind(block_class.view(shape))
