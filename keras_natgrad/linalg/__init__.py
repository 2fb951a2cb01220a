"""Pure functions on tensors: inverses and Kronecker products."""

from keras_natgrad.linalg.kronecker import (
    block_diagonal,
    flatten_matrix,
    kronecker_operator,
    trace_norm_ratio,
)
from keras_natgrad.linalg.one_hot import OneHot, Rows, to_dense
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
    "DampedSolution",
    "OneHot",
    "Rows",
    "block_diagonal",
    "damped_inverse",
    "damped_solve",
    "flatten_matrix",
    "kronecker_operator",
    "pseudo_inverse_solve",
    "scalar",
    "to_dense",
    "trace_norm_ratio",
]
