"""Pure functions on tensors: inverses and Kronecker products."""

from keras_natgrad.linalg.kronecker import (
    flatten_matrix,
    kronecker_operator,
    trace_norm_ratio,
)
from keras_natgrad.linalg.psd import DampedInverse, damped_inverse
from keras_natgrad.linalg.scalars import scalar

__all__ = [
    "DampedInverse",
    "damped_inverse",
    "flatten_matrix",
    "kronecker_operator",
    "scalar",
    "trace_norm_ratio",
]
