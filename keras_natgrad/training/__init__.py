"""The training step that `attach` gives to a model."""

from keras_natgrad.training.train_step import install

__all__ = ["install"]
