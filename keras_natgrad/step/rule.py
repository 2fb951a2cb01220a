"""Step rules: how far to go along the preconditioned gradient."""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from keras_natgrad.step.coefficients import Decision, QuadraticForm
from keras_natgrad.step.direction import LocalDirection, Vector
from keras_natgrad.step.state import StateFactory, StepState


@dataclass(frozen=True)
class Situation:
    """What a step rule may look at.

    Attributes:
        here: `LocalDirection`, the curvature at the batch.
        learning_rate: Scalar, that of the optimizer.
        last: The last update δ₋₁ as a `Vector`; `None` unless the rule keeps
            it.
        loss: Scalar, the loss of the batch before the step.
        objective: Returns the loss of the batch at the current weights, or
            `None` if nobody has said how.
        variables: `keras.Variable`s.
        state: `StepState`.
    """

    here: LocalDirection
    learning_rate: tf.Tensor
    last: Vector | None
    loss: tf.Tensor
    objective: Callable[[], Any] | None
    variables: Sequence[Any]
    state: StepState


class Needs(NamedTuple):
    """What a step rule asks of the engine.

    Attributes:
        model: The quadratic model of the loss.
        objective: The loss of the batch at other weights.
        update: The last update δ₋₁, which is then kept.
        along_update: The quadratic model along δ₋₁ too.
        parts: The quadratic model along the parts of the direction.
    """

    model: bool = False
    objective: bool = False
    update: bool = False
    along_update: bool = False
    parts: bool = False


class StepRule(abc.ABC):
    """Decides on the update `δ = −α Δ + μ δ₋₁` of one step.

    A rule is a frozen dataclass of its settings. It gets three looks at a
    step, in this order:

    1. `pull(memory, gradient, situation)`, before the gradient is
       preconditioned;
    2. `direct(memory, solved, situation)`, which returns the direction Δ;
       by default the preconditioned gradient P∇ as it is;
    3. `coefficients(memory, solved, form, situation)`, which returns α and μ.

    What it must remember lives in variables that `build` creates; each look
    gets them back as `memory`.
    """

    @property
    def needs(self) -> Needs:
        """What the engine has to provide."""
        return Needs()

    @property
    def spring(self) -> float:
        """μ of SPRING, which is part of the direction; zero for none."""
        return 0.0

    def build(self, shapes: Sequence[Any], factory: StateFactory) -> Any:
        """Creates what the rule remembers.

        Args:
            shapes: Shapes of the variables.
            factory: `StateFactory`, which names and saves variables.
        """
        return None

    def pull(
        self, memory: Any, gradient: Vector, situation: Situation
    ) -> Vector:
        """Returns what is preconditioned in place of the gradient."""
        return gradient

    def direct(
        self, memory: Any, solved: Vector, situation: Situation
    ) -> Vector:
        """Returns the direction Δ, of the form of P∇."""
        return solved

    @abc.abstractmethod
    def coefficients(
        self,
        memory: Any,
        direction: Vector,
        form: QuadraticForm | None,
        situation: Situation,
    ) -> tf.Tensor:
        """Returns the learning rates and the momentum.

        Args:
            memory: What `build` returned.
            direction: Δ.
            form: The quadratic model, if anything asks for it.
            situation: `Situation`.

        Returns:
            Tensor `[2]`, (α, μ), or `[parts + 1]` with an α for each part.
        """

    def decide(
        self,
        memory: Any,
        direction: Vector,
        form: QuadraticForm | None,
        situation: Situation,
    ) -> Decision:
        """Returns the coefficients, bounded, with the model's promise."""
        found = self.coefficients(memory, direction, form, situation)
        if form is None:
            return Decision(found, found[0])
        return form.common.decide(found)

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        names = getattr(self, "__dataclass_fields__", {})
        return {name: getattr(self, name) for name in names}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> StepRule:
        """Recreates the rule from `get_config`."""
        return cls(**config)


@keras.saving.register_keras_serializable(package="keras_natgrad")
@dataclass(frozen=True)
class FixedStep(StepRule):
    """The optimizer's learning rate and a fixed momentum.

    Args:
        momentum: μ, in [0, 1).
    """

    momentum: float = 0.0

    @property
    def needs(self) -> Needs:
        """The last update, if there is any momentum."""
        moving = self.momentum != 0
        return Needs(update=moving, along_update=moving)

    def coefficients(
        self,
        memory: Any,
        direction: Vector,
        form: QuadraticForm | None,
        situation: Situation,
    ) -> tf.Tensor:
        """Returns (α, μ)."""
        rate = situation.learning_rate
        return tf.stack([rate, tf.constant(self.momentum, rate.dtype)])
