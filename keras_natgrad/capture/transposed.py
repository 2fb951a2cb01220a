"""Transposed convolutions."""

from __future__ import annotations

import math
from typing import Any

import keras
import tensorflow as tf

from keras_natgrad.capture.images import (
    bias_map,
    patches,
    positions,
)
from keras_natgrad.capture.layout import ParameterLayout
from keras_natgrad.capture.registry import LinearMap, register_layer
from keras_natgrad.linalg import to_dense


@register_layer(keras.layers.Conv1DTranspose)
@register_layer(keras.layers.Conv2DTranspose)
@register_layer(keras.layers.Conv3DTranspose)
def describe_transposed(layer: Any) -> tuple[LinearMap, ...]:
    """The transpose of a convolution: pixels in, patches out.

    Every pixel x[b, p] adds `x[b, p] W` to the patch of the output at p. The
    cotangent of that patch is the patch of the output's cotangent, so the
    gradient of W is the sum of the products of pixels and these patches. The
    bias is added once per output and has its own map.
    """
    kernel = layer.kernel
    *sides, filters, channels = (int(side) for side in kernel.shape)
    rank = len(sides)
    layout = ParameterLayout(
        kernel_shape=(*sides, filters, channels),
        permutation=(rank + 1, *range(rank + 1)),
        inputs=channels,
        outputs=math.prod(sides) * filters,
    )

    def cotangents(g: tf.Tensor) -> tf.Tensor:
        return to_dense(patches(layer, g))

    weights = LinearMap(
        variables=(kernel,),
        layout=layout,
        inputs=lambda x: positions(layer, x),
        cotangents=cotangents,
    )
    return (weights,) if layer.bias is None else (weights, bias_map(layer))
