"""Refreshes of the inverses outside the graph of the training step."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple

import keras
import tensorflow as tf

from keras_natgrad.curvature import BlockCurvature
from keras_natgrad.step import Refresh

if TYPE_CHECKING:
    from keras_natgrad.optimizers.engine import Engine

# Pause of the thread after a block, in times of what the block took, and at
# most in seconds; a block that took less than `_FELT` disturbs no step.
_REST = 3.0
_LONGEST_PAUSE = 1.0
_FELT = 0.005


class Refreshed(NamedTuple):
    """Raised dampings and failed factorisations of one refresh."""

    retries: int
    failures: int


class HostRefresh:
    """Refreshes inverses between training steps, or while they go on.

    The step's graph only asks for a refresh. After the step the statistics are
    copied to blocks of the host's own, which are refreshed there by the same
    code, and the inverses are copied back, all of them between two steps. In a
    thread this is done while the next steps run; their inverses are then older
    by these steps, at most by `max_staleness`.

    Args:
        engine: The engine, built, with a direction of blocks.
        periods: `Refresh`. A refresh while training goes on may take
            `inverse_period` steps, after which the next step waits for it.
    """

    def __init__(self, engine: Engine, periods: Refresh) -> None:
        self._engine = engine
        direction = engine.direction
        assert isinstance(direction, BlockCurvature)
        self._direction = direction
        self._host = host = direction.copy_blocks()
        self._threaded = periods.where == "async"
        self._max_staleness = periods.inverse_period
        self._executor: ThreadPoolExecutor | None = None
        # Set while training waits for the thread, which then hurries.
        self._awaited = threading.Event()
        self._running: Future[Refreshed] | None = None
        # Of the refresh under way: step and damping, and the count of
        # refreshes when it began.
        self._asked_at = 0
        self._damping: tf.Tensor | None = None
        self._refreshes = 0
        with tf.device("CPU:0"):
            last = max(i for entry in host.entries for i in entry.variables)
            host.build([str(i) for i in range(last + 1)], self._add_variable)

    def after_step(self) -> None:
        """Does what is due; called between two steps, outside any graph."""
        step = int(self._engine.iterations)
        state = self._engine.state
        asked = bool(state.refresh_asked.numpy())
        overdue = step - self._asked_at >= self._max_staleness
        if self._running is not None:
            if asked or overdue or self._running.done():
                self.finish()
        if not asked:
            return
        state.refresh_asked.assign(0)
        self._start(step)
        if not self._threaded:
            self.finish()

    def finish(self) -> None:
        """Waits for a refresh that is under way, and takes its inverses.

        They are dropped where the step's graph has refreshed the inverses
        since, as it does after a step that was taken back.
        """
        if self._running is None:
            return
        self._awaited.set()
        result = self._running.result()
        self._running = None
        state = self._engine.state
        if int(state.count("refreshes")) != self._refreshes:
            return
        for own, host in self._pairs():
            own.block.copy_inverse(host.block)
        state.inverted_at.assign(self._damping)
        state.increment(
            refreshes=1, retries=result.retries, failures=result.failures
        )

    def _start(self, step: int) -> None:
        """Copies the statistics and begins with their inverses."""
        engine = self._engine
        for own, host in self._pairs():
            host.block.copy_statistics(own.block)
            # What a failed factorisation leaves in place.
            host.block.copy_inverse(own.block)
        self._damping = damping = tf.identity(engine.inverse_damping())
        self._asked_at = step
        self._refreshes = int(engine.state.count("refreshes"))
        if self._threaded:
            self._awaited.clear()
            if self._executor is None:
                self._executor = ThreadPoolExecutor(1, "keras_natgrad_refresh")
            self._running = self._executor.submit(self._refresh, damping)
            return
        self._running = Future()
        self._running.set_result(self._refresh(damping))

    def _refresh(self, damping: tf.Tensor) -> Refreshed:
        host = self._host
        retries = failures = 0
        with tf.device("CPU:0"):
            dampings, ratio = host.refresh_arguments(
                damping, self._direction.ridge
            )
            for stack, own in zip(host.stacks, dampings, strict=True):
                started = time.perf_counter()
                more_retries, more_failures = stack.block.refresh(own, ratio)
                retries += int(more_retries)
                failures += int(more_failures)
                if self._threaded:
                    self._pause(time.perf_counter() - started)
        return Refreshed(retries, failures)

    def _pause(self, seconds: float) -> None:
        """Waits after a block that took so long, unless training does.

        The steps that go on meanwhile want the same cores: pauses spread the
        work over them.
        """
        if seconds > _FELT:
            self._awaited.wait(min(_REST * seconds, _LONGEST_PAUSE))

    def _pairs(self) -> list[tuple[Any, Any]]:
        own = self._direction.blocks.stacks
        return list(zip(own, self._host.stacks, strict=True))

    def _add_variable(
        self, name: str, shape: tuple[int, ...], initializer: str
    ) -> Any:
        # Not the optimizer's: it is no state, and is not saved.
        return keras.Variable(
            initializer,
            shape,
            self._engine.state.damping.dtype,
            trainable=False,
            name=name,
        )
