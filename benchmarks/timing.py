"""Contenders: training runs that advance a few steps at a time on a clock."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from typing import Protocol

import keras
import numpy as np
import tensorflow as tf

from benchmarks.methods import Method, Setting
from benchmarks.tasks import Batch, Task

WARM_UP_SEED = 10_000_019


class Contender(Protocol):
    """A training run that can be advanced in turn with others.

    Attributes:
        name: The label in the results.
        step: Steps done so far.
        compile_seconds: Seconds spent on building, tracing and compiling.
        limit: Steps after which no more progress is possible, or `None`.
        settings: What describes the run in the results.
    """

    name: str
    step: int
    compile_seconds: float
    limit: int | None
    settings: dict

    def advance(self, steps: int) -> float:
        """Trains for some steps and returns the seconds they took."""
        ...

    def evaluate(self) -> float:
        """Returns the metric; never on the clock."""
        ...

    def close(self) -> None:
        """Frees what the run holds."""
        ...


class KerasContender:
    """A Keras model trained by its own compiled train function.

    The model's `train_function` is what `fit` runs. It is called here
    directly, on batches that lie ready in memory, so that neither callbacks
    nor an input pipeline is on the clock, for any method. Tracing and
    compilation happen before the clock starts: a few steps are run, and then
    all variables get their first values back.

    Args:
        task: The task.
        method: The optimizer.
        setting: Its learning rate and schedule.
        seed: Seed of the weights and the batches.
        jit_compile: As in `keras.Model.compile`.
        steps_per_execution: In place of the task's own.
    """

    def __init__(
        self,
        task: Task,
        method: Method,
        setting: Setting | None = None,
        seed: int = 0,
        jit_compile: bool | str = "auto",
        steps_per_execution: int | None = None,
    ) -> None:
        setting = setting or Setting()
        self.name = method.name
        self.limit = setting.horizon
        self.settings = {
            "optimizer": method.optimizer,
            "options": dict(method.options),
            "learning_rate": setting.learning_rate,
            "horizon": setting.horizon,
            "first_order": method.first_order,
        }
        self.step = 0
        self._task = task
        self._steps_per_call = steps_per_execution or task.steps_per_execution
        self._batches = task.batches(seed)
        start = time.perf_counter()
        # Weights and batches come from the seed by NumPy. TensorFlow's global
        # seed stays as it is: setting it throws away the prepared functions
        # of the contenders built before, which would pay again on the clock.
        self._model = task.build_model(seed)
        optimizer = method.build(self._model, setting)
        self._model.compile(
            optimizer=optimizer,
            loss=task.loss(),
            loss_weights=task.loss_weight,
            jit_compile=jit_compile,
            steps_per_execution=self._steps_per_call,
        )
        optimizer.build(self._model.trainable_variables)
        self._model.make_train_function()
        self._warm_up()
        self.compile_seconds = time.perf_counter() - start

    def advance(self, steps: int) -> float:
        """Trains for some steps and returns the seconds they took.

        Args:
            steps: A multiple of `steps_per_execution`.

        Returns:
            Wall seconds of the steps, without the making of the batches.
        """
        calls, rest = divmod(steps, self._steps_per_call)
        if rest:
            raise ValueError(
                "`steps` must be a multiple of steps_per_execution="
                f"{self._steps_per_call}. Received: steps={steps}"
            )
        iterator = self._iterator(self._batches, steps)
        seconds = self._call(iterator, calls)
        self.step += steps
        return seconds

    def evaluate(self) -> float:
        """Returns the metric of the task."""
        return self._task.evaluate(self._model)

    def close(self) -> None:
        """Frees the model."""
        del self._model

    def _call(self, iterator: tf.data.Iterator, calls: int) -> float:
        train = self._model.train_function
        start = time.perf_counter()
        for _ in range(calls):
            logs = train(iterator)
        float(logs["loss"])  # A device that runs ahead must finish first.
        return time.perf_counter() - start

    def _iterator(
        self, batches: Iterator[Batch], steps: int
    ) -> tf.data.Iterator:
        x, y = zip(*itertools.islice(batches, steps), strict=True)
        arrays = (np.stack(x), np.stack(y))
        return iter(tf.data.Dataset.from_tensor_slices(arrays))

    def _warm_up(self, calls: int = 2) -> None:
        steps = calls * self._steps_per_call
        variables = self._variables()
        values = [variable.numpy() for variable in variables]
        batches = self._task.batches(WARM_UP_SEED)
        self._call(self._iterator(batches, steps), calls)
        if len(self._variables()) != len(variables):
            raise RuntimeError(
                f"{self.name} created variables during its first step; they "
                "cannot be restored after the warm-up."
            )
        for variable, value in zip(variables, values, strict=True):
            variable.assign(value)

    def _variables(self) -> list[keras.Variable]:
        return [*self._model.variables, *self._model.optimizer.variables]
