"""What an optimizer cannot do on several replicas."""

from __future__ import annotations

from typing import Any

from keras_natgrad import replicas

_KERAS_MERGES = (
    "Keras does not support `{argument}` under a strategy with several "
    "replicas. Received: {argument}={value!r}"
)


def check_replicas(optimizer: Any) -> None:
    """Raises ValueError for what several replicas cannot do.

    Args:
        optimizer: A `CurvatureOptimizer`.
    """
    if replicas.replica_count() == 1:
        return
    name = type(optimizer).__name__
    replicas.check_merge(name)
    optimizer.engine.check_replicas(name)
    for argument in ("gradient_accumulation_steps", "ema_overwrite_frequency"):
        value = getattr(optimizer, argument)
        if value is not None:
            raise ValueError(
                _KERAS_MERGES.format(argument=argument, value=value)
            )
