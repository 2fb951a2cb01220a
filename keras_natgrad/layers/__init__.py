"""Keras layers that train different weights from those they compute with."""

from keras_natgrad.layers.conversion import canonical, whitened
from keras_natgrad.layers.whitened_conv import (
    WhitenedConv1D,
    WhitenedConv2D,
    WhitenedConv3D,
)
from keras_natgrad.layers.whitened_dense import WhitenedDense
from keras_natgrad.layers.whitening import (
    InputMoments,
    input_moments,
    rewhiten,
)

__all__ = [
    "InputMoments",
    "WhitenedConv1D",
    "WhitenedConv2D",
    "WhitenedConv3D",
    "WhitenedDense",
    "canonical",
    "input_moments",
    "rewhiten",
    "whitened",
]
