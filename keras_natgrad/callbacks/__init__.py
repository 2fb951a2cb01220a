"""Keras callbacks."""

from keras_natgrad.callbacks.attach import Attach
from keras_natgrad.callbacks.whiten import Whiten

__all__ = ["Attach", "Whiten"]
