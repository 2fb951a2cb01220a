"""Natural-gradient optimizers for Keras 3 on TensorFlow."""

import importlib
from typing import TYPE_CHECKING, Any

from keras_natgrad._backend import require_tensorflow_backend

require_tensorflow_backend()

from keras_natgrad import (
    blocks,
    callbacks,
    capture,
    heads,
    layers,
    losses,
    metrics,
    solvers,
)
from keras_natgrad.blocks import register_block
from keras_natgrad.capture import CurvatureTape, register_layer
from keras_natgrad.fisher import fisher
from keras_natgrad.optimizers import KFAC, PRONG, RNGD, NaturalGradient
from keras_natgrad.step import (
    LevenbergMarquardt,
    LineSearch,
    QuadraticModel,
    Spring,
    StepRule,
    SurgeGuard,
)
from keras_natgrad.training import ResidualModel
from keras_natgrad.version import __version__

if TYPE_CHECKING:
    from keras_natgrad import tuner as tuner

__all__ = [
    "KFAC",
    "PRONG",
    "RNGD",
    "CurvatureTape",
    "LevenbergMarquardt",
    "LineSearch",
    "NaturalGradient",
    "QuadraticModel",
    "ResidualModel",
    "Spring",
    "StepRule",
    "SurgeGuard",
    "__version__",
    "blocks",
    "callbacks",
    "capture",
    "fisher",
    "heads",
    "layers",
    "losses",
    "metrics",
    "register_block",
    "register_layer",
    "solvers",
]


def __getattr__(name: str) -> Any:
    """Imports `tuner` on first use, because Keras Tuner is optional."""
    if name == "tuner":
        return importlib.import_module("keras_natgrad.tuner")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
