"""Fisher approximations for one layer, one per module."""

from keras_natgrad.blocks.base import Block
from keras_natgrad.blocks.base import BlockShape
from keras_natgrad.blocks.diagonal import DiagonalBlock
from keras_natgrad.blocks.full import FullBlock
from keras_natgrad.blocks.kronecker import KroneckerBlock
from keras_natgrad.blocks.kronecker import WeightSharing
from keras_natgrad.blocks.registry import create
from keras_natgrad.blocks.registry import register_block

__all__ = [
    "Block",
    "BlockShape",
    "DiagonalBlock",
    "FullBlock",
    "KroneckerBlock",
    "WeightSharing",
    "create",
    "register_block",
]
