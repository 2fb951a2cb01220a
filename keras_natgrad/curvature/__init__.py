"""From heads and captured layers to Fisher statistics and products."""

from keras_natgrad.curvature.cotangents import (
    FISHER_KINDS,
    OutputTerm,
    example_weights,
)
from keras_natgrad.curvature.estimator import BlockDiagonal, BlockOptions
from keras_natgrad.curvature.products import fisher_gram

__all__ = [
    "FISHER_KINDS",
    "BlockDiagonal",
    "BlockOptions",
    "OutputTerm",
    "example_weights",
    "fisher_gram",
]
