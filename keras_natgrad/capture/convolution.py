"""Convolutions, with strides, dilations and groups of channels."""

from __future__ import annotations

import math
from typing import Any

import keras
import tensorflow as tf

from keras_natgrad._compat import kernel_variable
from keras_natgrad.capture.images import (
    bias_shape,
    patches,
    positions,
    split_groups,
    with_bias,
)
from keras_natgrad.capture.layout import ParameterLayout
from keras_natgrad.capture.registry import LinearMap, register_layer


@register_layer(keras.layers.Conv1D)
@register_layer(keras.layers.Conv2D)
@register_layer(keras.layers.Conv3D)
def describe_convolution(layer: Any) -> LinearMap | None:
    """Describes a layer, unless it overrides `convolution_op`."""
    own = type(layer).convolution_op
    if own is not keras.layers.Conv2D.convolution_op:
        return None
    return convolution_map(layer)


def convolution_map(layer: Any) -> LinearMap:
    """`z[b, p] = patch(x[b], p) W + b`; the positions p are shared.

    With groups of channels, each group has its own patches, matrix and outputs.

    Args:
        layer: A built layer with the attributes of a Keras convolution.
    """
    kernel = kernel_variable(layer)
    groups = None if layer.groups == 1 else int(layer.groups)
    layout = _layout(layer, tuple(int(side) for side in kernel.shape), groups)

    def cotangents(g: tf.Tensor) -> tf.Tensor:
        g = positions(layer, g)
        return g if groups is None else split_groups(g, groups)

    return LinearMap(
        variables=with_bias(layer, kernel),
        layout=layout,
        inputs=lambda x: patches(layer, x, groups),
        cotangents=cotangents,
    )


def _layout(
    layer: Any, shape: tuple[int, ...], groups: int | None
) -> ParameterLayout:
    """Returns the layout of a kernel `[*kernel_size, channels, filters]`."""
    *sides, channels, filters = shape
    if groups is None:
        return ParameterLayout(
            kernel_shape=shape,
            permutation=tuple(range(len(shape))),
            inputs=math.prod(sides) * channels,
            outputs=filters,
            bias_shape=bias_shape(layer),
        )
    rank = len(sides)
    return ParameterLayout(
        kernel_shape=shape,
        view=(*sides, channels, groups, filters // groups),
        permutation=(rank + 1, *range(rank + 1), rank + 2),
        inputs=math.prod(sides) * channels,
        outputs=filters // groups,
        bias_shape=bias_shape(layer),
        groups=groups,
    )
