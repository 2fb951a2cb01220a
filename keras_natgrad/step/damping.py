"""Damping: constant, scheduled, or adapted to how good the model is."""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import keras
import tensorflow as tf
from keras.optimizers.schedules import LearningRateSchedule

from keras_natgrad import replicas
from keras_natgrad.checks import (
    check_period,
    check_positive,
    is_number,
)
from keras_natgrad.linalg import scalar
from keras_natgrad.step.guard import SurgeGuard


class DampingState(NamedTuple):
    """What a damping rule is told at every step.

    Attributes:
        value: Scalar λ of the last step, zero before the first.
        factor: Scalar, the product of the factors of `raise_damping`.
        iterations: Steps so far.
        raised: Scalar bool: λ was raised since the last step.
        typical: Returns a typical eigenvalue of the Fisher, a scalar. Costs
            little, and nothing where it is not called.
    """

    value: tf.Tensor
    factor: tf.Tensor
    iterations: Any
    raised: tf.Tensor
    typical: Callable[[], tf.Tensor]


class Damping(abc.ABC):
    """The damping λ of `(F + λI)⁻¹`, step by step."""

    #: Whether it adapts to how good the quadratic model is.
    adapts = False
    #: Steps between adaptations.
    period = 1
    #: Damping of the inverses over that of the quadratic model.
    inverse_ratio = 1.0
    #: What takes bad steps back, or `None`. Needs a damping that adapts.
    guard: SurgeGuard | None = None

    @property
    def is_zero(self) -> bool:
        """Whether λ is zero at all times."""
        return False

    @abc.abstractmethod
    def value(self, state: DampingState) -> tf.Tensor:
        """Returns λ of this step, a scalar of the dtype of `state.value`."""

    def adapt(
        self,
        damping: tf.Tensor,
        ratio: tf.Tensor,
        share: tf.Tensor,
        mean_eigenvalue: tf.Tensor,
    ) -> tf.Tensor:
        """Returns λ after a reduction ratio, see `LevenbergMarquardt`."""
        return damping

    @abc.abstractmethod
    def to_config(self) -> Any:
        """Returns what `get` makes the rule of, for a saved config."""


@dataclass(frozen=True)
class ConstantDamping(Damping):
    """The same λ at every step.

    Args:
        constant: λ, non-negative.
    """

    constant: float

    @property
    def is_zero(self) -> bool:
        """Whether λ is zero at all times."""
        return self.constant == 0.0

    def value(self, state: DampingState) -> tf.Tensor:
        """Returns λ, times the factor of `raise_damping`."""
        return self.constant * state.factor

    def to_config(self) -> float:
        """Returns λ."""
        return self.constant


@dataclass(frozen=True)
class ScheduledDamping(Damping):
    """λ as a function of the iteration.

    Args:
        schedule: `keras.optimizers.schedules.LearningRateSchedule`.
    """

    schedule: LearningRateSchedule

    def value(self, state: DampingState) -> tf.Tensor:
        """Returns λ, times the factor of `raise_damping`."""
        scheduled = self.schedule(state.iterations)
        return tf.cast(scheduled, state.factor.dtype) * state.factor

    def to_config(self) -> Any:
        """Returns the serialized schedule."""
        return keras.saving.serialize_keras_object(self.schedule)


@keras.saving.register_keras_serializable(package="keras_natgrad")
@dataclass(frozen=True)
class LevenbergMarquardt(Damping):
    """Adapts the damping to the reduction ratio.

    Every `period` steps the loss is evaluated again on the same batch, and

        ρ = (f(θ + δ) − f(θ)) / M(δ)

    compares the true change with the quadratic model's. With ρ > ¾ the
    damping is multiplied by `decay`, with ρ < ¼ divided by it (Martens &
    Grosse 2015, section 6.5). A damping that holds the step back more than
    the Fisher does, `λ ‖δ‖² > δᵀFδ`, was started too high; with ρ > ¾ it is
    multiplied by `too_high`.

    Args:
        initial: Damping of the first step, or `"auto"`: `relative` times
            a typical eigenvalue of the Fisher on the first batch, which does
            not depend on the scale of the loss. Where outputs are saturated
            and the Fisher is nearly zero, the eigenvalue counts as
            `least_scale` of the gradient.
        decay: Factor per adaptation, in (0, 1).
        period: Steps between adaptations.
        relative: See `initial`.
        minimum: Smallest damping, relative to that eigenvalue.
        maximum: Largest damping, relative to that eigenvalue. `KFAC` holds
            a damping to it too that was raised for a step taken back, or by
            `raise_damping`.
        inverse_ratio: Damping of the inverses relative to that of the
            quadratic model. The model couples the layers, which the inverses
            do not, so that they need less.
        low: ρ below which the damping rises.
        high: ρ above which it falls.
        too_high: Factor per adaptation of a damping that dominates the
            quadratic model, in (0, 1).
        least_scale: Smallest typical eigenvalue at the start, relative to
            `‖∇‖²/f`, see `least_scale`.
        guard: `SurgeGuard`, which takes back a step after which the loss
            surges, or `None`. It needs the last step, which an optimizer
            without any momentum does not keep.

    Raises:
        ValueError: If an argument is out of range.
    """

    initial: float | str = "auto"
    decay: float = 0.77
    period: int = 5
    relative: float = 20.0
    minimum: float = 0.1
    maximum: float = 1e6
    inverse_ratio: float = 0.1
    low: float = 0.25
    high: float = 0.75
    too_high: float = 0.1
    least_scale: float = 5e-6
    guard: SurgeGuard | None = field(default_factory=SurgeGuard)
    adapts = True

    def __post_init__(self) -> None:
        if self.initial != "auto":
            check_positive("initial", self.initial)
        check_positive("relative", self.relative)
        check_positive("inverse_ratio", self.inverse_ratio)
        if not is_number(self.decay) or not 0 < self.decay < 1:
            raise ValueError(
                "`decay` must be between 0 and 1. "
                f"Received: decay={self.decay!r}"
            )
        check_period("period", self.period)
        check_positive("least_scale", self.least_scale)
        if not is_number(self.too_high) or not 0 < self.too_high < 1:
            raise ValueError(
                "`too_high` must be between 0 and 1. "
                f"Received: too_high={self.too_high!r}"
            )
        if not (is_number(self.low) and is_number(self.high)) or not (
            self.low < self.high
        ):
            raise ValueError(
                "`low` must be less than `high`. "
                f"Received: low={self.low!r}, high={self.high!r}"
            )
        numbers = is_number(self.minimum) and is_number(self.maximum)
        if not numbers or not 0 <= self.minimum <= self.maximum:
            raise ValueError(
                "`minimum` must lie between 0 and `maximum`. Received: "
                f"minimum={self.minimum!r}, maximum={self.maximum!r}"
            )

    def start(self, mean_eigenvalue: tf.Tensor) -> tf.Tensor:
        """Returns the damping of the first step."""
        if self.initial == "auto":
            return self.relative * mean_eigenvalue
        return tf.constant(self.initial, mean_eigenvalue.dtype)

    def value(self, state: DampingState) -> tf.Tensor:
        """Starts λ at the first step, and bounds one that was raised.

        Raised for one step after another that was taken back, it would grow
        without end.
        """
        started = state.value > 0

        def bounded() -> tf.Tensor:
            typical = tf.cast(state.typical(), state.value.dtype)
            first = tf.cast(self.start(typical), typical.dtype) * state.factor
            highest = tf.minimum(state.value, self.maximum * typical)
            return tf.where(started, highest, first)

        return replicas.across_replicas(
            lambda: tf.cond(
                ~started | state.raised, bounded, lambda: state.value
            )
        )

    def adapt(
        self,
        damping: tf.Tensor,
        ratio: tf.Tensor,
        share: tf.Tensor,
        mean_eigenvalue: tf.Tensor,
    ) -> tf.Tensor:
        """Returns the damping after seeing a reduction ratio.

        Args:
            damping: Scalar λ.
            ratio: Scalar ρ. A ρ that is not finite raises the damping.
            share: Scalar `δᵀFδ / δᵀ(F + λI)δ`.
            mean_eigenvalue: Scalar, the scale of the bounds.
        """
        decay = scalar(self.decay, damping.dtype)
        good, bad = ratio > self.high, tf.logical_not(ratio >= self.low)
        down = tf.where(share < 0.5, scalar(self.too_high, decay.dtype), decay)
        factor = tf.where(good, down, tf.where(bad, 1 / decay, 1.0))
        # The bounds are the factor's: where the Fisher is nearly zero, the
        # damping may have started above them.
        adapted = tf.clip_by_value(
            damping * factor,
            self.minimum * mean_eigenvalue,
            tf.maximum(self.maximum * mean_eigenvalue, damping),
        )
        return tf.where(tf.equal(factor, 1.0), damping, adapted)

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        config = {each.name: getattr(self, each.name) for each in fields(self)}
        if self.guard is not None:
            config["guard"] = keras.saving.serialize_keras_object(self.guard)
        return config

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> LevenbergMarquardt:
        """Recreates the rule from `get_config`."""
        config = dict(config)
        if isinstance(config.get("guard"), dict):
            guard = keras.saving.deserialize_keras_object(config["guard"])
            config["guard"] = guard
        return cls(**config)

    def to_config(self) -> Any:
        """Returns the serialized rule."""
        return keras.saving.serialize_keras_object(self)


def least_scale(
    gradients: Sequence[tf.Tensor], loss: tf.Tensor, share: float = 5e-6
) -> tf.Tensor:
    """Returns what the first damping takes for a typical eigenvalue at least.

    The Fisher of saturated outputs is zero to rounding, their gradient is not:
    a damping in units of that Fisher would let the first step go anywhere. A
    loss f that cannot fall below zero falls to it along the gradient in a step
    of `f / ‖∇‖²` at most (Polyak 1987); the eigenvalue is never taken for less
    than a tiny part of its reciprocal. Elsewhere it is far above that. Like
    the Fisher it is proportional to the scale of the loss.

    Args:
        gradients: The gradient, a tensor per variable.
        loss: Scalar f.
        share: Part of the reciprocal, `LevenbergMarquardt.least_scale`.
    """
    norm = tf.add_n([tf.reduce_sum(tf.square(each)) for each in gradients])
    loss = tf.abs(tf.cast(loss, norm.dtype))
    return share * tf.math.divide_no_nan(norm, loss)


def get(identifier: Any) -> Damping:
    """Returns a damping rule.

    Args:
        identifier: A non-negative float, a `LearningRateSchedule` of the
            iteration, a `LevenbergMarquardt`, `"auto"` for the default
            `LevenbergMarquardt()`, or the config of one of them.

    Raises:
        ValueError: If it is none of these.
    """
    if identifier == "auto":
        return LevenbergMarquardt()
    if isinstance(identifier, dict):
        return get(keras.saving.deserialize_keras_object(identifier))
    if isinstance(identifier, Damping):
        return identifier
    if isinstance(identifier, LearningRateSchedule):
        return ScheduledDamping(identifier)
    if is_number(identifier) and identifier >= 0:
        return ConstantDamping(float(identifier))
    raise ValueError(
        "`damping` must be 'auto', a non-negative float, a "
        "keras.optimizers.schedules.LearningRateSchedule or a "
        f"keras_natgrad.LevenbergMarquardt. Received: damping={identifier!r}"
    )
