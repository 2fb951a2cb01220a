"""From heads and captured layers to Fisher statistics and products."""

from keras_natgrad.curvature.captured_pass import Backward, CapturedPass
from keras_natgrad.curvature.cotangents import (
    FISHER_KINDS,
    OutputTerm,
    random_cotangents,
)
from keras_natgrad.curvature.entry import BlockOptions, Entry
from keras_natgrad.curvature.estimator import BlockDiagonal
from keras_natgrad.curvature.products import (
    estimated_gram,
    fisher_gram,
    gram_of_tangents,
    own_tangents,
)
from keras_natgrad.curvature.relative import (
    SHARED_METRICS,
    MetricSpec,
    RelativeCurvature,
    plan_metrics,
)
from keras_natgrad.curvature.responses import ResponseOptions
from keras_natgrad.curvature.sources import HorizonOptions, find_sources

__all__ = [
    "FISHER_KINDS",
    "SHARED_METRICS",
    "Backward",
    "BlockDiagonal",
    "BlockOptions",
    "CapturedPass",
    "Entry",
    "HorizonOptions",
    "MetricSpec",
    "OutputTerm",
    "RelativeCurvature",
    "ResponseOptions",
    "estimated_gram",
    "find_sources",
    "fisher_gram",
    "gram_of_tangents",
    "own_tangents",
    "plan_metrics",
    "random_cotangents",
]
