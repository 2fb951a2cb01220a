"""How a layer's variables form one canonical `[rows, columns]` matrix."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import tensorflow as tf


@dataclass(frozen=True)
class ParameterLayout:
    """Maps (kernel, bias) to the homogeneous matrix and back.

    The kernel is transposed by `permutation` and reshaped to `[n, m]`; the
    bias, where there is one, is flattened to the last row. Plain data, so
    that it travels in an optimizer's config.

    Attributes:
        kernel_shape: Shape of the kernel variable.
        permutation: Order of the kernel's axes that puts input axes first.
        inputs: Number n of input features.
        outputs: Number m of output features.
        bias_shape: Shape of the bias variable, or `None`.
    """

    kernel_shape: tuple[int, ...]
    permutation: tuple[int, ...]
    inputs: int
    outputs: int
    bias_shape: tuple[int, ...] | None = None

    @property
    def rows(self) -> int:
        """Number of rows, n plus one where there is a bias."""
        return self.inputs + (self.bias_shape is not None)

    @property
    def columns(self) -> int:
        """Number of columns, m."""
        return self.outputs

    def to_matrix(self, tensors: Sequence[tf.Tensor]) -> tf.Tensor:
        """Returns the `[rows, columns]` matrix of (kernel[, bias])."""
        kernel = _permute(tensors[0], self.permutation)
        matrix = tf.reshape(kernel, [self.inputs, self.outputs])
        if self.bias_shape is None:
            return matrix
        bias = tf.reshape(tensors[1], [1, self.outputs])
        return tf.concat([matrix, bias], axis=0)

    def from_matrix(self, matrix: tf.Tensor) -> list[tf.Tensor]:
        """Returns (kernel[, bias]) from a `[rows, columns]` matrix."""
        permuted = [self.kernel_shape[axis] for axis in self.permutation]
        inverse = sorted(
            range(len(permuted)), key=lambda axis: self.permutation[axis]
        )
        kernel = tf.reshape(matrix[: self.inputs], permuted)
        tensors = [_permute(kernel, inverse)]
        if self.bias_shape is not None:
            tensors.append(tf.reshape(matrix[self.inputs], self.bias_shape))
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
    """Transposes, unless there is nothing to do (it would copy)."""
    if list(permutation) == sorted(permutation):
        return tensor
    return tf.transpose(tensor, permutation)


def size_of(shape: Sequence[int]) -> int:
    """Returns the number of elements of a shape."""
    return math.prod(int(side) for side in shape)
