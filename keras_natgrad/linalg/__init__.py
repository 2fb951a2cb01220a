"""Pure functions on tensors: inverses, Kronecker products, signs."""

from keras_natgrad.linalg.batched import DampedInverses, damped_inverses
from keras_natgrad.linalg.diagonals import (
    add_to_diagonal,
    diagonal_matrix,
    diagonal_of,
    expand_to,
    identity_matrix,
)
from keras_natgrad.linalg.eigenbasis import eigenbasis
from keras_natgrad.linalg.kronecker import (
    block_diagonal,
    flatten_matrix,
    kronecker_operator,
    trace_norm_ratio,
)
from keras_natgrad.linalg.one_hot import OneHot
from keras_natgrad.linalg.operator_sum import OperatorSum
from keras_natgrad.linalg.patches import Patches
from keras_natgrad.linalg.pencil import Pencil, pencil
from keras_natgrad.linalg.psd import (
    DampedInverse,
    DampedSolution,
    damped_inverse,
    damped_inverse_root,
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
from keras_natgrad.linalg.signs import random_signs
from keras_natgrad.linalg.small import append_row, transposed
from keras_natgrad.linalg.squares import gradient_squares
from keras_natgrad.linalg.two_way import (
    TwoWayCotangents,
    TwoWayRows,
    contract_rows,
    example_dots,
    slopes,
    tangent_rows,
)
from keras_natgrad.linalg.windows import Window, padded

__all__ = [
    "DampedInverse",
    "DampedInverses",
    "DampedSolution",
    "OneHot",
    "OperatorSum",
    "Patches",
    "Pencil",
    "Rows",
    "StructuredRows",
    "TwoWayCotangents",
    "TwoWayRows",
    "Window",
    "add_to_diagonal",
    "append_row",
    "block_diagonal",
    "contract_rows",
    "damped_inverse",
    "damped_inverse_root",
    "damped_inverses",
    "damped_solve",
    "diagonal_matrix",
    "diagonal_of",
    "eigenbasis",
    "example_dots",
    "expand_to",
    "flatten_matrix",
    "gradient_squares",
    "homogeneous",
    "identity_matrix",
    "kronecker_operator",
    "multiply",
    "padded",
    "pencil",
    "position_count",
    "position_mean",
    "pseudo_inverse_solve",
    "random_signs",
    "scalar",
    "scale_examples",
    "slopes",
    "take_examples",
    "tangent_rows",
    "to_dense",
    "trace_norm_ratio",
    "transposed",
]
