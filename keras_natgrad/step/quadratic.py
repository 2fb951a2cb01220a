"""The quadratic model of the loss, and the step that minimises it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import keras
import tensorflow as tf

from keras_natgrad.checks import (
    check_integer,
    check_period,
    check_positive,
    is_number,
)
from keras_natgrad.step.coefficients import (
    Decision,
    QuadraticForm,
    for_each_layer,
    layer_coefficients,
    quadratic_coefficients,
)
from keras_natgrad.step.direction import Vector
from keras_natgrad.step.rule import Needs, Situation, StepRule


@keras.saving.register_keras_serializable(package="keras_natgrad")
@dataclass(frozen=True)
class QuadraticModel:
    """How the quadratic model of the loss knows the curvature.

    The model needs `Q_ij = δ_iᵀ F δ_j` for two directions, the preconditioned
    gradient `δ₁ = P∇` and the last update `δ₂`. With a rate for each layer,
    each layer's part of δ₁ is a direction of its own. The quotients

        Q_ij / (n_i n_j),   n₁ = √(∇ᵀP∇),   n₂ = ‖δ₂‖_D

    (D the metric of the damping) change slowly, while those of one batch are
    noisy, and a batch's curvature fits its own gradient too well. They are
    computed every `period` steps only and averaged; `n₁`, `n₂` and the slopes
    are those of the step.

    Args:
        kind: `"exact"` multiplies by the batch's Fisher. `"estimated"` sends
            random cotangents back and looks at some examples, drawn by their
            share of the Fisher, at half the cost; a smaller batch gets
            several cotangents per example. Networks with fallback variables
            always use the exact one.
        period: Steps between two computations. The refresh warm-up holds here
            too.
        decay: Largest decay of the running average, in [0, 1). Zero for
            none.
        by_layer: Whether an automatic learning rate is one per layer, around
            the best common one and within a factor of `spread` of it
            (`step.coefficients.layer_coefficients`). The estimate of the
            curvature knows the layers' parts without further products. There
            is one rate for all where the model is exact, and on batches of
            fewer than `examples` examples (on all replicas), whose slopes by
            layer are too noisy.
        examples: How many examples of a batch an estimate looks at.
        most_estimates: Most estimates on one batch; a batch of fewer examples
            takes several.
        span: The average spans at most this share of the steps so far.
        longest_gap: No gap between two computations is longer than this share
            of the steps so far.
        longest_gap_of_few: The same for batches of fewer than `examples`
            examples, whose estimates are noisy.
        most_momentum: Largest momentum that the model may choose.
        spread: Largest ratio of a layer's rate to the common one, and of that
            to the layer's.

    Raises:
        ValueError: If an argument is out of range.
    """

    kind: str = "estimated"
    period: int = 4
    decay: float = 0.9
    by_layer: bool = True
    examples: int = 256
    most_estimates: int = 4
    span: float = 0.2
    longest_gap: float = 0.2
    longest_gap_of_few: float = 0.1
    most_momentum: float = 1.0
    spread: float = 3.0

    def __post_init__(self) -> None:
        if self.kind not in ("exact", "estimated"):
            raise ValueError(
                "`kind` must be 'exact' or 'estimated'. "
                f"Received: kind={self.kind!r}"
            )
        check_period("period", self.period)
        check_integer("examples", self.examples, 1)
        check_integer("most_estimates", self.most_estimates, 1)
        for name in (
            *("span", "longest_gap", "longest_gap_of_few"),
            *("most_momentum", "spread"),
        ):
            check_positive(name, getattr(self, name))
        if not isinstance(self.by_layer, bool):
            raise ValueError(
                "`by_layer` must be True or False. "
                f"Received: by_layer={self.by_layer!r}"
            )
        if not is_number(self.decay) or not 0 <= self.decay < 1:
            raise ValueError(
                f"`decay` must be in [0, 1). Received: decay={self.decay!r}"
            )

    @property
    def is_averaged(self) -> bool:
        """Whether the curvature is remembered from step to step."""
        return self.period > 1 or self.decay > 0

    def estimates(self, batch: tf.Tensor) -> tf.Tensor:
        """Returns how many estimates a batch of this size takes."""
        return tf.clip_by_value(
            self.examples // tf.maximum(batch, 1), 1, self.most_estimates
        )

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        return asdict(self)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> QuadraticModel:
        """Recreates the model from `get_config`."""
        return cls(**config)


@dataclass(frozen=True)
class QuadraticStep(StepRule):
    """The coefficients that minimise the quadratic model, as far as free.

    Args:
        automatic_rate: Whether the model chooses α; the optimizer's learning
            rate then multiplies it.
        momentum: μ, or `None` if the model chooses it.
        by_part: Whether parts of the direction may have rates of their own.
        most_momentum: Largest μ that the model may choose.
        spread: See `QuadraticModel`.
    """

    automatic_rate: bool = True
    momentum: float | None = None
    by_part: bool = False
    most_momentum: float = 1.0
    spread: float = 3.0

    @property
    def needs(self) -> Needs:
        """The model, and δ₋₁ unless there is no momentum."""
        moving = self.momentum != 0
        return Needs(
            model=True, update=moving, along_update=moving, parts=self.by_part
        )

    def coefficients(
        self,
        memory: Any,
        direction: Vector,
        form: QuadraticForm | None,
        situation: Situation,
    ) -> tf.Tensor:
        """Returns (α, μ)."""
        assert form is not None
        rate = situation.learning_rate
        found = quadratic_coefficients(
            form.common.damped, form.common.slopes, self, rate
        )
        return self._scaled(found, rate)

    def decide(
        self,
        memory: Any,
        direction: Vector,
        form: QuadraticForm | None,
        situation: Situation,
    ) -> Decision:
        """Returns one rate on small batches, and one for each part on others.

        Of few examples, the slopes and quotients by layer are mostly noise: a
        transformer surged on batches of 32 (docs, "a rate for each layer").
        """
        assert form is not None
        parts = form.parts
        if parts is None:
            return super().decide(memory, direction, form, situation)
        rate = situation.learning_rate

        def one_rate() -> Decision:
            common = self.coefficients(memory, direction, form, situation)
            decision = form.common.decide(common)
            return decision._replace(
                coefficients=for_each_layer(
                    decision.coefficients, int(parts.slopes.shape[0]) - 1
                )
            )

        def several_rates() -> Decision:
            found = layer_coefficients(
                parts.damped, parts.slopes, self, rate, form.samples
            )
            return parts.decide(self._scaled(found, rate))

        decided: Decision = tf.cond(form.few, one_rate, several_rates)
        return decided

    def _scaled(self, coefficients: tf.Tensor, rate: tf.Tensor) -> tf.Tensor:
        if not self.automatic_rate:
            return coefficients
        rates = tf.fill([int(coefficients.shape[0]) - 1], rate)
        return coefficients * tf.concat([rates, tf.ones([1], rate.dtype)], 0)


def get(identifier: Any) -> QuadraticModel:
    """Returns a quadratic model.

    Args:
        identifier: A `QuadraticModel`, its config, `"estimated"` for the
            default one, or `"exact"` for the one of the literature: that of
            each batch, at every step.

    Raises:
        ValueError: If it is none of these.
    """
    if isinstance(identifier, dict):
        identifier = keras.saving.deserialize_keras_object(identifier)
    if isinstance(identifier, QuadraticModel):
        return identifier
    if identifier == "estimated":
        return QuadraticModel()
    if identifier == "exact":
        return QuadraticModel("exact", period=1, decay=0.0)
    raise ValueError(
        "`quadratic_model` must be 'exact', 'estimated' or a "
        "keras_natgrad.QuadraticModel. "
        f"Received: quadratic_model={identifier!r}"
    )
