"""Optimizers that take back a step after which the loss surges."""

from __future__ import annotations

from typing import Any

import tensorflow as tf
from typing_extensions import override

from keras_natgrad import _compat, replicas
from keras_natgrad.linalg import scalar
from keras_natgrad.optimizers.adaptive import AdaptiveOptimizer
from keras_natgrad.optimizers.observation import Observation
from keras_natgrad.step import LevenbergMarquardt
from keras_natgrad.step.guard import loss_before

# Factor of the damping after a step that made the loss surge. It is squared
# after a second one in a row, and cubed after a third: where the damping starts
# many orders too low, as in deep networks without normalisation, a fixed factor
# would spend a step on each order.
_RETRACTION = 10.0
_MOST_SURGES = 3


class RetractingOptimizer(AdaptiveOptimizer):
    """Base class of optimizers with the guard of `step.guard`.

    The guard works with an adaptive damping only.
    """

    _velocities: list[Any]

    @override
    def has_surged(self, observation: Observation) -> tf.Tensor:
        if not self._guarded:
            return tf.constant(False)
        guard, loss = self.state.guard, observation.loss
        surge = guard.is_surge(loss) & observation.is_usable
        objective = observation.tape.objective
        if objective is not None:
            before = tf.cond(
                surge,
                lambda: tf.cast(
                    loss_before(
                        objective,
                        _compat.optimizer_variables(self),
                        self._velocities,
                    ),
                    loss.dtype,
                ),
                lambda: tf.zeros_like(loss),
            )
            before = replicas.sum_over_replicas(before)
            surge &= guard.is_blamed(loss, before)
        # One batch that is not finite has bad data; a second one in a row
        # says that the weights are bad.
        again = ~observation.is_finite & self.state.skipped_last()
        return tf.cond(
            surge | again, self._has_moved, lambda: tf.constant(False)
        )

    def _has_moved(self) -> tf.Tensor:
        """Returns whether there is a last step that could be taken back."""
        steps = [tf.convert_to_tensor(each) for each in self._velocities]
        return tf.reduce_any([tf.reduce_any(step != 0) for step in steps])

    @override
    def skip_step(self, observation: Observation) -> None:
        self.state.note_skip(observation.surged, ~observation.is_finite)
        if not self._guarded:
            return

        def retract() -> tf.Tensor:
            variables = _compat.optimizer_variables(self)
            for variable, velocity in zip(
                variables, self._velocities, strict=True
            ):
                step = tf.convert_to_tensor(velocity)
                variable.value.assign_sub(tf.cast(step, variable.dtype))
                velocity.assign(tf.zeros_like(step))
            damping = self.state.damping.value
            surges = tf.minimum(self.state.add_surge(), _MOST_SURGES)
            factor = scalar(_RETRACTION, damping.dtype) ** tf.cast(
                surges, damping.dtype
            )
            self.state.damping.assign(factor * damping)
            self.state.refresh_at.assign(0)
            return tf.constant(0)

        tf.cond(observation.surged, retract, lambda: tf.constant(0))

    @property
    def _guarded(self) -> bool:
        """Whether a bad step is taken back: with an adaptive damping only."""
        adaptive = isinstance(self.damping, LevenbergMarquardt)
        return adaptive and bool(self._velocities)
