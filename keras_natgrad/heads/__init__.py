"""Output distributions, their Fisher matrices and their losses."""

from keras_natgrad.heads.base import Head
from keras_natgrad.heads.bernoulli import Bernoulli
from keras_natgrad.heads.categorical import Categorical
from keras_natgrad.heads.loss_weight import LossWeight
from keras_natgrad.heads.losses import from_loss, register_loss
from keras_natgrad.heads.normal import Normal
from keras_natgrad.heads.serialization import get

__all__ = [
    "Bernoulli",
    "Categorical",
    "Head",
    "LossWeight",
    "Normal",
    "from_loss",
    "get",
    "register_loss",
]
