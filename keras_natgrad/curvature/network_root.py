"""The root R of a network's Fisher on one batch, F = R Rᵀ."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import tensorflow as tf
from typing_extensions import override

from keras_natgrad.curvature.assignment import Entry
from keras_natgrad.curvature.captured_pass import CapturedPass
from keras_natgrad.curvature.products import jacobian_vector_products
from keras_natgrad.curvature.root_columns import Columns
from keras_natgrad.linalg import to_dense
from keras_natgrad.solvers.root import Direction, FisherRoot

# Columns of an example up to which their backward passes are unrolled.
_UNROLLED = 16
# Rows of outputs that one vectorised Jacobian looks at, for layers that are
# not captured.
_JACOBIAN_ROWS = 64


class NetworkRoot(FisherRoot):
    r"""R of the outputs of a network, layer by layer.

    The columns of one example have one index q that runs over its outputs,
    their positions and the columns of L. A backward pass sends column q of all
    examples to the pre-activations, `g_iq`. With the inputs `ā_i` of a layer
    its rows of R are `vec(Σ_s ā_is g_iqsᵀ)`, and its part of the kernel is

        K_(iq)(jp) = (ā_iᵀ ā_j) (g_iqᵀ g_jp)

    for a layer used at one position (the contraction of the neural tangent
    kernel, cost `M² (n + m)`). Layers used at several positions go through
    the products `Σ_s ā_is g_iqsᵀ`, a few rows of the kernel matrix at a
    time; variables that no captured layer owns through `tape.jacobian`.

    Directions are lists of `[rows, columns]` matrices, one per entry.

    Args:
        captured: The forward pass.
        columns: `Columns` of its outputs: which L.
        loss: The loss of the batch, for the residual.
        max_elements: Bound on the elements of a temporary of the kernel.

    Attributes:
        captured: The forward pass.
    """

    def __init__(
        self,
        captured: CapturedPass,
        columns: Columns,
        loss: tf.Tensor,
        max_elements: int,
    ) -> None:
        self.captured = captured
        self._entries: list[Entry] = [*captured.captured, *captured.fallbacks]
        self._columns = columns
        self._max_elements = max_elements
        self._inputs = [to_dense(a) for a in captured.inputs]
        gradients = captured.tape.gradient(
            loss,
            [term.outputs for term in captured.terms],
            unconnected_gradients=tf.UnconnectedGradients.ZERO,
        )
        self._residual = columns.residual(gradients)

    @property
    @override
    def size(self) -> int:
        return sum(entry.block.shape.size for entry in self._entries)

    @property
    @override
    def column_count(self) -> int | None:
        return self._residual.shape[0]

    @override
    def residual(self) -> tf.Tensor:
        return self._residual

    @override
    def product(self, vector: tf.Tensor) -> list[tf.Tensor]:
        gradients = self.captured.tape.gradient(
            [term.outputs for term in self.captured.terms],
            self.captured.variables,
            output_gradients=self._columns.cotangents(vector),
            unconnected_gradients=tf.UnconnectedGradients.ZERO,
        )
        return self.from_tensors(gradients)

    @override
    def transpose_product(self, direction: Direction) -> tf.Tensor:
        tangents = jacobian_vector_products(
            self.captured.tape,
            self.captured.terms,
            self.captured.variables,
            self.to_tensors(direction),
        )
        return self._columns.project(tangents)

    @override
    def gram(self) -> tf.Tensor:
        parts = [
            self._layer_gram(a, g)
            for a, g in zip(self._inputs, self._cotangents(), strict=True)
        ]
        for entry in self.captured.fallbacks:
            rows = self._jacobian(entry)
            parts.append(tf.matmul(rows, rows, transpose_b=True))
        gram = tf.add_n(parts)
        return 0.5 * (gram + tf.transpose(gram))

    @override
    def matrix(self) -> tf.Tensor:
        rows = []
        for entry, a, g in zip(
            self.captured.captured,
            self._inputs,
            self._cotangents(),
            strict=True,
        ):
            equation = "isn,iqsm->nmiq"
            if entry.block.shape.groups is not None:
                equation = "kisn,iqksm->knmiq"
            product = tf.einsum(equation, a, g)
            size = entry.block.shape.size
            rows.append(tf.reshape(product, [size, tf.size(self._residual)]))
        for entry in self.captured.fallbacks:
            rows.append(tf.transpose(self._jacobian(entry)))
        return tf.concat(rows, axis=0)

    @override
    def from_tensors(self, tensors: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        return [entry.to_matrix(tensors) for entry in self._entries]

    @override
    def to_tensors(self, direction: Direction) -> list[tf.Tensor]:
        tensors: list[Any] = [None] * len(self.captured.variables)
        for entry, matrix in zip(self._entries, direction, strict=True):
            parts = entry.from_matrix(matrix)
            for index, part in zip(entry.variables, parts, strict=True):
                tensors[index] = part
        return tensors

    @override
    def unflatten(self, vector: tf.Tensor) -> list[tf.Tensor]:
        shapes = [entry.block.shape for entry in self._entries]
        parts = tf.split(vector, [shape.size for shape in shapes])
        return [
            tf.reshape(part, shape.matrix)
            for part, shape in zip(parts, shapes, strict=True)
        ]

    def _cotangents(self) -> list[tf.Tensor]:
        """Returns `[batch, columns, (groups,) shared, m]` per entry."""
        count = self._columns.per_example

        def backward(column: tf.Tensor) -> list[tf.Tensor]:
            unit = tf.one_hot(column, count, dtype=self._residual.dtype)
            units = tf.tile(unit, [self._columns.batch])
            sent = self._columns.cotangents(units)
            return self.captured.backward(sent).cotangents

        if isinstance(count, int) and count <= _UNROLLED:
            columns = [backward(tf.constant(q)) for q in range(count)]
            stacked = [tf.stack(layer) for layer in zip(*columns, strict=True)]
        else:
            dtypes = [a.dtype for a in self._inputs]
            stacked = tf.map_fn(
                backward, tf.range(count), fn_output_signature=dtypes
            )
        return [
            _examples_first(each, a, entry)
            for each, a, entry in zip(
                stacked, self._inputs, self.captured.captured, strict=True
            )
        ]

    def _layer_gram(self, inputs: tf.Tensor, sent: tf.Tensor) -> tf.Tensor:
        columns = tf.size(self._residual)
        rows, width = inputs.shape[-1], sent.shape[-1]
        if inputs.shape.rank == 4:  # Groups: their matrices are apart.
            return tf.add_n(
                [
                    self._layer_gram(inputs[group], sent[:, :, group])
                    for group in range(inputs.shape[0])
                ]
            )
        if inputs.shape[1] == 1:
            flat = inputs[:, 0]
            left = tf.matmul(flat, flat, transpose_b=True)
            flat = tf.reshape(sent, [columns, width])
            right = tf.matmul(flat, flat, transpose_b=True)
            batch, own = self._columns.batch, self._columns.per_example
            right = tf.reshape(right, [batch, own, batch, own])
            product = left[:, tf.newaxis, :, tf.newaxis] * right
            return tf.reshape(product, [columns, columns])
        known = self.column_count or 1024
        chunk = max(1, self._max_elements // (known * width))
        total = tf.zeros([columns, columns], inputs.dtype)
        for start in range(0, rows, chunk):
            part = inputs[:, :, start : start + chunk]
            product = tf.einsum("isn,iqsm->iqnm", part, sent)
            size = part.shape[-1] * width
            flat = tf.reshape(product, [columns, size])
            total += tf.matmul(flat, flat, transpose_b=True)
        return total

    def _jacobian(self, entry: Entry) -> tf.Tensor:
        """Returns the rows of Rᵀ for a fallback entry, `[columns, size]`."""
        variable = self.captured.variables[entry.variables[0]]
        size = math.prod(variable.shape)
        tangents = []
        for term in self.captured.terms:
            jacobian = self.captured.tape.jacobian(
                term.outputs,
                variable,
                unconnected_gradients=tf.UnconnectedGradients.ZERO,
                parallel_iterations=_JACOBIAN_ROWS,
            )
            shape = tf.concat([tf.shape(term.outputs), [size]], axis=0)
            tangents.append(tf.reshape(jacobian, shape))
        return self._columns.project_many(tangents)


def _examples_first(
    stacked: tf.Tensor, inputs: tf.Tensor, entry: Entry
) -> tf.Tensor:
    """Moves the examples of `[columns, (groups,) batch, shared, m]` first."""
    shape = [inputs.shape[-3], None, inputs.shape[-2]]
    order = [1, 0, 2, 3]
    if stacked.shape.rank == 5:
        shape.insert(2, entry.block.shape.groups)
        order = [2, 0, 1, 3, 4]
    shape.append(entry.block.shape.columns)
    return tf.ensure_shape(tf.transpose(stacked, order), shape)
