"""How an optimizer creates the saved variables of its parts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_natgrad import _compat
from keras_natgrad.step import StateFactory


def curvature_dtype(optimizer: keras.optimizers.Optimizer) -> str:
    """Returns float64 for a float64 model, and float32 otherwise."""
    variables = _compat.optimizer_variables(optimizer)
    wide = any(v.dtype == "float64" for v in variables)
    return "float64" if wide else "float32"


def state_factory(optimizer: keras.optimizers.Optimizer) -> StateFactory:
    """Returns what creates the saved variables of a built optimizer."""
    dtype = curvature_dtype(optimizer)

    def add(name: str, shape: tuple[int, ...], initializer: Any) -> Any:
        return optimizer.add_variable(
            shape=shape, initializer=initializer, dtype=dtype, name=name
        )

    def add_sum(name: str, shape: tuple[int, ...], initializer: Any) -> Any:
        return _compat.add_summed_variable(
            optimizer, name, shape, initializer, dtype
        )

    def add_integer(name: str, shape: tuple[int, ...]) -> Any:
        return optimizer.add_variable(
            shape=shape, initializer="zeros", dtype="int32", name=name
        )

    return StateFactory(add, add_sum, add_integer)


def aligned_gradients(
    optimizer: keras.optimizers.Optimizer,
    gradients: Sequence[Any],
    variables: Sequence[Any],
) -> list[tf.Tensor]:
    """Returns one gradient per variable of the optimizer.

    Zeros where the loss does not depend on a variable.

    Args:
        optimizer: Built.
        gradients: Dense gradients.
        variables: The variables that they belong to, in any order.
    """
    found = {
        _compat.variable_index(optimizer, variable): gradient
        for gradient, variable in zip(gradients, variables, strict=True)
    }
    return [
        tf.convert_to_tensor(found[index])
        if index in found
        else tf.zeros(variable.shape, variable.dtype)
        for index, variable in enumerate(_compat.optimizer_variables(optimizer))
    ]
