"""What users are told of layers that are not captured."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from keras_natgrad.capture import LayerRecord, Plan


def check_reached(records: Sequence[LayerRecord]) -> None:
    """Raises ValueError if a planned layer ran in a graph of its own."""
    lost = [record.layer.name for record in records if record.lost]
    if lost:
        raise ValueError(
            "These layers run inside a loop or a tf.function of their own, "
            f"where their curvature cannot be reached: {lost}. Leave them out "
            f"with `optimizer.attach(model, exclude={lost})`; they then get "
            "the fallback block."
        )


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


def warn_of_plan(plan: Plan, variables: Sequence[Any]) -> None:
    """Warns of the variables that get a fallback block, all in one."""
    if not plan.fallback:
        return
    names = ", ".join(
        f"{variables[index].path} ({reason})"
        for index, reason in zip(plan.fallback, plan.reasons, strict=True)
    )
    warnings.warn(
        "These variables have no captured linear map and get the fallback "
        f"block: {names}. Teach the optimizer their layers with "
        "`keras_natgrad.register_layer`.",
        stacklevel=5,
    )
