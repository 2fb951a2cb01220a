"""Embeddings of integers that are the same for all examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import keras

from keras_natgrad._compat import flatten_layers
from keras_natgrad.capture.registry import linear_maps


def embeddings_without_batch(model: keras.Model) -> dict[int, str]:
    """Returns why embeddings are not captured, by their id.

    An embedding of positions is often called on `range(length)`, and its
    output added to every example: the cotangents of the examples arrive as
    one sum. Such a layer is built on a shape `(length,)`. So is one that is
    called on a batch of single integers, where the model is first called on a
    batch of known size; there that size is the model's own too. A list of all
    integers of the vocabulary is taken for positions all the same.

    Args:
        model: A built model.
    """
    batches = _first_sides(_build_shapes(model))
    for tensor in getattr(model, "inputs", None) or ():
        batches.add(tensor.shape[0])
    reasons = {}
    for layer in flatten_layers(model):
        depth = _vocabulary(layer)
        shape: Sequence[Any] = _build_shapes(layer).get("input_shape") or ()
        if depth is None or len(shape) != 1 or shape[0] is None:
            continue
        if shape[0] not in batches or shape[0] == depth:
            reasons[id(layer)] = (
                f"{type(layer).__name__}: looked up by integers without a "
                "batch axis"
            )
    return reasons


def _vocabulary(layer: keras.layers.Layer) -> int | None:
    """Returns the size of the vocabulary of a layer that only looks up."""
    for spec in linear_maps(layer):
        if spec.layout.one_hot and spec.applies is None:
            return spec.layout.inputs
    return None


def _build_shapes(layer: keras.layers.Layer) -> dict[str, Any]:
    config: dict[str, Any] | None = layer.get_build_config()
    return config or {}


def _first_sides(shapes: Any) -> set[Any]:
    """Returns the first sides of all shapes of a nested structure."""
    if isinstance(shapes, Mapping):
        shapes = list(shapes.values())
    if not isinstance(shapes, (list, tuple)) or not shapes:
        return set()
    if all(side is None or isinstance(side, int) for side in shapes):
        return {shapes[0]}
    return set().union(*map(_first_sides, shapes))
