"""Momentum that keeps what the batch says nothing about."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import keras
import tensorflow as tf

from keras_natgrad.checks import is_number
from keras_natgrad.step.coefficients import QuadraticForm
from keras_natgrad.step.direction import Vector
from keras_natgrad.step.quadratic import QuadraticStep
from keras_natgrad.step.rule import FixedStep, Needs, Situation, StepRule


@keras.saving.register_keras_serializable(package="keras_natgrad")
@dataclass(frozen=True)
class Spring:
    r"""SPRING momentum for optimizers that precondition layer by layer.

    The update is `−α φ` with

        (F + λI) φ = ∇ + λ μ φ₋₁,

    which pulls φ towards `μ φ₋₁` instead of zero: directions whose curvature
    is below the damping λ keep the momentum μ, the others forget. `(F + λI)⁻¹`
    is the preconditioner, which must damp: without damping nothing is kept.
    The damping of a Kronecker product, split over its factors, exceeds λ where
    one factor is large, and so forgets more.

    Args:
        momentum: μ, in (0, 1). Defaults to `0.9`.

    Raises:
        ValueError: If `momentum` is out of range.

    Example:

    ```python
    optimizer = keras_natgrad.KFAC(
        learning_rate=0.1, momentum=keras_natgrad.Spring(0.9), damping=1e-3
    )
    ```

    References:
        - Goldshlager, Abrahamsen & Lin, 2024, arXiv:2401.10190.
    """

    momentum: float = 0.9

    def __post_init__(self) -> None:
        if not is_number(self.momentum) or not 0 < self.momentum < 1:
            raise ValueError(
                "`momentum` of SPRING must be in (0, 1). "
                f"Received: momentum={self.momentum!r}"
            )

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        return asdict(self)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Spring:
        """Recreates the rule from `get_config`."""
        return cls(**config)


@dataclass(frozen=True)
class SpringStep(StepRule):
    """Steps along a direction that keeps the momentum of `Spring`.

    Args:
        kept: μ of SPRING.
        inner: `FixedStep` or `QuadraticStep` that gives α; it has no momentum
            of its own.
    """

    kept: float
    inner: FixedStep | QuadraticStep

    @property
    def spring(self) -> float:
        """μ of SPRING."""
        return self.kept

    @property
    def needs(self) -> Needs:
        """What the inner rule needs, and the last update."""
        return self.inner.needs._replace(update=True)

    def pull(
        self, memory: Any, gradient: Vector, situation: Situation
    ) -> Vector:
        """Returns `∇ + λ μ D φ₋₁`, D the metric of the damping.

        The last update is −α φ₋₁; it is zero if it was taken back.
        """
        state = situation.state
        pull = -tf.math.divide_no_nan(
            self.kept * state.inverted_at.value,
            state.last("learning_rate"),
        )
        assert situation.last is not None
        kept = situation.here.in_metric(situation.last)
        return [g + pull * v for g, v in zip(gradient, kept, strict=True)]

    def coefficients(
        self,
        memory: Any,
        direction: Vector,
        form: QuadraticForm | None,
        situation: Situation,
    ) -> tf.Tensor:
        """Returns (α, 0)."""
        return self.inner.coefficients(memory, direction, form, situation)
