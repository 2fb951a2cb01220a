"""EinsumDense layers, among them the projections of attention layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import keras
import tensorflow as tf

from keras_natgrad._compat import kernel_variable
from keras_natgrad.capture.layout import ParameterLayout, size_of
from keras_natgrad.capture.registry import LinearMap, register_layer

_ELLIPSIS = "..."


@dataclass(frozen=True)
class Equation:
    """Axes of `inputs,kernel->outputs`, sorted by what they do.

    Attributes:
        inputs: Labels of the input, without the ellipsis.
        kernel: Labels of the kernel.
        outputs: Labels of the output, without the ellipsis.
        batch_axes: How many leading input axes the ellipsis stands for, or zero
            if the equation names all of them.
    """

    inputs: str
    kernel: str
    outputs: str
    has_ellipsis: bool

    @property
    def grouped(self) -> str:
        """Labels in input, kernel and output: each has its own matrix."""
        return "".join(
            c for c in self.kernel if c in self.inputs and c in self.outputs
        )

    @property
    def contracted(self) -> str:
        """Labels summed against the kernel: the n input features."""
        return "".join(c for c in self.kernel if c not in self.outputs)

    @property
    def produced(self) -> str:
        """Labels that the kernel adds, in output order: the m features."""
        return "".join(
            c for c in self.outputs if c in self.kernel and c not in self.inputs
        )

    @property
    def shared(self) -> str:
        """Labels that pass through: batch and shared positions."""
        return "".join(c for c in self.outputs if c not in self.kernel)

    @property
    def is_linear_map(self) -> bool:
        """Whether one matrix per group is applied at every shared position.

        Not if the kernel is summed over a label of its own, or if the kernel
        has the first axis, the batch.
        """
        own = set(self.kernel) - set(self.inputs) - set(self.outputs)
        starts_with_batch = self.has_ellipsis or (
            self.inputs[:1] == self.outputs[:1]
            and self.inputs[:1] not in self.kernel
        )
        return not own and starts_with_batch


def parse_equation(equation: str) -> Equation:
    """Parses an EinsumDense equation such as `"abc,cde->abde"`."""
    left, outputs = equation.replace(" ", "").split("->")
    inputs, kernel = left.split(",")
    has_ellipsis = _ELLIPSIS in inputs
    return Equation(
        inputs=inputs.replace(_ELLIPSIS, ""),
        kernel=kernel,
        outputs=outputs.replace(_ELLIPSIS, ""),
        has_ellipsis=has_ellipsis,
    )


@register_layer(keras.layers.EinsumDense)
def describe_einsum_dense(layer: keras.layers.EinsumDense) -> LinearMap | None:
    """`z = einsum(equation, x, W) + b` with W applied at every position.

    Labels in input, kernel and output are groups with one matrix each.
    """
    equation = parse_equation(layer.equation)
    leads = layer.equation.replace(" ", "")
    trailing_ellipsis = _ELLIPSIS in leads and not leads.startswith(_ELLIPSIS)
    if not equation.is_linear_map or trailing_ellipsis:
        return None
    kernel = kernel_variable(layer)
    sides = dict(zip(equation.kernel, kernel.shape, strict=True))
    grouped = equation.grouped
    layout = ParameterLayout(
        kernel_shape=tuple(int(side) for side in kernel.shape),
        permutation=tuple(
            equation.kernel.index(c)
            for c in grouped + equation.contracted + equation.produced
        ),
        inputs=size_of([sides[c] for c in equation.contracted]),
        outputs=size_of([sides[c] for c in equation.produced]),
        bias_shape=_bias_shape(layer, equation),
        groups=size_of([sides[c] for c in grouped]) if grouped else None,
    )
    # One weight, or a weight and a bias, per group.
    elementwise = grouped and layout.rows * layout.columns <= 2
    variables: tuple[Any, ...] = (kernel,)
    if layout.bias_shape is not None:
        variables = (kernel, layer.bias)
    return LinearMap(
        variables=variables,
        layout=layout,
        inputs=lambda x: _canonical(
            x,
            equation,
            equation.inputs,
            equation.contracted,
            [*layout.lead, layout.inputs],
        ),
        cotangents=lambda g: _canonical(
            g,
            equation,
            equation.outputs,
            equation.produced,
            [*layout.lead, layout.outputs],
        ),
        block="full" if elementwise else None,
    )


def _bias_shape(
    layer: keras.layers.EinsumDense, equation: Equation
) -> tuple[int, ...] | None:
    """Returns the bias shape if the bias has one entry per output feature.

    A bias that varies over shared positions, or is common to several output
    features or groups, is not a homogeneous coordinate and falls back. So does
    a bias whose axes are in another order than groups and features.
    """
    if layer.bias is None:
        return None
    features = equation.grouped + equation.produced
    ordered = [c for c in equation.outputs if c in features]
    if set(layer.bias_axes) != set(features):
        return None
    if equation.grouped and ordered != list(features):
        return None
    return tuple(int(side) for side in layer.bias.shape)


def _canonical(
    tensor: tf.Tensor,
    equation: Equation,
    labels: str,
    features: str,
    sizes: Sequence[int],
) -> tf.Tensor:
    """Moves group and feature axes last: `[batch, shared, *sizes]`.

    Input labels that are in neither the kernel nor the output are summed over:
    the kernel acts on the sum.
    """
    last = equation.grouped + features
    shared = "".join(c for c in equation.shared if c in labels)
    ellipsis = _ELLIPSIS if equation.has_ellipsis else ""
    source, target = ellipsis + labels, ellipsis + shared + last
    if source != target:
        tensor = tf.einsum(f"{source}->{target}", tensor)
    return tf.reshape(tensor, [tf.shape(tensor)[0], -1, *sizes])
