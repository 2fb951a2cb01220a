"""When statistics and inverses are renewed."""

from __future__ import annotations

from dataclasses import dataclass

import tensorflow as tf

from keras_natgrad.checks import check_period, is_number

#: Where inverses may be refreshed.
PLACES = ("graph", "host", "async")


@dataclass(frozen=True)
class Refresh:
    """Periods of the statistics and of the inverses, and their warm-up.

    Curvature changes fastest at the start. With a `growth` the gap after
    step t is `growth · t` steps, at least one and at most the period, so that
    everything is renewed at every step first and at its period in the end.

    Attributes:
        curvature_period: Steps between updates of the statistics.
        inverse_period: Steps between refreshes of the inverses.
        growth: Gap per step so far, or `None` to keep to multiples of the
            periods from the start.
        where: `"graph"` refreshes inverses in the step's graph, `"host"`
            between two steps, `"async"` while the next steps run.
    """

    curvature_period: int
    inverse_period: int
    growth: float | None = None
    where: str = "graph"

    def __post_init__(self) -> None:
        for field, name in (
            ("curvature_period", "curvature_update_period"),
            ("inverse_period", "inverse_update_period"),
        ):
            period = check_period(name, getattr(self, field))
            object.__setattr__(self, field, period)
        growth = self.growth
        if growth is not None and not (is_number(growth) and growth > 0):
            raise ValueError(
                "`refresh_growth` must be a positive number or None. "
                f"Received: refresh_growth={self.growth!r}"
            )
        if self.where not in PLACES:
            raise ValueError(
                f"`refresh_where` must be one of {PLACES}. "
                f"Received: refresh_where={self.where!r}"
            )

    def is_due(self, step: tf.Tensor, due_at: tf.Tensor) -> tf.Tensor:
        """Returns whether a renewal due at `due_at` happens at this step."""
        return step >= tf.cast(due_at, step.dtype)

    def next_due(self, step: tf.Tensor, period: int) -> tf.Tensor:
        """Returns the step of the next renewal, after one at `step`.

        Args:
            step: Scalar integer, counted from zero.
            period: The period that the gap grows to.

        Returns:
            int32 scalar.
        """
        step = tf.cast(step, tf.int32)
        if self.growth is None:
            return (step // period + 1) * period
        grown = tf.cast(self.growth * tf.cast(step, tf.float32), tf.int32)
        return step + tf.clip_by_value(grown, 1, period)


def is_multiple(step: tf.Tensor, period: int) -> tf.Tensor:
    """Returns whether a step is a multiple of a period."""
    return tf.equal(tf.math.floormod(step, tf.constant(period, step.dtype)), 0)
