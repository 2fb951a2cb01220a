"""Relative natural gradients: every layer with a metric of its own."""

from keras_natgrad.relative.curvature import (
    SHARED_METRICS,
    MetricSpec,
    RelativeCurvature,
    plan_metrics,
)
from keras_natgrad.relative.direction import RelativeDirection, RelativeOptions
from keras_natgrad.relative.responses import ResponseOptions
from keras_natgrad.relative.sources import HorizonOptions, find_sources

__all__ = [
    "SHARED_METRICS",
    "HorizonOptions",
    "MetricSpec",
    "RelativeCurvature",
    "RelativeDirection",
    "RelativeOptions",
    "ResponseOptions",
    "find_sources",
    "plan_metrics",
]
