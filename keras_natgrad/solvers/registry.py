"""Solver names, and the choice between solvers."""

from __future__ import annotations

from typing import Any

import keras

from keras_natgrad.solvers.conjugate_gradient import ConjugateGradient
from keras_natgrad.solvers.dense import Dense
from keras_natgrad.solvers.kernel import Kernel
from keras_natgrad.solvers.root import Solver

_SOLVERS: dict[str, type[Solver]] = {
    "kernel": Kernel,
    "dense": Dense,
    "cg": ConjugateGradient,
}
# Assumed number of columns of a batch whose size is not known yet.
_UNKNOWN_COLUMNS = 1024


def get(identifier: Any) -> Solver | None:
    """Returns a solver, or `None` for `"auto"`.

    Args:
        identifier: `"auto"`, `"kernel"`, `"dense"`, `"cg"`, a `Solver` or
            the config of one.

    Raises:
        ValueError: If it is none of these.
    """
    if isinstance(identifier, dict):
        identifier = keras.saving.deserialize_keras_object(identifier)
    if isinstance(identifier, Solver):
        return identifier
    if identifier == "auto":
        return None
    if isinstance(identifier, str) and identifier in _SOLVERS:
        return _SOLVERS[identifier]()
    raise ValueError(
        f"`solver` must be 'auto', one of {sorted(_SOLVERS)} or a "
        f"keras_natgrad.solvers.Solver. Received: solver={identifier!r}"
    )


def choose(size: int, columns: int | None, bound: int) -> Solver:
    """Returns the cheapest direct solver that fits, else conjugate gradients.

    Args:
        size: Number P of parameters.
        columns: Number M of columns, `None` if it is not known.
        bound: Maximal number of elements the solver may need.
    """
    columns = _UNKNOWN_COLUMNS if columns is None else columns
    solver: Solver = Dense() if size <= columns else Kernel()
    if solver.memory(size, columns) > bound:
        return ConjugateGradient()
    return solver


def check_memory(
    solver: Solver, size: int, columns: int | None, bound: int
) -> None:
    """Raises ValueError if a solver needs more memory than allowed.

    Args:
        solver: The solver.
        size: Number P of parameters.
        columns: Number M of columns; `None` skips the check.
        bound: Maximal number of elements the solver may need.
    """
    if columns is None:
        return
    needed = solver.memory(size, columns)
    if needed > bound:
        raise ValueError(
            f"The {solver.kind} solver needs {needed:,} elements of memory for "
            f"{size:,} parameters and {columns:,} columns of the batch's "
            f"Fisher, more than max_elements={bound:,}. Use a smaller batch, "
            "solver='cg', KFAC, or a larger `max_elements`."
        )
