"""How far to go along the preconditioned direction, and how damped."""

from keras_natgrad.step.damping import Damping, LevenbergMarquardt
from keras_natgrad.step.damping import get as get_damping
from keras_natgrad.step.length import StepLength, quadratic_coefficients
from keras_natgrad.step.refresh import is_due
from keras_natgrad.step.trust_region import norm_scale

__all__ = [
    "Damping",
    "LevenbergMarquardt",
    "StepLength",
    "get_damping",
    "is_due",
    "norm_scale",
    "quadratic_coefficients",
]
