"""The natural gradient of a whole network, by one solver per file."""

from keras_natgrad.solvers.conjugate_gradient import ConjugateGradient
from keras_natgrad.solvers.dense import Dense
from keras_natgrad.solvers.kernel import Kernel
from keras_natgrad.solvers.registry import check_memory, choose, get
from keras_natgrad.solvers.root import (
    Direction,
    FisherRoot,
    Solution,
    Solver,
    System,
)

__all__ = [
    "ConjugateGradient",
    "Dense",
    "Direction",
    "FisherRoot",
    "Kernel",
    "Solution",
    "Solver",
    "System",
    "check_memory",
    "choose",
    "get",
]
