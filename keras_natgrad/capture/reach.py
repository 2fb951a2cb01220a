"""Whether cotangents can be sent back to every layer, example by example."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from keras_natgrad.capture.records import LayerRecord


def check_reached(records: Sequence[LayerRecord]) -> None:
    """Raises ValueError if a planned layer ran in a graph of its own."""
    _raise_unreached([record.layer.name for record in records if record.lost])


def check_batched(records: Sequence[LayerRecord], batch: int | None) -> None:
    """Raises ValueError if a planned layer saw inputs without a batch axis."""
    names = [r.layer.name for r in records if r.lacks_batch(batch)]
    if names:
        raise ValueError(
            "These layers are called on inputs without the batch axis, where "
            f"the examples cannot be told apart: {names}. Leave them out with "
            f"`optimizer.attach(model, exclude={names})`; they then get the "
            "fallback block."
        )


def check_called(
    tape: tf.GradientTape,
    outputs: Sequence[tf.Tensor],
    records: Sequence[LayerRecord],
    variables: Sequence[Sequence[Any]],
) -> None:
    """Raises ValueError if outputs depend on layers that were not called.

    A `tf.function` that was traced before runs without its Python code, so
    that nothing is recorded.

    Args:
        tape: Persistent tape of the forward pass.
        outputs: The network's outputs.
        records: What the layers did.
        variables: For each record, those of its matrix.
    """
    suspects = [not record.preactivations for record in records]
    _check_gradients(tape, outputs, records, variables, suspects)


def check_arrivals(
    tape: tf.GradientTape,
    outputs: Sequence[tf.Tensor],
    records: Sequence[LayerRecord],
    variables: Sequence[Sequence[Any]],
    cotangents: Sequence[Sequence[tf.Tensor | None]],
) -> None:
    """Raises ValueError if a layer was recorded, but not by the tape.

    Recomputed parts run forward while tapes stand still: no cotangent comes
    to such a pre-activation, although its weights get a gradient. A branch
    that the loss does not use brings none either, but there the tape knows
    how the pre-activation depends on the weights.

    Args:
        tape: Persistent tape of the forward pass.
        outputs: The network's outputs.
        records: What the layers did.
        variables: For each record, those of its matrix.
        cotangents: For each record one per use, `None` where none came.
    """
    suspects = [
        any(
            cotangent is None
            and all(part is None for part in tape.gradient(z, list(own)))
            for z, cotangent in zip(record.preactivations, sent, strict=True)
        )
        for record, own, sent in zip(
            records, variables, cotangents, strict=True
        )
    ]
    _check_gradients(tape, outputs, records, variables, suspects)


def _check_gradients(
    tape: tf.GradientTape,
    outputs: Sequence[tf.Tensor],
    records: Sequence[LayerRecord],
    variables: Sequence[Sequence[Any]],
    suspects: Sequence[bool],
) -> None:
    """Raises ValueError if the outputs depend on suspected layers.

    The others are of no use to these outputs, and a Fisher of zero is right.
    """
    found = [index for index, suspect in enumerate(suspects) if suspect]
    if not found:
        return
    gradients = tape.gradient(
        list(outputs), [list(variables[index]) for index in found]
    )
    _raise_unreached(
        [
            records[index].layer.name
            for index, parts in zip(found, gradients, strict=True)
            if any(part is not None for part in parts)
        ]
    )


def _raise_unreached(names: Sequence[str]) -> None:
    if names:
        unique = list(dict.fromkeys(names))
        raise ValueError(
            "These layers run inside a loop, a tf.function or a recomputed "
            "part (`tf.recompute_grad`, `keras.RematScope`) of their own, or "
            "their weights are read by other code; their curvature cannot be "
            f"reached there: {unique}. Leave them out with "
            f"`optimizer.attach(model, exclude={unique})`; they then get the "
            "fallback block."
        )
