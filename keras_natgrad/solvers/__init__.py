"""The natural gradient of a whole network, by one solver per file."""

from keras_natgrad.solvers.conjugate_gradient import ConjugateGradient
from keras_natgrad.solvers.dense import Dense
from keras_natgrad.solvers.factor import (
    Direction,
    FisherFactor,
    Solution,
    Solver,
    System,
)
from keras_natgrad.solvers.kernel import Kernel
from keras_natgrad.solvers.registry import check_memory, choose, get

__all__ = [
    "ConjugateGradient",
    "Dense",
    "Direction",
    "FisherFactor",
    "Kernel",
    "Solution",
    "Solver",
    "System",
    "check_memory",
    "choose",
    "get",
]
