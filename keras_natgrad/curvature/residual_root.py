"""The root R of a sum of squared residuals."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import tensorflow as tf
from typing_extensions import override

from keras_natgrad.solvers.root import Direction, FisherRoot


class ResidualGroup(NamedTuple):
    r"""Residuals that add `½ w mean(r²)` to the loss.

    Attributes:
        values: Tensor r, of any shape.
        weight: w.
    """

    values: tf.Tensor
    weight: float

    @property
    def root(self) -> tf.Tensor:
        """√(w/N): scaled by it, residuals add up to `½ Σ r²`."""
        count = tf.cast(tf.size(self.values), self.values.dtype)
        return tf.sqrt(tf.cast(self.weight, self.values.dtype) / count)

    def loss(self) -> tf.Tensor:
        """Returns `½ w mean(r²)`."""
        return 0.5 * self.weight * tf.reduce_mean(tf.square(self.values))


class _ResidualRoot(FisherRoot):
    """What both roots of residuals share: one tensor per variable."""

    def __init__(
        self, groups: Sequence[ResidualGroup], variables: Sequence[Any]
    ) -> None:
        self._groups = list(groups)
        self._variables = list(variables)
        parts = [
            group.root * tf.reshape(group.values, [-1]) for group in groups
        ]
        self._residual = tf.stop_gradient(tf.concat(parts, axis=0))

    @property
    @override
    def size(self) -> int:
        return sum(math.prod(v.shape) for v in self._variables)

    @property
    @override
    def column_count(self) -> int | None:
        return self._residual.shape[0]

    @override
    def residual(self) -> tf.Tensor:
        return self._residual

    @override
    def from_tensors(self, tensors: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        dtype = self._residual.dtype
        return [tf.cast(tf.convert_to_tensor(t), dtype) for t in tensors]

    @override
    def to_tensors(self, direction: Direction) -> list[tf.Tensor]:
        return list(direction)

    @override
    def unflatten(self, vector: tf.Tensor) -> list[tf.Tensor]:
        sizes = [math.prod(v.shape) for v in self._variables]
        return [
            tf.reshape(part, v.shape)
            for part, v in zip(
                tf.split(vector, sizes), self._variables, strict=True
            )
        ]


class JacobianRoot(_ResidualRoot):
    """R = Jᵀ of the scaled residuals, as a matrix.

    Args:
        groups: The residuals.
        variables: `tf.Variable`s.
        jacobians: Per group, one `[N, ...]` tensor per variable.
    """

    def __init__(
        self,
        groups: Sequence[ResidualGroup],
        variables: Sequence[Any],
        jacobians: Sequence[Sequence[tf.Tensor]],
    ) -> None:
        super().__init__(groups, variables)
        rows = []
        for group, parts in zip(groups, jacobians, strict=True):
            flat = [
                tf.reshape(part, [-1, math.prod(v.shape)])
                for part, v in zip(parts, variables, strict=True)
            ]
            rows.append(group.root * tf.concat(flat, axis=1))
        self._jacobian = tf.concat(rows, axis=0)

    @override
    def product(self, vector: tf.Tensor) -> list[tf.Tensor]:
        return self.unflatten(
            tf.linalg.matvec(self._jacobian, vector, transpose_a=True)
        )

    @override
    def transpose_product(self, direction: Direction) -> tf.Tensor:
        return tf.linalg.matvec(self._jacobian, self.flatten(direction))

    @override
    def gram(self) -> tf.Tensor:
        return tf.matmul(self._jacobian, self._jacobian, transpose_b=True)

    @override
    def matrix(self) -> tf.Tensor:
        return tf.transpose(self._jacobian)


class TapeRoot(_ResidualRoot):
    """R = Jᵀ of the scaled residuals, by products alone.

    Args:
        groups: The residuals.
        variables: `tf.Variable`s.
        tape: Persistent tape that recorded the residuals.
    """

    def __init__(
        self,
        groups: Sequence[ResidualGroup],
        variables: Sequence[Any],
        tape: tf.GradientTape,
    ) -> None:
        super().__init__(groups, variables)
        self._tape = tape

    @override
    def product(self, vector: tf.Tensor) -> list[tf.Tensor]:
        parts = tf.split(vector, [tf.size(g.values) for g in self._groups])
        sent = [
            g.root * tf.reshape(part, tf.shape(g.values))
            for g, part in zip(self._groups, parts, strict=True)
        ]
        gradients = self._tape.gradient(
            [g.values for g in self._groups],
            self._variables,
            output_gradients=sent,
            unconnected_gradients=tf.UnconnectedGradients.ZERO,
        )
        return self.from_tensors(gradients)

    @override
    def transpose_product(self, direction: Direction) -> tf.Tensor:
        # `Jᵀ u` is linear in u; the gradient of `⟨Jᵀu, δ⟩` is `J δ`.
        with tf.GradientTape(watch_accessed_variables=False) as outer:
            probe = tf.zeros_like(self._residual)
            outer.watch(probe)
            pulled = self.product(probe)
            inner = tf.add_n(
                [
                    tf.reduce_sum(a * b)
                    for a, b in zip(pulled, direction, strict=True)
                ]
            )
        return outer.gradient(
            inner, probe, unconnected_gradients=tf.UnconnectedGradients.ZERO
        )

    @override
    def gram(self) -> tf.Tensor:
        matrix = self.matrix()
        return tf.matmul(matrix, matrix, transpose_a=True)

    @override
    def matrix(self) -> tf.Tensor:
        jacobians = [
            self._tape.jacobian(
                g.values,
                self._variables,
                unconnected_gradients=tf.UnconnectedGradients.ZERO,
            )
            for g in self._groups
        ]
        return JacobianRoot(self._groups, self._variables, jacobians).matrix()


def pointwise_jacobian(
    function: Callable[[tf.Tensor], tf.Tensor],
    points: Any,
    variables: Sequence[Any],
) -> list[tf.Tensor]:
    """Returns the Jacobian of residuals that each depend on one point.

    One vectorised backward pass gives all rows, where `tape.jacobian` needs
    one backward pass over all points per row.

    Args:
        function: Maps points `[n, ...]` to residuals `[n]` or `[n, k]`.
        points: Tensor (or structure of tensors) `[N, ...]`.
        variables: `tf.Variable`s.

    Returns:
        One tensor `[N, (k,) ...]` per variable.
    """

    def row(point: Any) -> list[tf.Tensor]:
        batch = tf.nest.map_structure(lambda x: x[tf.newaxis], point)
        with tf.GradientTape(persistent=True) as tape:
            values = function(batch)[0]
            parts = [values] if values.shape.rank == 0 else tf.unstack(values)
        gradients = [
            tape.gradient(
                part,
                variables,
                unconnected_gradients=tf.UnconnectedGradients.ZERO,
            )
            for part in parts
        ]
        return [
            tf.stack([tf.convert_to_tensor(g) for g in own])
            for own in zip(*gradients, strict=True)
        ]

    return list(tf.vectorized_map(row, points))
