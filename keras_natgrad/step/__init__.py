"""How far to go along the preconditioned direction, and how damped."""

from keras_natgrad.step.averaged_gram import AveragedGram
from keras_natgrad.step.choices import get_learning_rate, get_momentum
from keras_natgrad.step.coefficients import (
    Decision,
    QuadraticForm,
    layer_coefficients,
    quadratic_coefficients,
)
from keras_natgrad.step.damping import (
    ConstantDamping,
    Damping,
    DampingState,
    LevenbergMarquardt,
)
from keras_natgrad.step.damping import get as get_damping
from keras_natgrad.step.direction import Direction, LocalDirection, Vector
from keras_natgrad.step.guard import StepRejection, SurgeGuard
from keras_natgrad.step.line_search import LineSearch, SearchedStep
from keras_natgrad.step.loss_model import LossModel
from keras_natgrad.step.quadratic import QuadraticModel, QuadraticStep
from keras_natgrad.step.quadratic import get as get_quadratic_model
from keras_natgrad.step.refresh import Refresh, is_multiple
from keras_natgrad.step.rule import FixedStep, Needs, Situation, StepRule
from keras_natgrad.step.spring import Spring, SpringStep
from keras_natgrad.step.state import StateFactory, StepState
from keras_natgrad.step.trial import TrialStep
from keras_natgrad.step.trust_region import norm_scale

__all__ = [
    "AveragedGram",
    "ConstantDamping",
    "Damping",
    "DampingState",
    "Decision",
    "Direction",
    "FixedStep",
    "LevenbergMarquardt",
    "LineSearch",
    "LocalDirection",
    "LossModel",
    "Needs",
    "QuadraticForm",
    "QuadraticModel",
    "QuadraticStep",
    "Refresh",
    "SearchedStep",
    "Situation",
    "Spring",
    "SpringStep",
    "StateFactory",
    "StepRejection",
    "StepRule",
    "StepState",
    "SurgeGuard",
    "TrialStep",
    "Vector",
    "get_damping",
    "get_learning_rate",
    "get_momentum",
    "get_quadratic_model",
    "is_multiple",
    "layer_coefficients",
    "norm_scale",
    "quadratic_coefficients",
]
