"""Records layer inputs and pre-activations in a canonical form."""

from keras_natgrad.capture import (
    convolution,  # noqa: F401  (registers)
    dense,  # noqa: F401  (registers)
    depthwise,  # noqa: F401  (registers)
    einsum_dense,  # noqa: F401  (registers)
    elementwise,  # noqa: F401  (registers)
    embedding,  # noqa: F401  (registers)
    normalization,  # noqa: F401  (registers)
    transposed,  # noqa: F401  (registers)
)
from keras_natgrad.capture.layout import ParameterLayout
from keras_natgrad.capture.plan import LayerPlan, Plan, make_plan, match_layers
from keras_natgrad.capture.registry import (
    LinearMap,
    NotCaptured,
    applies_matrix,
    linear_maps,
    register_layer,
)
from keras_natgrad.capture.tape import CurvatureTape
from keras_natgrad.capture.taps import Taps
from keras_natgrad.capture.traces import MapTrace

__all__ = [
    "CurvatureTape",
    "LayerPlan",
    "MapTrace",
    "LinearMap",
    "NotCaptured",
    "ParameterLayout",
    "Plan",
    "Taps",
    "applies_matrix",
    "linear_maps",
    "make_plan",
    "match_layers",
    "register_layer",
]
