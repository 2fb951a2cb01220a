"""Keras callbacks."""

from keras_natgrad.callbacks.attach import Attach

__all__ = ["Attach"]
