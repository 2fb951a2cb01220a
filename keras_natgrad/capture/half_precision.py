"""Gradients of weights in full precision where a layer computes in half."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from keras_natgrad.capture.traces import MapTrace
from keras_natgrad.linalg import slopes

_DTYPE = tf.float32


def refine_gradients(
    gradients: Sequence[Any],
    sources: Sequence[Any],
    records: Sequence[MapTrace],
    cotangents: Sequence[Sequence[tf.Tensor | None]],
) -> list[Any]:
    """Returns the gradients with the parts of captured layers unrounded.

    A layer in bfloat16 rounds the gradient of its kernel to eight bits, after
    it has summed over the batch. An inverse Fisher enlarges what that leaves in
    directions of little curvature by as much as it enlarges the gradient there.
    Summed in float32 instead, `Σ_n Σ_s ā gᵀ` of the same inputs and cotangents,
    the roundings of single examples average out.

    What the layer itself contributed is taken from its gradient, and the same
    sum in float32 put in its place; penalties and other uses of a variable
    stay as they are.

    Args:
        gradients: One per source, `None` where there is none.
        sources: The variables.
        records: Records of layers in half precision.
        cotangents: For each record, one per pre-activation.
    """
    refined = list(gradients)
    positions = {id(variable): i for i, variable in enumerate(sources)}
    for record, own in zip(records, cotangents, strict=True):
        variables = record.spec.variables
        indices = [positions.get(id(variable)) for variable in variables]
        if all(g is None for g in own) or all(i is None for i in indices):
            continue
        replaced = zip(
            indices,
            _exact(record, own),
            record.own_gradients(own),
            strict=True,
        )
        for index, exact, rounded in replaced:
            if index is None or rounded is None or refined[index] is None:
                continue
            total = tf.convert_to_tensor(refined[index])
            rest = total - tf.cast(rounded, total.dtype)
            refined[index] = rest + tf.cast(exact, total.dtype)
    return refined


def _exact(
    record: MapTrace, cotangents: Sequence[tf.Tensor | None]
) -> list[tf.Tensor]:
    """Returns `Σ_n Σ_s ā gᵀ` in float32, as tensors like the variables."""
    # All is summed, so that nobody asks which example is whose: one example
    # holds the positions of all, also where uses differ in their first axis.
    batch = tf.constant(1)
    inputs = record.canonical_inputs(_DTYPE, batch)
    canonical = record.canonical_cotangents(cotangents, _DTYPE, batch)
    layout = record.spec.layout
    matrix = tf.zeros([*layout.lead, layout.rows, layout.columns], _DTYPE)
    # As a derivative, so that patches of images and one-hot rows need not be
    # formed.
    with tf.GradientTape() as tape:
        tape.watch(matrix)
        slope = slopes(inputs, canonical, matrix)
    gradient = tf.convert_to_tensor(tape.gradient(slope, matrix))
    return layout.from_matrix(gradient)
