"""How a layer's variables form one canonical `[rows, columns]` matrix."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import tensorflow as tf

from keras_natgrad.linalg import append_row


@dataclass(frozen=True)
class ParameterLayout:
    """Maps (kernel, bias) to the homogeneous matrix and back.

    The kernel is viewed as `view`, transposed by `permutation` and reshaped
    to `[n, m]`; the bias, if there is one, is flattened to the last row. A
    layer that applies one matrix to each of several groups of features has
    `[groups, n, m]`. The layout is plain data, to be saved in an optimizer's
    config.

    Attributes:
        kernel_shape: Shape of the kernel variable.
        permutation: Order of the axes that puts groups first, then inputs,
            then outputs.
        inputs: Number n of input features of one group.
        outputs: Number m of output features of one group.
        bias_shape: Shape of the bias variable, or `None`.
        groups: Number of groups, or `None` for a layer without groups.
        view: Shape in which the kernel's axes are permuted, if it is not
            `kernel_shape`.
        one_hot: Whether the inputs are one-hot vectors, as in an embedding.
        two_way: Whether the transposed matrix is used too, as in an embedding
            tied to the output projection.
    """

    kernel_shape: tuple[int, ...]
    permutation: tuple[int, ...]
    inputs: int
    outputs: int
    bias_shape: tuple[int, ...] | None = None
    groups: int | None = None
    view: tuple[int, ...] | None = None
    one_hot: bool = False
    two_way: bool = False

    @property
    def rows(self) -> int:
        """Number of rows: n, plus one if there is a bias."""
        return self.inputs + (self.bias_shape is not None)

    @property
    def columns(self) -> int:
        """Number of columns, m."""
        return self.outputs

    @property
    def lead(self) -> tuple[int, ...]:
        """Axes before rows and columns: the groups, if any."""
        return () if self.groups is None else (self.groups,)

    def to_matrix(self, tensors: Sequence[tf.Tensor]) -> tf.Tensor:
        """Returns the matrix `[(groups,) rows, columns]` of the variables."""
        return self._to_matrix(tensors, ())

    def to_matrices(self, tensors: Sequence[tf.Tensor]) -> tf.Tensor:
        """Returns the matrices of several layers, which are the first axis."""
        return self._to_matrix(tensors, (int(tensors[0].shape[0]),))

    def _to_matrix(
        self, tensors: Sequence[tf.Tensor], layers: tuple[int, ...]
    ) -> tf.Tensor:
        kernel = tensors[0]
        if self.view is not None:
            kernel = tf.reshape(kernel, [*layers, *self.view])
        kernel = _permute(kernel, self.permutation)
        shape = (*layers, *self.lead, self.inputs, self.outputs)
        matrix = _reshape(kernel, shape)
        if self.bias_shape is None:
            return matrix
        bias = tf.reshape(tensors[1], [*layers, *self.lead, 1, self.outputs])
        return append_row(matrix, bias)

    def from_matrix(self, matrix: tf.Tensor) -> list[tf.Tensor]:
        """Returns (kernel[, bias]) from a matrix of `to_matrix`."""
        return self._from_matrix(matrix, ())

    def from_matrices(self, matrices: tf.Tensor) -> list[tf.Tensor]:
        """Returns the kernels [and biases] of several layers, first axis."""
        return self._from_matrix(matrices, (int(matrices.shape[0]),))

    def _from_matrix(
        self, matrix: tf.Tensor, layers: tuple[int, ...]
    ) -> list[tf.Tensor]:
        view = self.kernel_shape if self.view is None else self.view
        permuted = [view[axis] for axis in self.permutation]
        inverse = sorted(
            range(len(permuted)), key=lambda axis: self.permutation[axis]
        )
        kernel, bias = matrix, None
        if self.bias_shape is not None:
            kernel, bias = tf.split(matrix, [self.inputs, 1], axis=-2)
        kernel = _permute(_reshape(kernel, (*layers, *permuted)), inverse)
        tensors = [_reshape(kernel, (*layers, *self.kernel_shape))]
        if bias is not None and self.bias_shape is not None:
            tensors.append(tf.reshape(bias, [*layers, *self.bias_shape]))
        return tensors

    def get_config(self) -> dict[str, Any]:
        """Returns plain data for an optimizer's config."""
        return asdict(self)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> ParameterLayout:
        """Recreates the layout from `get_config`."""
        values: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value
            for key, value in config.items()
        }
        return cls(**values)

    @classmethod
    def of_matrix(
        cls, inputs: int, outputs: int, bias: bool
    ) -> ParameterLayout:
        """Returns the layout of a plain `[n, m]` kernel and `[m]` bias."""
        return cls(
            kernel_shape=(inputs, outputs),
            permutation=(0, 1),
            inputs=inputs,
            outputs=outputs,
            bias_shape=(outputs,) if bias else None,
        )


def _permute(tensor: tf.Tensor, permutation: Sequence[int]) -> tf.Tensor:
    """Transposes the last axes, unless there is nothing to do."""
    if list(permutation) == sorted(permutation):
        return tensor  # A transposition would copy.
    first = tensor.shape.rank - len(permutation)
    axes = [*range(first), *(first + axis for axis in permutation)]
    return tf.transpose(tensor, axes)


def _reshape(tensor: tf.Tensor, shape: Sequence[int]) -> tf.Tensor:
    """Reshapes, unless there is nothing to do."""
    if tensor.shape == tuple(shape):
        return tensor
    return tf.reshape(tensor, shape)


def size_of(shape: Sequence[int]) -> int:
    """Returns the number of elements of a shape."""
    return math.prod(int(side) for side in shape)
