"""How far to go along the preconditioned direction, and how damped."""

from keras_natgrad.step.damping import Damping, LevenbergMarquardt
from keras_natgrad.step.damping import get as get_damping
from keras_natgrad.step.line_search import LineSearch
from keras_natgrad.step.line_search import get as get_line_search
from keras_natgrad.step.quadratic import (
    AveragedGram,
    QuadraticModel,
    StepLength,
    layer_coefficients,
    quadratic_coefficients,
)
from keras_natgrad.step.quadratic import get as get_quadratic_model
from keras_natgrad.step.refresh import Refresh, is_multiple
from keras_natgrad.step.spring import Spring
from keras_natgrad.step.trial import TrialStep
from keras_natgrad.step.trust_region import norm_scale

__all__ = [
    "AveragedGram",
    "Damping",
    "LevenbergMarquardt",
    "LineSearch",
    "QuadraticModel",
    "Refresh",
    "Spring",
    "StepLength",
    "TrialStep",
    "get_damping",
    "get_line_search",
    "get_quadratic_model",
    "is_multiple",
    "norm_scale",
    "layer_coefficients",
    "quadratic_coefficients",
]
