"""Records layer inputs and pre-activations in a canonical form."""

from keras_natgrad.capture import dense  # noqa: F401  (registers)
from keras_natgrad.capture import einsum_dense  # noqa: F401  (registers)
from keras_natgrad.capture.layout import ParameterLayout
from keras_natgrad.capture.plan import LayerPlan
from keras_natgrad.capture.plan import Plan
from keras_natgrad.capture.plan import make_plan
from keras_natgrad.capture.registry import LinearMap
from keras_natgrad.capture.registry import linear_map
from keras_natgrad.capture.registry import register_layer
from keras_natgrad.capture.taps import LayerRecord
from keras_natgrad.capture.taps import Taps

__all__ = [
    "LayerPlan",
    "LayerRecord",
    "LinearMap",
    "ParameterLayout",
    "Plan",
    "Taps",
    "linear_map",
    "make_plan",
    "register_layer",
]
