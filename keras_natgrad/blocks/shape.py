"""What a block has to know of a layer's parameters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import tensorflow as tf


@dataclass(frozen=True)
class BlockShape:
    """Canonical shape of a layer's parameters.

    Attributes:
        rows: Number of input features n, plus one where the layer has a bias
            (the homogeneous coordinate, last row).
        columns: Number of output features m.
        groups: Number of groups with a matrix of their own each, or `None`
            for a layer without groups. All tensors of a layer with groups
            have them as their first axis.
        one_hot: Whether the inputs are `linalg.OneHot`.
        biased: Whether the last row is that of a bias.
        two_way: Whether the matrix is used as its transpose too; inputs are
            `linalg.TwoWayRows` and cotangents `linalg.TwoWayCotangents`.
    """

    rows: int
    columns: int
    groups: int | None = None
    one_hot: bool = False
    biased: bool = False
    two_way: bool = False

    @property
    def size(self) -> int:
        """Number of parameters, `groups × rows × columns`."""
        return (self.groups or 1) * self.matrix_size

    @property
    def matrix_size(self) -> int:
        """Number of parameters of one group."""
        return self.rows * self.columns

    @property
    def lead(self) -> tuple[int, ...]:
        """Axes before rows and columns: the groups, if any."""
        return () if self.groups is None else (self.groups,)

    @property
    def matrix(self) -> tuple[int, ...]:
        """Shape of the parameters, `[(groups,) rows, columns]`."""
        return (*self.lead, self.rows, self.columns)


class FactorScales(NamedTuple):
    """Traces and sizes of the two factors of a Kronecker product.

    The traces are one per layer, or scalars; the sizes are those of one layer.
    """

    input_trace: tf.Tensor
    input_size: int
    output_trace: tf.Tensor
    output_size: int
