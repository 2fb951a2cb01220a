"""The scalars of an optimizer: damping, last step, counters."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from keras_natgrad.step.guard import SurgeGuard

#: Scalars of the last step, in the order of the saved vector.
STATISTICS = (
    "reduction_ratio",
    "model_change",
    "learning_rate",
    "momentum",
)

#: Counters, in the order of the saved vector.
COUNTERS = (
    "batches",
    "curvature_updates",
    "refreshes",
    "retries",
    "failures",
    "skipped",
    "retracted",
)


class StepState:
    """Saved scalars, packed so that a step writes few variables.

    Args:
        add_curvature_variable: `VariableFactory` of the curvature's dtype.
        add_variable: The optimizer's `add_variable`.
    """

    def __init__(self, add_curvature_variable: Any, add_variable: Any) -> None:
        self.damping = add_curvature_variable("damping", (), "zeros")
        # Factor of a constant or scheduled damping, and of an adaptive one
        # where it starts.
        self.damping_scale = add_curvature_variable("damping_scale", (), "ones")
        self._last = add_curvature_variable(
            "statistics", (len(STATISTICS),), "zeros"
        )
        self._counters = add_variable(
            shape=(len(COUNTERS),),
            initializer="zeros",
            dtype="int32",
            name="counters",
        )

        # Steps at which statistics and inverses are renewed next, and whether
        # the graph has asked for a refresh that happens outside of it.
        self.update_at, self.refresh_at, self.refresh_asked = (
            add_variable(
                shape=(), initializer="zeros", dtype="int32", name=name
            )
            for name in ("update_at", "refresh_at", "refresh_asked")
        )

        # Whether the last batch was skipped, and the guard's averages.
        self._skipped_last = add_variable(
            shape=(), initializer="zeros", dtype="int32", name="skipped_last"
        )
        # Steps taken back without one in between that held.
        self._surges = add_variable(
            shape=(), initializer="zeros", dtype="int32", name="surges"
        )
        self.guard = SurgeGuard(add_curvature_variable)

    def skipped_last(self) -> tf.Tensor:
        """Returns whether no step was made on the last batch."""
        return tf.equal(self._skipped_last.value, 1)

    def note_skip(self, retracted: tf.Tensor, bad: tf.Tensor) -> None:
        """Counts a bad batch, or a step taken back.

        Args:
            retracted: Scalar bool: the last step is taken back.
            bad: Scalar bool: loss or gradients are not finite, or targets
                impossible. A batch whose weights are all zero is not bad.
        """
        back = tf.cast(retracted, tf.int32)
        skipped = tf.cast(bad, tf.int32) * (1 - back)
        self.increment(skipped=skipped, retracted=back)
        self._skipped_last.assign(
            tf.where(bad | retracted, skipped, self._skipped_last.value)
        )

    def add_surge(self) -> tf.Tensor:
        """Counts a step taken back; returns how many there were in a row."""
        self._surges.assign_add(1)
        return self._surges.value

    def end_surges(self, held: tf.Tensor) -> None:
        """Starts the count anew where a step has held."""
        kept = tf.where(held, 0, self._surges.value)
        self._surges.assign(kept)

    def count(self, name: str) -> tf.Tensor:
        """Returns one counter, an int32 scalar."""
        return self._counters.value[COUNTERS.index(name)]

    def last(self, name: str) -> tf.Tensor:
        """Returns one scalar of the last step."""
        return self._last.value[STATISTICS.index(name)]

    def increment(self, **amounts: int | tf.Tensor) -> None:
        """Adds to counters by name."""
        change = [tf.cast(amounts.get(name, 0), tf.int32) for name in COUNTERS]
        self._counters.assign(self._counters.value + tf.stack(change))

    def note(self, **values: tf.Tensor) -> None:
        """Overwrites scalars of the last step by name."""
        self._skipped_last.assign(0)
        last = tf.unstack(self._last.value)
        new = [
            tf.cast(values.get(name, old), self._last.dtype)
            for name, old in zip(STATISTICS, last, strict=True)
        ]
        self._last.assign(tf.stack(new))

    def to_tensors(self) -> dict[str, tf.Tensor]:
        """Returns everything by name, as float32 scalars."""
        last = tf.unstack(self._last.value)
        counters = tf.unstack(self._counters.value)
        named = {
            "damping": self.damping.value,
            **dict(zip(STATISTICS, last, strict=True)),
            **dict(zip(COUNTERS, counters, strict=True)),
        }
        return {
            name: tf.identity(tf.cast(value, tf.float32))
            for name, value in named.items()
        }

    def to_dict(self) -> dict[str, float]:
        """Returns everything by name, as Python numbers."""
        last = self._last.numpy().tolist()
        counters = self._counters.numpy().tolist()
        return {
            "damping": float(self.damping.numpy()),
            **dict(zip(STATISTICS, last, strict=True)),
            **dict(zip(COUNTERS, counters, strict=True)),
        }
