"""The Keras optimizers."""

from keras_natgrad.optimizers.base import CurvatureOptimizer
from keras_natgrad.optimizers.kfac import KFAC
from keras_natgrad.optimizers.natural_gradient import NaturalGradient
from keras_natgrad.optimizers.prong import PRONG
from keras_natgrad.optimizers.rngd import RNGD

__all__ = ["KFAC", "PRONG", "RNGD", "CurvatureOptimizer", "NaturalGradient"]
