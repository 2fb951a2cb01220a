"""Pure functions on tensors: inverses and Kronecker products."""

from keras_natgrad.linalg.kronecker import (
    block_diagonal,
    flatten_matrix,
    kronecker_operator,
    trace_norm_ratio,
)
from keras_natgrad.linalg.one_hot import OneHot
from keras_natgrad.linalg.patches import Patches
from keras_natgrad.linalg.psd import (
    DampedInverse,
    DampedSolution,
    damped_inverse,
    damped_solve,
    pseudo_inverse_solve,
)
from keras_natgrad.linalg.rows import (
    Rows,
    StructuredRows,
    homogeneous,
    multiply,
    position_count,
    position_mean,
    scale_examples,
    take_examples,
    to_dense,
)
from keras_natgrad.linalg.scalars import scalar
from keras_natgrad.linalg.windows import Window, padded

__all__ = [
    "DampedInverse",
    "DampedSolution",
    "OneHot",
    "Patches",
    "Rows",
    "StructuredRows",
    "Window",
    "block_diagonal",
    "damped_inverse",
    "damped_solve",
    "flatten_matrix",
    "homogeneous",
    "kronecker_operator",
    "multiply",
    "padded",
    "position_count",
    "position_mean",
    "pseudo_inverse_solve",
    "scalar",
    "scale_examples",
    "take_examples",
    "to_dense",
    "trace_norm_ratio",
]
