"""Depthwise and separable convolutions."""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

from keras_natgrad.capture.images import (
    bias_shape,
    channels_last,
    depthwise_layout,
    patches,
    positions,
    split_groups,
    with_bias,
)
from keras_natgrad.capture.layout import ParameterLayout
from keras_natgrad.capture.registry import LinearMap, register_layer


@register_layer(keras.layers.DepthwiseConv1D)
@register_layer(keras.layers.DepthwiseConv2D)
def describe_depthwise(layer: Any) -> LinearMap:
    """Each channel is a group with its own patches and matrix."""
    layout = depthwise_layout(layer.kernel, bias_shape(layer))
    channels = layout.groups
    assert channels is not None
    return LinearMap(
        variables=with_bias(layer, layer.kernel),
        layout=layout,
        inputs=lambda x: patches(layer, x, channels),
        cotangents=lambda g: split_groups(positions(layer, g), channels),
    )


@register_layer(keras.layers.SeparableConv1D)
@register_layer(keras.layers.SeparableConv2D)
def describe_separable(layer: Any) -> tuple[LinearMap, LinearMap]:
    """A depthwise convolution, and a matrix at every position.

    With `y = depthwise(x)` and `z = y V (+ b)` the depthwise kernel has the
    cotangents `g Vᵀ`, and the pointwise kernel V has the inputs y.
    """
    depthwise, pointwise = layer.depthwise_kernel, layer.pointwise_kernel
    inner, filters = (int(side) for side in pointwise.shape[-2:])
    layout = depthwise_layout(depthwise)
    channels = layout.groups
    assert channels is not None

    def between(g: tf.Tensor) -> tf.Tensor:
        matrix = tf.reshape(tf.cast(pointwise.value, g.dtype), [inner, filters])
        flat = tf.reshape(channels_last(layer, g), [-1, filters])
        sent = tf.matmul(flat, matrix, transpose_b=True)
        shape = tf.shape(positions(layer, g))[:-1]
        sent = tf.reshape(sent, tf.concat([shape, [inner]], axis=0))
        return split_groups(
            tf.ensure_shape(sent, [None, None, inner]), channels
        )

    def middle(x: tf.Tensor) -> tf.Tensor:
        return positions(
            layer,
            keras.ops.depthwise_conv(
                x,
                tf.cast(depthwise.value, x.dtype),
                strides=layer.strides,
                padding=layer.padding,
                dilation_rate=layer.dilation_rate,
                data_format=layer.data_format,
            ),
        )

    return (
        LinearMap(
            variables=(depthwise,),
            layout=layout,
            inputs=lambda x: patches(layer, x, channels),
            cotangents=between,
        ),
        LinearMap(
            variables=with_bias(layer, pointwise),
            layout=ParameterLayout(
                kernel_shape=tuple(int(side) for side in pointwise.shape),
                permutation=tuple(range(len(pointwise.shape))),
                inputs=inner,
                outputs=filters,
                bias_shape=bias_shape(layer),
            ),
            inputs=middle,
            cotangents=lambda g: positions(layer, g),
        ),
    )
