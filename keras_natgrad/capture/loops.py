"""Layers that Keras runs inside loops.

A recurrent layer runs its cell in the graph of a loop over time steps, where no
cotangent can be sent to a pre-activation: the variables of the cell fall back.
`TimeDistributed` treats time steps independently, so during a recorded pass its
layer is applied to all of them at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from keras_natgrad._compat import flatten_layers, takes_argument
from keras_natgrad.capture.registry import may_support

# Operations of functional models that do not touch the batch axis.
_ELEMENTWISE = {
    *("Add", "Subtract", "Multiply", "Divide", "TrueDivide", "Negative"),
    *("Maximum", "Minimum", "Absolute", "Square", "Sqrt", "Exp", "Log"),
    *("Relu", "Gelu", "Silu", "Elu", "Sigmoid", "Softplus", "Tanh"),
}


def unreachable_layers(model: keras.Model) -> dict[int, str]:
    """Returns why layers of a built model cannot be recorded, by their id.

    Only loops made by Keras are found here. A user's own loop or `tf.function`
    is found in the first step.
    """
    reasons: dict[int, str] = {}
    for layer in flatten_layers(model):
        inner: keras.layers.Layer | None = None
        if isinstance(layer, keras.layers.RNN) and not layer.unroll:
            inner = layer.cell
        elif _loops_over_time(layer):
            inner = layer.layer
        if inner is None:
            continue
        reason = f"weights of a loop: {type(layer).__name__} {layer.name!r}"
        for part in (inner, *flatten_layers(inner)):
            reasons.setdefault(id(part), reason)
    return reasons


def _loops_over_time(layer: keras.layers.Layer) -> bool:
    """Whether a layer is a TimeDistributed that stays a loop.

    Keras unrolls the loop if the number of time steps is static.
    """
    if not isinstance(layer, keras.layers.TimeDistributed):
        return False
    shape = layer.get_build_config().get("input_shape")
    static = shape is not None and shape[1] is not None
    return not static and not can_fold(layer)


def can_fold(layer: keras.layers.TimeDistributed) -> bool:
    """Returns whether a built TimeDistributed may fold its time steps.

    Folding time steps into the batch changes nothing if the wrapped layer
    treats examples independently and draws no random numbers. Registered layers
    and Keras layers without state are assumed to do so; batch statistics and
    the seeds of dropout are state. A user's own function may do anything to the
    batch, and the penalty of an `activity_regularizer` is a mean over the
    batch, one for each time step.
    """
    inner = [layer.layer, *flatten_layers(layer.layer)]
    return any(may_support(each) for each in inner) and all(
        _treats_examples_independently(each) for each in inner
    )


def _treats_examples_independently(layer: keras.layers.Layer) -> bool:
    if isinstance(layer, keras.layers.Lambda) or layer.activity_regularizer:
        return False
    # The operations of a functional model that are not layers.
    operations = [
        operation
        for operation in getattr(layer, "operations", ())
        if not isinstance(operation, keras.layers.Layer)
    ]
    if any(type(each).__name__ not in _ELEMENTWISE for each in operations):
        return False
    known = may_support(layer) or type(layer).__module__.startswith("keras.")
    return known and all(variable.trainable for variable in layer.variables)


def folded_call(
    layer: keras.layers.TimeDistributed, original: Callable[..., Any]
) -> Callable[..., Any]:
    """Returns a `call` for a TimeDistributed that needs no loop if it can.

    The wrapped layer sees `[batch · time, ...]`; `MapTrace` takes its positions
    out of the batch again. The call checks whether it may be folded, because
    the layer has been built by then.

    Args:
        layer: A `keras.layers.TimeDistributed`.
        original: Its own `call`.
    """
    inner = layer.layer

    def call(inputs: Any, training: Any = None, mask: Any = None) -> Any:
        masked = mask is not None and takes_argument(inner, "mask")
        if masked or not tf.is_tensor(inputs) or not can_fold(layer):
            return original(inputs, training=training, mask=mask)
        kwargs = {}
        if takes_argument(inner, "training"):
            kwargs["training"] = training
        lead = _sides(inputs)[:2]
        outputs = inner.call(
            tf.reshape(inputs, [-1, *_sides(inputs)[2:]]), **kwargs
        )
        return tf.reshape(outputs, [*lead, *_sides(outputs)[1:]])

    return call


def _sides(tensor: tf.Tensor) -> list[Any]:
    """Returns the shape, with static sizes if they are known."""
    dynamic = tf.shape(tensor)
    return [
        dynamic[axis] if side is None else side
        for axis, side in enumerate(tensor.shape)
    ]
