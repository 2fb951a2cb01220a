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


def is_off_tape(
    tape: tf.GradientTape,
    record: LayerRecord,
    cotangents: Sequence[tf.Tensor | None],
    variables: Sequence[Any],
) -> bool:
    """Returns whether a use of a layer was recorded, but not by the tape.

    Recomputed parts run forward while tapes stand still: no cotangent comes
    to such a pre-activation, although its weights get a gradient. A branch
    that the loss does not use brings none either, but there the tape knows
    how the pre-activation depends on the weights.

    Args:
        tape: Persistent tape of the forward pass.
        record: What the layer did.
        cotangents: One per use, `None` where none came.
        variables: Those of the record's matrix.
    """
    return any(
        cotangent is None
        and all(part is None for part in tape.gradient(z, list(variables)))
        for z, cotangent in zip(record.preactivations, cotangents, strict=True)
    )


def check_gradients(
    tape: tf.GradientTape,
    outputs: Sequence[tf.Tensor],
    suspects: Sequence[tuple[LayerRecord, Sequence[Any]]],
) -> None:
    """Raises ValueError if layers that nothing came to have a gradient.

    Without a gradient they are of no use to these outputs, and a Fisher of
    zero is right.

    Args:
        tape: Persistent tape of the forward pass.
        outputs: The network's outputs.
        suspects: Records that no cotangents came to, and the variables of
            their matrices.
    """
    if not suspects:
        return
    gradients = tape.gradient(
        list(outputs), [list(variables) for _, variables in suspects]
    )
    _raise_unreached(
        [
            record.layer.name
            for (record, _), parts in zip(suspects, gradients, strict=True)
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
