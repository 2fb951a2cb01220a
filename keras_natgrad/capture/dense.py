"""Dense layers, on inputs of any rank."""

from __future__ import annotations

import keras
import tensorflow as tf

from keras_natgrad._compat import kernel_variable
from keras_natgrad.capture.layout import ParameterLayout
from keras_natgrad.capture.registry import LinearMap, register_layer


@register_layer(keras.layers.Dense)
def describe_dense(layer: keras.layers.Dense) -> LinearMap:
    """`z[b, ..., :] = x[b, ..., :] W + b`; the middle axes are shared."""
    kernel = kernel_variable(layer)
    inputs, outputs = (int(side) for side in kernel.shape)
    variables = (kernel,) if layer.bias is None else (kernel, layer.bias)
    return LinearMap(
        variables=variables,
        layout=ParameterLayout.of_matrix(
            inputs, outputs, bias=layer.bias is not None
        ),
        inputs=lambda x: merge_middle_axes(x, inputs),
        cotangents=lambda g: merge_middle_axes(g, outputs),
    )


def merge_middle_axes(tensor: tf.Tensor, features: int) -> tf.Tensor:
    """Reshapes `[batch, ..., features]` to `[batch, shared, features]`."""
    if tensor.shape.rank == 2:
        return tf.expand_dims(tensor, 1)
    if tensor.shape.rank == 3:
        return tensor
    static = tensor.shape[1:-1]
    shared = static.num_elements() if static.is_fully_defined() else -1
    return tf.reshape(tensor, [tf.shape(tensor)[0], shared, features])
