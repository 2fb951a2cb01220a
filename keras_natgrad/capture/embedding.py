"""Embeddings: rows of a matrix, looked up by integers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import keras
import tensorflow as tf

from keras_natgrad.capture.dense import merge_middle_axes
from keras_natgrad.capture.layout import ParameterLayout
from keras_natgrad.capture.registry import (
    LinearMap,
    NotCaptured,
    register_layer,
)
from keras_natgrad.linalg import OneHot


@register_layer(keras.layers.Embedding)
def describe_embedding(layer: keras.layers.Embedding) -> LinearMap:
    """`z[b, ..., :] = e_id E`: the inputs are one-hot vectors.

    A masked token looks up its row like any other; if the mask keeps it out of
    the loss, its cotangent is zero.
    """
    return _lookup(layer)


@register_layer(keras.layers.ReversibleEmbedding)
def describe_reversible_embedding(
    layer: keras.layers.ReversibleEmbedding,
) -> LinearMap | list[LinearMap] | NotCaptured:
    """An embedding, and a projection of hidden states back to logits.

    The projection `z = h R` has its own matrix R, or `R = Eᵀ`. With tied
    weights the gradient of E is `Σ e_id gᵀ + Σ u hᵀ`, with the cotangents u of
    the logits and the hidden states h: one matrix that is used both ways.
    """
    capped = layer.logit_soft_cap is not None
    if layer.tie_weights and capped:
        return NotCaptured(
            "embedding tied to an output projection with `logit_soft_cap`"
        )
    lookup = _lookup(layer, lambda reverse=False, **_: not reverse)
    if capped:
        return lookup
    depth, features = lookup.layout.kernel_shape
    projection = LinearMap(
        variables=(
            layer.embeddings if layer.tie_weights else layer.reverse_embeddings,
        ),
        layout=ParameterLayout.of_matrix(features, depth, bias=False),
        inputs=lambda x: merge_middle_axes(x, features),
        cotangents=lambda g: merge_middle_axes(g, depth),
        applies=lambda reverse=False, **_: bool(reverse),
    )
    if not layer.tie_weights:
        return [lookup, projection]
    return replace(
        lookup,
        layout=replace(lookup.layout, two_way=True),
        block="tied",
        transposed=projection,
    )


def _lookup(
    layer: keras.layers.Embedding,
    applies: Callable[..., bool] | None = None,
) -> LinearMap:
    depth, features = (int(side) for side in layer.embeddings.shape)
    return LinearMap(
        variables=(layer.embeddings,),
        layout=ParameterLayout(
            kernel_shape=(depth, features),
            permutation=(0, 1),
            inputs=depth,
            outputs=features,
            one_hot=True,
        ),
        inputs=lambda ids: one_hot_rows(ids, depth),
        cotangents=lambda g: merge_middle_axes(g, features),
        applies=applies,
    )


def one_hot_rows(ids: Any, depth: int) -> OneHot:
    """Returns the rows that integers `[batch, ...]` look up.

    As in Keras, negative integers count from the end; those out of range look
    up nothing.

    Args:
        ids: Tensor of integers.
        depth: Size of the vocabulary.

    Raises:
        ValueError: If the integers are a ragged or a sparse tensor.
    """
    if not isinstance(ids, tf.Tensor):
        raise ValueError(
            "An embedding of ragged or sparse integers has no canonical form. "
            "Leave it out with `optimizer.attach(model, exclude=[...])`. "
            f"Received: ids={ids!r}"
        )
    if ids.dtype not in (tf.int32, tf.int64):
        # TensorFlow takes no other dtypes as indices; small ones would
        # overflow.
        wide = ids.dtype in (tf.uint32, tf.uint64)
        ids = tf.cast(ids, tf.int64 if wide else tf.int32)
    ids = tf.reshape(ids, [tf.shape(ids)[0], -1])
    ids = tf.where(ids < 0, ids + tf.cast(depth, ids.dtype), ids)
    return OneHot(ids, tf.ones(tf.shape(ids), tf.float32), depth)
