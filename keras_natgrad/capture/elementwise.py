"""Layers whose parameters each belong to one element of the input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_natgrad._compat import layer_scale_class
from keras_natgrad.capture.layout import ParameterLayout, size_of
from keras_natgrad.capture.registry import LinearMap, register_layer


def elementwise_layout(
    shape: Sequence[int], bias: bool = False
) -> ParameterLayout:
    """Returns the layout of one 1×1 matrix per element of a variable.

    Args:
        shape: Shape of the variable.
        bias: Whether a second variable of that shape is the bias.
    """
    sides = tuple(int(side) for side in shape)
    return ParameterLayout(
        kernel_shape=sides,
        permutation=tuple(range(len(sides))),
        inputs=1,
        outputs=1,
        bias_shape=sides if bias else None,
        groups=size_of(sides),
    )


def by_element(tensor: tf.Tensor, axes: Sequence[int]) -> tf.Tensor:
    """Turns `[batch, ...]` to `[batch, shared, elements, 1]`.

    Args:
        tensor: The tensor.
        axes: The axes along which the parameters differ, in increasing order;
            along the other axes they are shared.
    """
    rank = tensor.shape.rank
    shared = [axis for axis in range(1, rank) if axis not in axes]
    order = [0, *shared, *axes]
    if order != list(range(rank)):
        tensor = tf.transpose(tensor, order)
    first = rank - len(axes)
    elements, positions = size_of(tensor.shape[first:]), tensor.shape[1:first]
    if positions.is_fully_defined():
        return tf.reshape(tensor, [-1, size_of(positions), elements, 1])
    return tf.reshape(tensor, [tf.shape(tensor)[0], -1, elements, 1])


@register_layer(keras.layers.PReLU)
def describe_prelu(layer: keras.layers.PReLU) -> LinearMap:
    """`z = max(x, 0) + α min(x, 0)`, with `∂z/∂α = min(x, 0)`."""
    # Along a shared axis α has one element.
    axes = [i + 1 for i, side in enumerate(layer.alpha.shape) if side != 1]
    return LinearMap(
        variables=(layer.alpha,),
        layout=elementwise_layout(layer.alpha.shape),
        inputs=lambda x: by_element(tf.minimum(x, 0), axes),
        cotangents=lambda g: by_element(g, axes),
        block="full",
    )


@register_layer(layer_scale_class())
def describe_layer_scale(layer: Any) -> LinearMap:
    """`z = γ x` with a scale per channel, as in ConvNeXt."""
    return LinearMap(
        variables=(layer.gamma,),
        layout=elementwise_layout(layer.gamma.shape),
        inputs=lambda x: by_element(x, [x.shape.rank - 1]),
        cotangents=lambda g: by_element(g, [g.shape.rank - 1]),
        block="full",
    )
