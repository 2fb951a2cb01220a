"""K-FAC for models of tf_keras (Keras 2), on the same engine."""

from keras_natgrad.integrations.tf_keras import layers  # noqa: F401 (registers)
from keras_natgrad.integrations.tf_keras.optimizer import KFAC

__all__ = ["KFAC"]
