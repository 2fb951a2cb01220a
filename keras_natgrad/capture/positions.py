"""How often a layer applies its matrix in one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_natgrad.capture.plan import Plan, match_layers
from keras_natgrad.capture.registry import linear_maps
from keras_natgrad.linalg import StructuredRows


def known_positions(
    plan: Plan, model: keras.Model, variables: Sequence[Any]
) -> list[int | None]:
    """Returns `shared_positions` of every captured layer of a model.

    Args:
        plan: The model's `Plan`.
        model: The model.
        variables: The optimizer's variables.
    """
    layers = match_layers(plan, model, variables)
    return [shared_positions(layer, index) for layer, index in layers]


def shared_positions(layer: keras.layers.Layer, index: int = 0) -> int | None:
    """Returns the shared positions of one call of a layer, if known.

    They follow from the shape that the layer was built for; the result is
    `None` if a size is unknown. The canonical inputs of an example of that
    shape are traced, not computed.

    Args:
        layer: A built layer.
        index: Which of its `LinearMap`s.
    """
    shape = layer.get_build_config()
    shape = None if shape is None else shape.get("input_shape")
    if not isinstance(shape, (tuple, list)):
        return None
    sides = shape[1:]
    if not all(isinstance(side, int) for side in sides):
        return None
    spec = linear_maps(layer)[index]
    if spec.applies is not None:
        # It is not known which of its matrices the call of that shape used.
        return None
    dtype = (
        tf.int32 if spec.layout.one_hot else tf.as_dtype(layer.compute_dtype)
    )

    @tf.function
    def trace(example: tf.Tensor) -> tf.Tensor:
        rows = spec.inputs(example)
        if isinstance(rows, StructuredRows):
            return rows.to_dense()[..., 0]
        # Groups come after the positions.
        return rows[..., 0] if rows.shape.rank == 3 else rows[:, :, 0, 0]

    example = tf.TensorSpec([1, *sides], dtype)
    return trace.get_concrete_function(example).output_shapes[-1]
