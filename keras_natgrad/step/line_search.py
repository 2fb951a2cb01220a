"""The length of a step by trying powers of two."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import keras
import tensorflow as tf

from keras_natgrad.checks import check_period, is_number
from keras_natgrad.step.coefficients import Decision, QuadraticForm
from keras_natgrad.step.direction import Vector
from keras_natgrad.step.rule import Needs, Situation, StepRule
from keras_natgrad.step.state import StateFactory
from keras_natgrad.step.trial import TrialStep


@keras.saving.register_keras_serializable(package="keras_natgrad")
@dataclass(frozen=True)
class LineSearch:
    """Tries the learning rates `largest · 2⁰, 2⁻¹, …` on the batch.

    The loss of the batch is evaluated at each, from the largest down, until
    it rises again after it was below the loss before the step. The best rate
    is taken; where none lowers the loss, the smallest one.

    Args:
        largest: First rate.
        halvings: Most halvings.

    Raises:
        ValueError: If an argument is not positive.
    """

    largest: float = 1.0
    halvings: int = 30

    def __post_init__(self) -> None:
        if not is_number(self.largest) or not self.largest > 0:
            raise ValueError(
                "`largest` must be positive. "
                f"Received: largest={self.largest!r}"
            )
        check_period("halvings", self.halvings)

    def search(
        self, evaluate: Callable[[tf.Tensor], tf.Tensor], loss: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns the best rate and its loss.

        Args:
            evaluate: Returns the loss at a rate, a scalar tensor.
            loss: The loss before the step.
        """
        infinity = tf.constant(float("inf"), loss.dtype)
        first = tf.constant(self.largest, loss.dtype)

        def going(
            count: tf.Tensor, rate: tf.Tensor, best: tf.Tensor, last: tf.Tensor
        ) -> tf.Tensor:
            passed = (best < loss) & (last > best)
            return (count <= self.halvings) & ~passed

        def body(
            count: tf.Tensor, rate: tf.Tensor, best: tf.Tensor, last: tf.Tensor
        ) -> tuple[tf.Tensor, ...]:
            trial = first * tf.pow(
                tf.constant(0.5, loss.dtype), tf.cast(count, loss.dtype)
            )
            value = tf.cast(evaluate(trial), loss.dtype)
            value = tf.where(tf.math.is_finite(value), value, infinity)
            better = value < best
            return (
                count + 1,
                tf.where(better | (best >= loss), trial, rate),
                tf.minimum(value, best),
                value,
            )

        _, rate, best, _ = tf.while_loop(
            going,
            body,
            (tf.constant(0), tf.zeros_like(loss), infinity, infinity),
        )
        return rate, best

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        return asdict(self)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> LineSearch:
        """Recreates the rule from `get_config`."""
        return cls(**config)


@dataclass(frozen=True)
class SearchedStep(StepRule):
    """Another rule, with the rate that a `LineSearch` finds along Δ.

    The search is made before any momentum is added, and its rate multiplies
    that of the optimizer.

    Args:
        search: `LineSearch`.
        inner: The rule that gets the rate.
    """

    search: LineSearch
    inner: StepRule

    @property
    def needs(self) -> Needs:
        """What the inner rule needs, and the loss at other weights."""
        return self.inner.needs._replace(objective=True)

    @property
    def spring(self) -> float:
        """That of the inner rule."""
        return self.inner.spring

    def build(self, shapes: Sequence[Any], factory: StateFactory) -> Any:
        """Creates what the inner rule remembers."""
        return self.inner.build(shapes, factory)

    def pull(
        self, memory: Any, gradient: Vector, situation: Situation
    ) -> Vector:
        """Returns what the inner rule makes of the gradient."""
        return self.inner.pull(memory, gradient, situation)

    def direct(
        self, memory: Any, solved: Vector, situation: Situation
    ) -> Vector:
        """Returns the direction of the inner rule."""
        return self.inner.direct(memory, solved, situation)

    def coefficients(
        self,
        memory: Any,
        direction: Vector,
        form: QuadraticForm | None,
        situation: Situation,
    ) -> tf.Tensor:
        """Returns the coefficients of the inner rule at the best rate."""
        situation = self._searched(direction, situation)
        return self.inner.coefficients(memory, direction, form, situation)

    def decide(
        self,
        memory: Any,
        direction: Vector,
        form: QuadraticForm | None,
        situation: Situation,
    ) -> Decision:
        """Returns the decision of the inner rule at the best rate."""
        situation = self._searched(direction, situation)
        return self.inner.decide(memory, direction, form, situation)

    def _searched(self, direction: Vector, situation: Situation) -> Situation:
        """Returns the situation with the best rate along −Δ on the batch."""
        if situation.objective is None:
            return situation
        dtype = direction[0].dtype
        trial = TrialStep(
            situation.variables,
            situation.here.to_tensors(direction),
            situation.objective,
        )
        loss = tf.cast(situation.loss, dtype)
        found, _ = self.search.search(trial.evaluate, loss)
        trial.take_back(tf.constant(True))
        return replace(situation, learning_rate=situation.learning_rate * found)
