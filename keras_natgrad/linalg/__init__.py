"""Pure functions on tensors: inverses and Kronecker products."""

from keras_natgrad.linalg.kronecker import flatten_matrix
from keras_natgrad.linalg.kronecker import kronecker_operator
from keras_natgrad.linalg.kronecker import trace_norm_ratio
from keras_natgrad.linalg.psd import DampedInverse
from keras_natgrad.linalg.psd import damped_inverse
from keras_natgrad.linalg.psd import symmetrize

__all__ = [
    "DampedInverse",
    "damped_inverse",
    "flatten_matrix",
    "kronecker_operator",
    "symmetrize",
    "trace_norm_ratio",
]
