"""Muon for kernels of any rank."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import keras
from keras import ops


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """Returns the shape of the matrix that a kernel stands for.

    Leading axes are inputs, the others outputs. Of the ways to split the axes
    the one nearest to a square is taken.

    Args:
        shape: Shape of a kernel, of at least two axes.

    Returns:
        Rows and columns.

    Example:

    >>> matrix_shape((3, 3, 16, 32)), matrix_shape((64, 4, 16))
    ((144, 32), (64, 64))
    """
    splits = [
        (math.prod(shape[:axis]), math.prod(shape[axis:]))
        for axis in range(1, len(shape))
    ]
    return min(splits, key=sum)


class Muon(keras.optimizers.Muon):
    """Muon that takes kernels of more than two axes as matrices.

    Keras's own class leaves them to Adam, and with them all convolutions and
    attention projections.
    """

    def build(self, variables: Sequence[keras.Variable]) -> None:
        super().build(variables)
        for i, variable in enumerate(variables):
            excluded = any(
                re.search(pattern, variable.path)
                for pattern in self.exclude_layers
            )
            if len(variable.shape) > 2 and not excluded:
                # A variable without a velocity is not Adam's.
                self.adam_velocities[i] = None

    def zeropower_via_newtonschulz5(self, x, steps: int):
        flat = ops.reshape(x, matrix_shape(x.shape))
        return ops.reshape(
            super().zeropower_via_newtonschulz5(flat, steps), x.shape
        )

    def lr_adjust(self, x):
        flat = ops.reshape(x, matrix_shape(x.shape))
        return ops.reshape(super().lr_adjust(flat), x.shape)
