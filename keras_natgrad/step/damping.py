"""Damping: constant, scheduled, or adapted to how good the model is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

import keras
import tensorflow as tf
from keras.optimizers.schedules import LearningRateSchedule

from keras_natgrad.checks import (
    check_period,
    check_positive,
    is_number,
)
from keras_natgrad.linalg import scalar

# Factor per adaptation of a damping that dominates the quadratic model.
_TOO_HIGH = 0.1
# Smallest typical eigenvalue of the Fisher relative to ‖∇‖²/f, see
# `least_scale`.
_LEAST_SCALE = 5e-6


@keras.saving.register_keras_serializable(package="keras_natgrad")
@dataclass(frozen=True)
class LevenbergMarquardt:
    """Adapts the damping to the reduction ratio.

    Every `period` steps the loss is evaluated again on the same batch, and

        ρ = (f(θ + δ) − f(θ)) / M(δ)

    compares the true change with the quadratic model's. With ρ > ¾ the
    damping is multiplied by `decay`, with ρ < ¼ divided by it (Martens &
    Grosse 2015, section 6.5). A damping that holds the step back more than
    the Fisher does, `λ ‖δ‖² > δᵀFδ`, was started too high; with ρ > ¾ it is
    divided by ten.

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
        good, bad = ratio > 0.75, tf.logical_not(ratio >= 0.25)
        down = tf.where(share < 0.5, scalar(_TOO_HIGH, decay.dtype), decay)
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
        return asdict(self)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> LevenbergMarquardt:
        """Recreates the rule from `get_config`."""
        return cls(**config)


def least_scale(gradients: Sequence[tf.Tensor], loss: tf.Tensor) -> tf.Tensor:
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
    """
    norm = tf.add_n([tf.reduce_sum(tf.square(each)) for each in gradients])
    loss = tf.abs(tf.cast(loss, norm.dtype))
    return _LEAST_SCALE * tf.math.divide_no_nan(norm, loss)


Damping: TypeAlias = float | LevenbergMarquardt | LearningRateSchedule


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
    if isinstance(
        identifier,
        (LevenbergMarquardt, LearningRateSchedule),
    ):
        return identifier
    if is_number(identifier) and identifier >= 0:
        return float(identifier)
    raise ValueError(
        "`damping` must be 'auto', a non-negative float, a "
        "keras.optimizers.schedules.LearningRateSchedule or a "
        f"keras_natgrad.LevenbergMarquardt. Received: damping={identifier!r}"
    )
