"""Fisher approximations for one layer, one per module."""

from keras_natgrad.blocks.base import Block, BlockShape
from keras_natgrad.blocks.diagonal import DiagonalBlock
from keras_natgrad.blocks.fallback import (
    GradientBlock,
    GradientDiagonalBlock,
    GradientScalarBlock,
)
from keras_natgrad.blocks.full import FullBlock
from keras_natgrad.blocks.gradient_kronecker import GradientKroneckerBlock
from keras_natgrad.blocks.kronecker import KroneckerBlock, WeightSharing
from keras_natgrad.blocks.registry import check_kind, create, register_block

__all__ = [
    "Block",
    "BlockShape",
    "DiagonalBlock",
    "FullBlock",
    "GradientBlock",
    "GradientDiagonalBlock",
    "GradientKroneckerBlock",
    "GradientScalarBlock",
    "KroneckerBlock",
    "WeightSharing",
    "check_kind",
    "create",
    "register_block",
]
