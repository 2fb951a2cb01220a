"""Layers of tf_keras that compute the same as those of Keras 3.

They have the attributes that the functions of `capture` read. Other layers get
the fallback block; `keras_natgrad.register_layer` takes layers of tf_keras as
well.
"""

from __future__ import annotations

from typing import Any

import keras
import tf_keras

from keras_natgrad.capture import LinearMap, register_layer
from keras_natgrad.capture.convolution import convolution_map
from keras_natgrad.capture.dense import describe_dense
from keras_natgrad.capture.einsum_dense import describe_einsum_dense
from keras_natgrad.capture.embedding import describe_embedding
from keras_natgrad.capture.normalization import (
    describe_batch_normalization,
    describe_layer_normalization,
)

register_layer(tf_keras.layers.Dense)(describe_dense)
register_layer(tf_keras.layers.EinsumDense)(describe_einsum_dense)
register_layer(tf_keras.layers.Embedding)(describe_embedding)
register_layer(tf_keras.layers.BatchNormalization)(describe_batch_normalization)
register_layer(tf_keras.layers.LayerNormalization)(describe_layer_normalization)


@register_layer(tf_keras.layers.Conv1D)
@register_layer(tf_keras.layers.Conv2D)
@register_layer(tf_keras.layers.Conv3D)
def describe_convolution(layer: Any) -> LinearMap | None:
    """Describes a layer, unless it overrides `convolution_op`."""
    own = type(layer).convolution_op
    if own is not tf_keras.layers.Conv2D.convolution_op:
        return None
    return convolution_map(layer)


_PARAMETERS = ("kernel", "bias", "embeddings", "gamma", "beta")


def l2_regularizers(layers: Any) -> dict[Any, keras.regularizers.Regularizer]:
    """Returns L2 regularizers of Keras 3, by variable reference.

    Args:
        layers: Layers of tf_keras. Regularizers of variables of unregistered
            layers affect only the gradient.
    """
    found = {}
    for layer in layers:
        for name in _PARAMETERS:
            variable = getattr(layer, name, None)
            own = getattr(layer, f"{name}_regularizer", None)
            if variable is not None and isinstance(
                own, (tf_keras.regularizers.L2, tf_keras.regularizers.L1L2)
            ):
                found[variable.ref()] = keras.regularizers.L2(float(own.l2))
    return found
