"""The training step that `attach` gives to a model; models of residuals."""

from keras_natgrad.training.residual_model import ResidualModel
from keras_natgrad.training.train_step import install, install_hook

__all__ = ["ResidualModel", "install", "install_hook"]
