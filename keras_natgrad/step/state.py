"""The scalars of an optimizer: damping, last step, counters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import tensorflow as tf

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


class StateFactory(NamedTuple):
    """How the parts of an optimizer create their saved variables.

    Attributes:
        add: Creates a variable from (name, shape, initializer), in the dtype
            of the curvature: float64 for a float64 model, else float32.
        add_sum: The same for the sum of a part on every replica.
        add_integer: Creates an int32 variable from (name, shape).
    """

    add: Callable[..., Any]
    add_sum: Callable[..., Any]
    add_integer: Callable[..., Any]


class StepState:
    """Saved scalars, packed so that a step writes few variables.

    Args:
        factory: `StateFactory`.
    """

    def __init__(self, factory: StateFactory) -> None:
        self.damping = factory.add("damping", (), "zeros")
        # Factor of a constant or scheduled damping, and of an adaptive one
        # at its start.
        self.damping_scale = factory.add("damping_scale", (), "ones")
        #: The damping λ that the inverses in use were computed with.
        self.inverted_at = factory.add("inverted_at", (), "zeros")
        self._last = factory.add("statistics", (len(STATISTICS),), "zeros")
        self._counters = factory.add_integer("counters", (len(COUNTERS),))
        # Steps at which statistics and inverses are renewed next, and whether
        # the graph has asked for a refresh that happens outside of it.
        self.update_at = factory.add_integer("update_at", ())
        self.refresh_at = factory.add_integer("refresh_at", ())
        self.refresh_asked = factory.add_integer("refresh_asked", ())
        # Whether the inverses must be renewed before they are used again: 0
        # before the first refresh, after a step that was taken back, and after
        # `raise_damping`.
        self._inverses_valid = factory.add_integer("inverses_valid", ())
        # Whether the last batch was skipped.
        self._skipped_last = factory.add_integer("skipped_last", ())
        # Whether there is a last step that could be taken back.
        self._moved = factory.add_integer("moved", ())
        # Steps taken back without one in between that held.
        self._surges = factory.add_integer("surges", ())

    def inverses_stale(self) -> tf.Tensor:
        """Returns whether the inverses must be renewed before the next use."""
        return tf.equal(self._inverses_valid.value, 0)

    def mark_inverses(self, stale: bool) -> None:
        """Says whether the inverses must be renewed before the next use."""
        self._inverses_valid.assign(int(not stale))

    def has_moved(self) -> tf.Tensor:
        """Returns whether there is a last step that could be taken back."""
        return tf.equal(self._moved.value, 1)

    def note_move(self, coefficients: tf.Tensor) -> None:
        """Notes a step, unless it is zero because of its coefficients.

        Args:
            coefficients: The learning rates, then the momentum.
        """
        steps = tf.cast(tf.not_equal(coefficients, 0), tf.int32)
        # Momentum continues a step only if there was one.
        rates, momentum = tf.split(steps, [int(steps.shape[0]) - 1, 1])
        moved = tf.maximum(
            tf.reduce_max(rates), momentum[0] * self._moved.value
        )
        self._moved.assign(moved)

    def note_return(self) -> None:
        """Notes that the last step was taken back."""
        self._moved.assign(0)

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
