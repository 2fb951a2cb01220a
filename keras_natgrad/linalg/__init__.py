"""Pure functions on tensors: inverses and Kronecker products."""

from keras_natgrad.linalg.batched import DampedInverses, damped_inverses
from keras_natgrad.linalg.kronecker import (
    flatten_matrix,
    kronecker_operator,
    trace_norm_ratio,
)
from keras_natgrad.linalg.psd import (
    DampedInverse,
    DampedSolution,
    damped_inverse,
    damped_solve,
    pseudo_inverse_solve,
)
from keras_natgrad.linalg.scalars import scalar

__all__ = [
    "DampedInverse",
    "DampedInverses",
    "DampedSolution",
    "damped_inverse",
    "damped_inverses",
    "damped_solve",
    "flatten_matrix",
    "kronecker_operator",
    "pseudo_inverse_solve",
    "scalar",
    "trace_norm_ratio",
]
