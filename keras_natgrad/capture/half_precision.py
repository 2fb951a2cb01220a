"""Gradients in full precision for layers that compute in half precision."""

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
    """Returns gradients with the parts of captured layers in full precision.

    A layer in bfloat16 sums the gradient of its kernel over the batch and
    rounds it to eight bits. In directions of little curvature an inverse Fisher
    enlarges this rounding error as much as the gradient. If instead
    `Σ_n Σ_s ā gᵀ` is summed in float32 from the same inputs and cotangents, the
    rounding errors of single examples average out.

    The layer's own contribution to the gradient is replaced by the sum in
    float32; penalties and other uses of a variable are unchanged.

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
    # Everything is summed, so examples need not be told apart: one example
    # holds all positions, even if uses differ in their first axis.
    batch = tf.constant(1)
    inputs = record.canonical_inputs(_DTYPE, batch)
    canonical = record.canonical_cotangents(cotangents, _DTYPE, batch)
    layout = record.spec.layout
    matrix = tf.zeros([*layout.lead, layout.rows, layout.columns], _DTYPE)
    # As a derivative, so that patches and one-hot rows are never formed.
    with tf.GradientTape() as tape:
        tape.watch(matrix)
        slope = slopes(inputs, canonical, matrix)
    gradient = tf.convert_to_tensor(tape.gradient(slope, matrix))
    return layout.from_matrix(gradient)
