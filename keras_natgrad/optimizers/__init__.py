"""The Keras optimizers."""

from keras_natgrad.optimizers.base import CurvatureOptimizer
from keras_natgrad.optimizers.kfac import KFAC

__all__ = ["KFAC", "CurvatureOptimizer"]
