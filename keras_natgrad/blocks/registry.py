"""Block names: what `block=` and `approximation=` accept."""

from __future__ import annotations

from typing import Any

import keras

from keras_natgrad.blocks.base import Block
from keras_natgrad.blocks.diagonal import DiagonalBlock
from keras_natgrad.blocks.eigen import EigenBlock
from keras_natgrad.blocks.feature_scaled import FeatureScaledBlock
from keras_natgrad.blocks.full import FullBlock
from keras_natgrad.blocks.identity import IdentityBlock
from keras_natgrad.blocks.input_factor import InputFactorBlock
from keras_natgrad.blocks.kronecker import KroneckerBlock
from keras_natgrad.blocks.shape import BlockShape
from keras_natgrad.blocks.tied import TiedBlock
from keras_natgrad.blocks.unitwise import CoupledBlock, UnitwiseBlock

_BLOCKS: dict[str, type[Block]] = {
    "kronecker": KroneckerBlock,
    "kfac": KroneckerBlock,
    "eigen": EigenBlock,
    "ekfac": EigenBlock,
    "feature_scaled": FeatureScaledBlock,
    "diagonal": DiagonalBlock,
    "full": FullBlock,
    "identity": IdentityBlock,
    "input_factor": InputFactorBlock,
    "foof": InputFactorBlock,
    "tied": TiedBlock,
    "unitwise": UnitwiseBlock,
    "coupled": CoupledBlock,
}

# An instance as `block=` is saved in the optimizer's config.
for _class in {*_BLOCKS.values()}:
    keras.saving.register_keras_serializable("keras_natgrad")(_class)


def register_block(name: str) -> Any:
    """Decorator that makes a `Block` subclass available under `name`.

    Args:
        name: Name to write in `block=` or `approximation=`.

    Returns:
        The class decorator.

    Raises:
        ValueError: If the name is taken or the class is not a `Block`.

    Example:

    ```python
    @keras_natgrad.register_block("my_block")
    class MyBlock(keras_natgrad.blocks.DiagonalBlock):
        kind = "my_block"


    optimizer = keras_natgrad.KFAC(block={"logits": "my_block"})
    ```
    """

    def decorate(block_class: type[Block]) -> type[Block]:
        if not (
            isinstance(block_class, type) and issubclass(block_class, Block)
        ):
            raise ValueError(
                "`register_block` decorates a subclass of "
                f"keras_natgrad.blocks.Block. Received: {block_class!r}"
            )
        if _BLOCKS.get(name, block_class) is not block_class:
            raise ValueError(
                f"The block name {name!r} is taken by {_BLOCKS[name]}. "
                "Choose another name."
            )
        _BLOCKS[name] = block_class
        return block_class

    return decorate


def check_kind(kind: str) -> str:
    """Returns `kind` if it is a registered name, else raises ValueError."""
    if not isinstance(kind, str) or kind not in _BLOCKS:
        raise ValueError(
            f"Unknown block. Expected one of {sorted(_BLOCKS)}. "
            f"Received: {kind!r}"
        )
    return kind


def prototype(kind: str, **options: Any) -> Block:
    """Returns the unbound block of a name.

    Args:
        kind: A registered name.
        **options: Keyword arguments; those that the block's constructor does
            not take are dropped.
    """
    block_class = _BLOCKS[check_kind(kind)]
    names = block_class.option_names()
    return block_class(**{k: v for k, v in options.items() if k in names})


def create(kind: str, shape: BlockShape, **options: Any) -> Block:
    """Returns the unbuilt block of one layer, by name.

    Args:
        kind: A registered name.
        shape: `BlockShape`.
        **options: See `prototype`.
    """
    return prototype(kind, **options).bind(shape)
