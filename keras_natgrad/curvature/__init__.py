"""From heads and captured layers to Fisher statistics and products."""

from keras_natgrad.curvature.assignment import BlockOptions, Entry
from keras_natgrad.curvature.block_curvature import (
    BlockCurvature,
    CurvatureOptions,
)
from keras_natgrad.curvature.captured_pass import Backward, CapturedPass
from keras_natgrad.curvature.cotangents import (
    FISHER_KINDS,
    OutputTerm,
    random_cotangents,
)
from keras_natgrad.curvature.estimator import BlockDiagonal
from keras_natgrad.curvature.products import (
    estimated_gram,
    fisher_gram,
    gram_of_tangents,
    own_tangents,
)
from keras_natgrad.curvature.whole_network import (
    WholeNetwork,
    WholeNetworkOptions,
)

__all__ = [
    "FISHER_KINDS",
    "Backward",
    "BlockCurvature",
    "BlockDiagonal",
    "BlockOptions",
    "CapturedPass",
    "CurvatureOptions",
    "Entry",
    "OutputTerm",
    "WholeNetwork",
    "WholeNetworkOptions",
    "estimated_gram",
    "fisher_gram",
    "gram_of_tangents",
    "own_tangents",
    "random_cotangents",
]
