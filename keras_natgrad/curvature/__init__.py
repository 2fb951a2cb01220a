"""From heads and captured layers to Fisher statistics and products."""

from keras_natgrad.curvature.assignment import BlockOptions, Entry
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

__all__ = [
    "FISHER_KINDS",
    "Backward",
    "BlockDiagonal",
    "BlockOptions",
    "CapturedPass",
    "Entry",
    "OutputTerm",
    "estimated_gram",
    "fisher_gram",
    "gram_of_tangents",
    "own_tangents",
    "random_cotangents",
]
