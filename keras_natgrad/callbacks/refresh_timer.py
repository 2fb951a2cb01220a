"""How many seconds a refresh of the inverses takes."""

from __future__ import annotations

import time
from typing import Any

import keras
import tensorflow as tf


class RefreshTimer:
    """Times refreshes of all inverses, and leaves no trace of them.

    The refresh is compiled like the training step of the model.

    Args:
        model: A compiled model.
        optimizer: Its optimizer of the package.

    Raises:
        ValueError: If the optimizer keeps no inverses, or there are several
            replicas.
    """

    def __init__(self, model: keras.Model, optimizer: Any) -> None:
        if not optimizer.engine.direction.has_inverses:
            raise ValueError(
                "`measure_refresh` needs an optimizer that keeps inverses, "
                "such as keras_natgrad.KFAC. "
                f"Received: optimizer={optimizer!r}"
            )
        replicas = model.distribute_strategy.num_replicas_in_sync
        if replicas > 1:
            raise ValueError(
                "`measure_refresh` needs a model on one replica. "
                f"Received: {replicas} replicas"
            )
        self.optimizer = optimizer
        self._refresh = optimizer.refresh_inverses
        if not model.run_eagerly:
            self._refresh = tf.function(
                self._refresh, jit_compile=model.jit_compile
            )

    def seconds(self) -> float:
        """Returns the wall time of a refresh, after one to warm up.

        The optimizer must have made a step. Its variables are restored.
        """
        variables = self.optimizer.variables
        kept = [tf.identity(variable.value) for variable in variables]
        self._refresh()
        tf.test.experimental.sync_devices()
        start = time.perf_counter()
        self._refresh()
        tf.test.experimental.sync_devices()
        seconds = time.perf_counter() - start
        for variable, value in zip(variables, kept, strict=True):
            variable.assign(value)
        return seconds
