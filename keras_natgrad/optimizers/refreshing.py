"""When cached inverses are renewed in the course of a step, and where."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import tensorflow as tf

from keras_natgrad import replicas
from keras_natgrad.optimizers.host_refresh import HostRefresh
from keras_natgrad.step import Refresh

if TYPE_CHECKING:
    from keras_natgrad.optimizers.engine import Engine


class Refreshing:
    """Renews inverses after a step, for the next ones.

    An inverse that knows the batch it is applied to fits its noise: the
    statistics of a batch serve the next ones. Only inverses that must not be
    used as they are get renewed before a step: at the first one, and after
    one that was taken back.

    Args:
        periods: `Refresh`.
    """

    _engine: Engine
    _traced: Callable[[], tf.Tensor]

    def __init__(self, periods: Refresh) -> None:
        self.periods = periods
        self.host: HostRefresh | None = None

    def build(self, engine: Engine) -> None:
        """Takes the engine whose inverses it renews."""
        self._engine = engine

    @property
    def is_outside(self) -> bool:
        """Whether `between_steps` has something to do."""
        return self.periods.where != "graph"

    def before_statistics(self, accepted: tf.Tensor) -> None:
        """Called before a batch's statistics enter.

        Args:
            accepted: Scalar bool: the batch is one to learn from.
        """

    def before_solving(self, stale: tf.Tensor) -> None:
        """Called before the inverses are used.

        Args:
            stale: Scalar bool: they must not be used as they are.
        """
        # The graph holds the refresh once, for both places.
        self._traced = replicas.traced_once(self._refresh)
        self._refresh_if(stale, self._traced)

    def after_step(self, stale: tf.Tensor) -> None:
        """Called after the step.

        Args:
            stale: What `before_solving` was given.
        """
        state = self._engine.state
        step = tf.convert_to_tensor(self._engine.iterations)
        due = self.periods.is_due(step, state.refresh_at.value) & ~stale
        if self.is_outside:
            self._ask_if(due)
        else:
            self._refresh_if(due, self._traced)

    def now(self) -> None:
        """Renews the inverses from the statistics as they are."""
        self._refresh_if(tf.constant(True), self._refresh)

    def between_steps(self) -> None:
        """Renews the inverses outside the graph, if the step asked for it."""
        if not self.is_outside:
            return
        if self.host is None:
            self.host = HostRefresh(self._engine, self.periods)
        self.host.after_step()

    def _refresh(self) -> tf.Tensor:
        engine = self._engine
        damping = engine.inverse_damping()
        engine.direction.refresh(damping)
        engine.state.inverted_at.assign(damping)
        engine.state.mark_inverses(stale=False)
        self._plan(tf.convert_to_tensor(engine.iterations))
        return tf.constant(0)

    def _plan(self, clock: tf.Tensor) -> None:
        """Sets when the next refresh is due."""
        self._engine.state.refresh_at.assign(
            self.periods.next_due(clock, self.periods.inverse_period)
        )

    def _refresh_if(
        self, due: tf.Tensor, refresh: Callable[[], tf.Tensor]
    ) -> None:
        replicas.across_replicas(
            lambda: tf.cond(due, refresh, lambda: tf.constant(0))
        )

    def _ask_if(self, due: tf.Tensor) -> None:
        """Asks for a refresh between two steps, when it is time."""

        def ask() -> tf.Tensor:
            self._engine.state.refresh_asked.assign(1)
            self._plan(tf.convert_to_tensor(self._engine.iterations))
            return tf.constant(0)

        tf.cond(due, ask, lambda: tf.constant(0))


class RefreshingFirst(Refreshing):
    """Renews inverses from earlier batches, before a batch's statistics enter.

    As RNGD was published. Periods count batches.

    Args:
        periods: `Refresh`.
        identity_start: Whether the averages start at the identity, so that
            there is something to invert before the first batch. Otherwise the
            inverse of the first batch has to do.
    """

    def __init__(self, periods: Refresh, identity_start: bool) -> None:
        super().__init__(periods)
        self.identity_start = identity_start

    def before_statistics(self, accepted: tf.Tensor) -> None:
        """Renews the inverses when it is time."""
        state = self._engine.state
        started = self.identity_start | (state.count("curvature_updates") > 0)
        batches = state.count("batches")
        due = self.periods.is_due(batches, state.refresh_at.value)
        due |= state.inverses_stale()
        self._engine.set_damping(lambda: tf.constant(0.0))
        self._refresh_if(due & started & accepted, self._refresh)

    def after_step(self, stale: tf.Tensor) -> None:
        """Does nothing: the next batch will."""

    def _plan(self, clock: tf.Tensor) -> None:
        super()._plan(self._engine.state.count("batches"))


class NoRefreshing(Refreshing):
    """For directions without cached inverses."""

    def __init__(self) -> None:
        super().__init__(Refresh(1, 1))

    def before_solving(self, stale: tf.Tensor) -> None:
        """Does nothing."""

    def after_step(self, stale: tf.Tensor) -> None:
        """Does nothing."""

    def now(self) -> None:
        """Does nothing."""
