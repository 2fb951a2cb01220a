"""Fisher approximations for one layer, one per module."""

from keras_natgrad.blocks.base import Block
from keras_natgrad.blocks.diagonal import DiagonalBlock
from keras_natgrad.blocks.eigen import EigenBlock
from keras_natgrad.blocks.eigen_shared import EigenSharedBlock
from keras_natgrad.blocks.fallback import (
    GradientBlock,
    GradientDiagonalBlock,
    GradientScalarBlock,
    PlainGradientBlock,
)
from keras_natgrad.blocks.feature_scaled import FeatureScaledBlock
from keras_natgrad.blocks.full import FullBlock
from keras_natgrad.blocks.gradient_kronecker import GradientKroneckerBlock
from keras_natgrad.blocks.identity import IdentityBlock
from keras_natgrad.blocks.input_factor import InputFactorBlock
from keras_natgrad.blocks.kronecker import KroneckerBlock, WeightSharing
from keras_natgrad.blocks.metric import MetricBlock, UnitMetricBlock
from keras_natgrad.blocks.registry import (
    check_kind,
    create,
    prototype,
    register_block,
)
from keras_natgrad.blocks.shape import BlockShape
from keras_natgrad.blocks.tied import TiedBlock
from keras_natgrad.blocks.unitwise import CoupledBlock, UnitwiseBlock

__all__ = [
    "Block",
    "BlockShape",
    "CoupledBlock",
    "DiagonalBlock",
    "EigenBlock",
    "EigenSharedBlock",
    "FeatureScaledBlock",
    "FullBlock",
    "GradientBlock",
    "GradientDiagonalBlock",
    "GradientKroneckerBlock",
    "GradientScalarBlock",
    "IdentityBlock",
    "InputFactorBlock",
    "KroneckerBlock",
    "MetricBlock",
    "PlainGradientBlock",
    "TiedBlock",
    "UnitMetricBlock",
    "UnitwiseBlock",
    "WeightSharing",
    "check_kind",
    "create",
    "prototype",
    "register_block",
]
