"""What all convolutions share: geometry, formats and patches."""

from __future__ import annotations

import math
from typing import Any

import tensorflow as tf

from keras_natgrad.capture.dense import merge_middle_axes
from keras_natgrad.capture.layout import ParameterLayout
from keras_natgrad.capture.registry import LinearMap
from keras_natgrad.linalg import Patches, Rows, Window, padded


def window_of(layer: Any) -> Window:
    """Returns the windows of a layer."""
    return Window(
        tuple(layer.kernel_size),
        tuple(layer.strides),
        tuple(layer.dilation_rate),
    )


def channels_last(layer: Any, images: tf.Tensor) -> tf.Tensor:
    """Returns a layer's images as `[batch, *spatial, channels]`."""
    if layer.data_format == "channels_last":
        return images
    return tf.transpose(images, [0, *range(2, images.shape.rank), 1])


def positions(layer: Any, images: tf.Tensor) -> tf.Tensor:
    """Returns a layer's images as `[batch, positions, channels]`."""
    images = channels_last(layer, images)
    return merge_middle_axes(images, images.shape[-1])


def split_groups(tensor: tf.Tensor, groups: int) -> tf.Tensor:
    """Splits the last axis into `(groups, features of one)`."""
    lead = tf.shape(tensor)[:-1]
    last = [groups, tensor.shape[-1] // groups]
    split = tf.reshape(tensor, tf.concat([lead, last], axis=0))
    return tf.ensure_shape(split, [*tensor.shape[:-1], *last])


def patches(layer: Any, images: tf.Tensor, groups: int | None = None) -> Rows:
    """Returns the patches of a layer's images as rows.

    The patches of a 1×1 kernel are the pixels themselves.

    Args:
        layer: A layer with the attributes of a Keras convolution.
        images: The layer's input.
        groups: Number of groups of channels, or `None`.
    """
    window = window_of(layer)
    images = padded(channels_last(layer, images), window, layer.padding)
    if groups is not None:
        images = split_groups(images, groups)
        return Patches(tf.expand_dims(images, 1), window)
    if math.prod(window.kernel) == 1:
        seen = window.at(images, (0,) * window.rank)
        return merge_middle_axes(seen, images.shape[-1])
    return Patches(tf.expand_dims(images, 1), window)


def depthwise_layout(
    kernel: Any, bias_shape: tuple[int, ...] | None = None
) -> ParameterLayout:
    """Returns the layout of a kernel `[*kernel_size, channels, multiplier]`."""
    *sides, channels, multiplier = (int(side) for side in kernel.shape)
    rank = len(sides)
    return ParameterLayout(
        kernel_shape=(*sides, channels, multiplier),
        permutation=(rank, *range(rank), rank + 1),
        inputs=math.prod(sides),
        outputs=multiplier,
        bias_shape=bias_shape,
        groups=channels,
    )


def bias_shape(layer: Any) -> tuple[int, ...] | None:
    """Returns the shape of a layer's bias, if it has one."""
    if layer.bias is None:
        return None
    return tuple(int(side) for side in layer.bias.shape)


def with_bias(layer: Any, kernel: Any) -> tuple[Any, ...]:
    """Returns (kernel,) or (kernel, bias)."""
    return (kernel,) if layer.bias is None else (kernel, layer.bias)


def bias_map(layer: Any) -> LinearMap:
    """Returns the map of a bias that is not a homogeneous coordinate.

    Its gradient is the sum of the cotangents over all positions: a matrix of
    one row that is used once, so its Kronecker block is exact.
    """

    def ones(images: tf.Tensor) -> tf.Tensor:
        return tf.ones([tf.shape(images)[0], 1, 1], images.dtype)

    def sums(g: tf.Tensor) -> tf.Tensor:
        return tf.reduce_sum(positions(layer, g), axis=1, keepdims=True)

    count = int(layer.bias.shape[0])
    layout = ParameterLayout((count,), (0,), inputs=1, outputs=count)
    return LinearMap((layer.bias,), layout, inputs=ones, cotangents=sums)
