"""Keras callbacks."""

from keras_natgrad.callbacks.attach import Attach
from keras_natgrad.callbacks.monitor import CurvatureMonitor
from keras_natgrad.callbacks.nan_policy import RaiseDamping
from keras_natgrad.callbacks.whiten import Whiten

__all__ = ["Attach", "CurvatureMonitor", "RaiseDamping", "Whiten"]
