"""Normalisation layers: scale and shift of every channel.

All compute `z = γ x̂ + β` with the normalised activations x̂, so the parameters
of a channel form a 2×1 matrix with inputs (x̂, 1), and the block holds an exact
2×2 Fisher per channel. x̂ is computed again from the layer's input: dividing z
by γ would fail if γ is zero.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_natgrad.capture.elementwise import by_element, elementwise_layout
from keras_natgrad.capture.registry import (
    LinearMap,
    NotCaptured,
    register_layer,
)


@register_layer(keras.layers.BatchNormalization)
def describe_batch_normalization(
    layer: keras.layers.BatchNormalization,
) -> LinearMap | NotCaptured | None:
    """x̂ by the batch's statistics in training, else by moving averages."""
    if layer.renorm:
        return NotCaptured("batch renormalisation")
    # tf_keras allows several axes, as a list.
    first, *more = keras.tree.flatten(layer.axis)
    if more:
        return NotCaptured("normalisation along several axes")

    def normalise(x: tf.Tensor, training: Any = None, mask: Any = None) -> Any:
        axis = first % x.shape.rank
        others = [each for each in range(x.shape.rank) if each != axis]
        if training and layer.trainable:
            mean, variance = _batch_moments(x, others, mask, layer.synchronized)
        else:
            shape = [1] * x.shape.rank
            shape[axis] = -1
            mean, variance = (
                tf.reshape(
                    tf.cast(tf.convert_to_tensor(moving), x.dtype), shape
                )
                for moving in (layer.moving_mean, layer.moving_variance)
            )
        return (x - mean) * tf.math.rsqrt(variance + layer.epsilon)

    return _scale_and_shift(
        layer.gamma,
        layer.beta,
        normalise,
        lambda rank: [first % rank],
        with_arguments=True,
    )


@register_layer(keras.layers.LayerNormalization)
def describe_layer_normalization(
    layer: keras.layers.LayerNormalization,
) -> LinearMap | NotCaptured | None:
    """x̂ over one or several axes, with a scale and shift per element."""

    def normalise(x: tf.Tensor) -> tf.Tensor:
        if not getattr(layer, "rms_scaling", False):
            return keras.ops.layer_normalization(
                x, axis=list(layer.axis), epsilon=layer.epsilon
            )
        variance = tf.math.reduce_variance(x, axis=layer.axis, keepdims=True)
        return x * tf.math.rsqrt(variance + layer.epsilon)

    if 0 in layer.axis:
        return NotCaptured("normalisation over the batch axis")
    return _scale_and_shift(
        layer.gamma,
        layer.beta,
        normalise,
        # Keras reshapes scale and shift to the axes in this order.
        lambda rank: sorted(axis % rank for axis in layer.axis),
    )


@register_layer(keras.layers.RMSNormalization)
def describe_rms_normalization(
    layer: keras.layers.RMSNormalization,
) -> LinearMap | NotCaptured | None:
    """x̂ = x / rms(x), and a scale that Keras aligns with the last axes."""
    if 0 in layer.axis:
        return NotCaptured("normalisation over the batch axis")
    count = len(layer.scale.shape)
    return _scale_and_shift(
        layer.scale,
        None,
        lambda x: keras.ops.rms_normalization(
            x, axis=list(layer.axis), epsilon=layer.epsilon
        ),
        lambda rank: list(range(rank - count, rank)),
    )


@register_layer(keras.layers.GroupNormalization)
def describe_group_normalization(
    layer: keras.layers.GroupNormalization,
) -> LinearMap | NotCaptured | None:
    """x̂ over a group of channels and all positions of an example."""

    def normalise(x: tf.Tensor) -> tf.Tensor:
        axis = layer.axis % x.shape.rank
        shape = tf.unstack(tf.shape(x))
        width = x.shape[axis] // layer.groups
        split = [*shape[:axis], layer.groups, width, *shape[axis + 1 :]]
        grouped = tf.reshape(x, split)
        others = [each for each in range(1, len(split)) if each != axis]
        mean, variance = tf.nn.moments(grouped, others, keepdims=True)
        scale = tf.math.rsqrt(variance + layer.epsilon)
        return tf.reshape((grouped - mean) * scale, tf.shape(x))

    return _scale_and_shift(
        layer.gamma, layer.beta, normalise, lambda rank: [layer.axis % rank]
    )


def _scale_and_shift(
    scale: Any,
    shift: Any,
    normalise: Callable[..., tf.Tensor],
    axes: Callable[[int], Sequence[int]],
    with_arguments: bool = False,
) -> LinearMap | None:
    """Returns the map of those of the parameters that exist and are trained.

    Args:
        scale: The variable γ, or `None`.
        shift: The variable β, or `None`.
        normalise: Function from the layer's input to x̂.
        axes: Function from the rank of the input to the axes along which the
            parameters differ.
        with_arguments: Whether `normalise` takes the call's arguments.
    """
    present = [v for v in (scale, shift) if v is not None]
    # If only one parameter is frozen, the other one still has a map.
    used = [v for v in present if v.trainable] or present
    if not used:
        return None
    scales = any(v is scale for v in used)

    def inputs(x: tf.Tensor, **arguments: Any) -> tf.Tensor:
        if x.dtype.size < 4:  # As the layers themselves compute.
            x = tf.cast(x, tf.float32)
        own = normalise(x, **arguments) if scales else tf.ones_like(x)
        return by_element(own, axes(x.shape.rank))

    return LinearMap(
        variables=tuple(used),
        layout=elementwise_layout(used[0].shape, bias=len(used) == 2),
        inputs=inputs,
        cotangents=lambda g: by_element(g, axes(g.shape.rank)),
        with_arguments=with_arguments,
        block="full",
    )


def _batch_moments(
    x: tf.Tensor, axes: Sequence[int], mask: Any, synchronized: bool
) -> tuple[Any, Any]:
    """Returns mean and variance over the positions that are not masked."""
    if mask is None:
        return keras.ops.moments(
            x, axes=axes, keepdims=True, synchronized=synchronized
        )
    inside = tf.cast(mask, tf.bool)[..., tf.newaxis]
    inside = tf.broadcast_to(inside, tf.shape(x))
    count = tf.reduce_sum(tf.cast(inside, x.dtype), axes, keepdims=True)
    count += tf.cast(keras.config.epsilon(), x.dtype)

    def mean_of(values: tf.Tensor) -> tf.Tensor:
        kept = tf.where(inside, values, tf.zeros_like(values))
        return tf.reduce_sum(kept, axes, keepdims=True) / count

    mean = mean_of(x)
    return mean, mean_of(tf.square(x - mean))
