"""The quadratic model's curvature: how, how often, and its running average."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import keras
import tensorflow as tf

from keras_natgrad.linalg import scalar
from keras_natgrad.step.checks import check_period, is_number
from keras_natgrad.step.refresh import Refresh

# The running average spans a fifth of the steps so far; no gap is longer. With
# few examples estimates are noisy, and the gaps half as long.
_SPAN = 0.2
_LONGEST_GAP = 0.2
_LONGEST_GAP_OF_FEW = 0.1


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
            random cotangents back and looks at 256 examples, drawn by their
            share of the Fisher, at half the cost; a smaller batch gets
            several cotangents per example. Networks with fallback variables
            always use the exact one.
        period: Steps between two computations. The refresh warm-up holds here
            too.
        decay: Largest decay of the running average, in [0, 1). The average
            spans at most a fifth of the steps so far. Zero for none.
        by_layer: Whether an automatic learning rate is one per layer, around
            the best common one and within a factor of three of it
            (`step.length.layer_coefficients`). The estimate of the curvature
            knows the layers' parts without further products. There is one
            rate for all where the model is exact, and on batches of fewer
            than 256 examples (on all replicas), whose slopes by layer are too
            noisy.

    Raises:
        ValueError: If an argument is out of range.
    """

    kind: str = "estimated"
    period: int = 4
    decay: float = 0.9
    by_layer: bool = True

    def __post_init__(self) -> None:
        if self.kind not in ("exact", "estimated"):
            raise ValueError(
                "`kind` must be 'exact' or 'estimated'. "
                f"Received: kind={self.kind!r}"
            )
        check_period("period", self.period)
        if not isinstance(self.by_layer, bool):
            raise ValueError(
                "`by_layer` must be True or False. "
                f"Received: by_layer={self.by_layer!r}"
            )
        if not is_number(self.decay) or not 0 <= self.decay < 1:
            raise ValueError(
                f"`decay` must be in [0, 1). Received: decay={self.decay!r}"
            )

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        return asdict(self)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> QuadraticModel:
        """Recreates the model from `get_config`."""
        return cls(**config)


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


class AveragedGram:
    """The saved running average of the quotients.

    Args:
        model: `QuadraticModel`.
        refresh: `Refresh`, for its warm-up.
        add_curvature_variable: `VariableFactory` of the curvature's dtype.
        add_variable: The optimizer's `add_variable`.
        add_sum: `VariableFactory` of what is the sum of a part on every
            replica; `add_curvature_variable` without it.
        size: Number of directions.
        name: Prefix of the names of the variables.
    """

    def __init__(
        self,
        model: QuadraticModel,
        refresh: Refresh,
        add_curvature_variable: Any,
        add_variable: Any,
        add_sum: Any = None,
        size: int = 2,
        name: str = "quotient",
    ) -> None:
        self.model = model
        self._refresh = refresh
        # Of δᵀFδ, every replica knows its examples' part.
        add_sum = add_sum or add_curvature_variable
        self._quotients = add_sum(f"{name}s", (size, size), "zeros")
        # A quotient of a direction that was zero has not been seen: each has
        # a weight of its own.
        self._weights = add_curvature_variable(
            f"{name}_weights", (size, size), "zeros"
        )
        self._due_at = add_variable(
            shape=(), initializer="zeros", dtype="int32", name=f"{name}_at"
        )

    def is_due(self, step: tf.Tensor) -> tf.Tensor:
        """Returns whether the curvature is computed at this step."""
        return self._refresh.is_due(step, self._due_at.value)

    def add(
        self,
        gram: tf.Tensor,
        norms: tf.Tensor,
        step: tf.Tensor,
        few: tf.Tensor | bool = False,
    ) -> None:
        """Averages in what one batch says.

        Args:
            gram: Tensor `[size, size]`, Q.
            norms: Tensor `[size]`, the n_i, zero for a direction of zero.
            step: Scalar integer, counted from zero.
            few: Whether the batch has few examples.
        """
        scale = tf.math.reciprocal_no_nan(norms)
        decay = self._decay(step, gram.dtype)
        old, weights = self._quotients.value, self._weights.value
        new = gram * scale * scale[:, tf.newaxis]
        seen = (scale * scale[:, tf.newaxis]) > 0
        # What is not finite would stay in the average.
        seen &= tf.math.is_finite(new)
        self._quotients.assign(
            tf.where(seen, decay * old + (1 - decay) * new, old)
        )
        self._weights.assign(
            tf.where(seen, decay * weights + (1 - decay), weights)
        )
        self._due_at.assign(self._next_due(step, few))

    def read(self, norms: tf.Tensor) -> tf.Tensor:
        """Returns Q for directions of these norms, this replica's part."""
        mean = tf.math.divide_no_nan(self._quotients.value, self._weights.value)
        return mean * norms * norms[:, tf.newaxis]

    def _next_due(self, step: tf.Tensor, few: tf.Tensor | bool) -> tf.Tensor:
        refresh, period = self._refresh, self.model.period
        if refresh.growth is None:
            return refresh.next_due(step, period)
        gaps = (_LONGEST_GAP_OF_FEW, _LONGEST_GAP)
        early, late = (
            replace(refresh, growth=min(refresh.growth, gap)).next_due(
                step, period
            )
            for gap in gaps
        )
        return tf.where(few, early, late)

    def _decay(self, step: tf.Tensor, dtype: tf.DType) -> tf.Tensor:
        updates = tf.cast(step, dtype) / scalar(self.model.period, dtype)
        span = tf.maximum(scalar(_SPAN, dtype) * updates, 1)
        return tf.minimum(1 - 1 / span, scalar(self.model.decay, dtype))
