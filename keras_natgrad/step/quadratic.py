"""The quadratic model of the loss: its averaged curvature and its minimum."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import keras
import tensorflow as tf

from keras_natgrad.checks import check_period, is_number
from keras_natgrad.linalg import scalar
from keras_natgrad.step.refresh import Refresh

# Two directions whose normalised Gram determinant is below this are parallel
# to rounding, and the second one is left out.
_PARALLEL = 1e-6
# Largest momentum that the quadratic model may choose.
_MOST_MOMENTUM = 1.0
# Largest ratio of a layer's rate to the common one, and of that to the layer's.
_SPREAD = 3.0


@dataclass(frozen=True)
class StepLength:
    """How the update `δ = α Δ + μ δ₋₁` gets its two coefficients.

    Attributes:
        automatic_rate: α from the quadratic model.
        momentum: μ, or `None` for μ from the quadratic model.
        spring: μ of SPRING, which is part of Δ; zero for none. The momentum is
            zero then.
    """

    automatic_rate: bool
    momentum: float | None
    spring: float = 0.0

    @property
    def needs_model(self) -> bool:
        """Whether any coefficient comes from the quadratic model."""
        return self.automatic_rate or self.momentum is None


def quadratic_coefficients(
    gram: tf.Tensor,
    slopes: tf.Tensor,
    length: StepLength,
    learning_rate: tf.Tensor,
) -> tf.Tensor:
    """Returns (α, μ) that minimise the quadratic model, as far as free.

    The model of the loss change along `c₁ Δ + c₂ δ₋₁` is

        M(c) = bᵀ c + ½ cᵀ Q c,   b = (∇ᵀΔ, ∇ᵀδ₋₁),   Q_ij = δ_iᵀ (F + λI) δ_j

    (Martens & Grosse 2015, section 7). Free coefficients minimise it with
    the given ones held. A previous update of zero (the first step), or one
    parallel to Δ, gets no weight of its own.

    Args:
        gram: Tensor `[2, 2]`, Q.
        slopes: Tensor `[2]`, b.
        length: Which coefficients are free.
        learning_rate: Scalar. The value of α where it is not free.

    Returns:
        Tensor `[2]`.
    """
    rate = tf.cast(learning_rate, gram.dtype)
    if length.automatic_rate and length.momentum is None:
        return _both(gram, slopes)
    if length.automatic_rate:
        momentum = tf.constant(length.momentum, gram.dtype)
        rate = -_divide(slopes[0] + gram[0, 1] * momentum, gram[0, 0])
        return tf.stack([rate, momentum])
    if length.momentum is None:
        momentum = -_divide(slopes[1] + gram[0, 1] * rate, gram[1, 1])
        return tf.stack([rate, momentum])
    return tf.stack([rate, tf.constant(length.momentum, gram.dtype)])


def layer_coefficients(
    gram: tf.Tensor,
    slopes: tf.Tensor,
    length: StepLength,
    learning_rate: tf.Tensor,
    samples: tf.Tensor | float,
) -> tf.Tensor:
    """Returns (α₁, …, α_L, μ): a rate for each layer's part of Δ.

    `quadratic_coefficients` gives the best common α, and μ. Around them each
    layer's rate `α + e_l` minimises

        M(c) + ½ (1 + 2 L/n) Σ_l Q_ll e_l²,

    with the model M of `quadratic_coefficients` along the parts Δ_l and
    δ₋₁. The inverse of each block is right only up to a factor, and does not
    know the other layers; both show in M. The second term, as large as the
    layers' own part in the curvature of M, keeps in check what the few
    examples of a batch say of so many coefficients. Where Q is the mean over n
    samples, the slope of M along one layer has the variance of L others that
    are as large, over n. Wiener's factor for signal and noise in that ratio,
    1/(1 + L/n), is that of e with L/n in the second term. A layer with a part
    of zero has the common rate.

    A layer that is coupled to the others and has little slope of its own may
    still get many times the common rate, or a negative one, which takes it up
    its own gradient. So no rate is outside [α/3, 3α].

    Args:
        gram: Tensor `[L + 1, L + 1]`, Q, with δ₋₁ last.
        slopes: Tensor `[L + 1]`, b.
        length: `StepLength`, with the rate free.
        learning_rate: Scalar.
        samples: n, scalar.

    Returns:
        Tensor `[L + 1]`.
    """
    layers = int(gram.shape[0]) - 1
    common = quadratic_coefficients(
        of_all_layers(gram), of_all_layers(slopes), length, learning_rate
    )
    rates = for_each_layer(common, layers)
    slope = (slopes + tf.linalg.matvec(gram, rates))[:layers]
    own = gram[:layers, :layers]
    # In units of √Q_ll the equations are (Q + k diag Q) e = −slope with a unit
    # diagonal: the matrix has no eigenvalue below k = 1 + 2 L/n.
    unit = tf.math.reciprocal_no_nan(tf.sqrt(tf.linalg.diag_part(own)))
    identity = tf.eye(layers, dtype=own.dtype)
    weight = 1 + 2 * layers / tf.cast(samples, own.dtype)
    matrix = own * unit * unit[:, tf.newaxis] + weight * identity
    finite = tf.math.is_finite(tf.reduce_sum(matrix))
    matrix = tf.where(finite, matrix, identity)
    deviations = -unit * tf.squeeze(
        tf.linalg.cholesky_solve(
            tf.linalg.cholesky(matrix), (unit * slope)[:, tf.newaxis]
        ),
        axis=1,
    )
    # With both coefficients free, α may be negative.
    bounds = tf.stack([common[0] / _SPREAD, common[0] * _SPREAD])
    found = tf.clip_by_value(
        common[0] + deviations, tf.reduce_min(bounds), tf.reduce_max(bounds)
    )
    return tf.concat([found, common[1:]], axis=0)


def of_all_layers(values: tf.Tensor) -> tf.Tensor:
    """Returns products with Δ and δ₋₁, from those with the parts of Δ.

    Args:
        values: Tensor `[L + 1]` or `[L + 1, L + 1]`, with δ₋₁ last.

    Returns:
        Tensor `[2]` or `[2, 2]`.
    """
    for axis in range(values.shape.rank):
        layers, last = tf.split(values, [values.shape[axis] - 1, 1], axis=axis)
        total = tf.reduce_sum(layers, axis=axis, keepdims=True)
        values = tf.concat([total, last], axis=axis)
    return values


def for_each_layer(coefficients: tf.Tensor, layers: int) -> tf.Tensor:
    """Returns the coefficients of L parts of Δ, all with its rate, and δ₋₁."""
    rates = tf.fill([layers], coefficients[0])
    return tf.concat([rates, coefficients[1:]], axis=0)


def model_change(
    gram: tf.Tensor, slopes: tf.Tensor, coefficients: tf.Tensor
) -> tf.Tensor:
    """Returns the predicted loss change M(c)."""
    curvature = tf.linalg.matvec(gram, coefficients)
    return tf.tensordot(slopes + 0.5 * curvature, coefficients, axes=1)


def quadratic_form(gram: tf.Tensor, coefficients: tf.Tensor) -> tf.Tensor:
    """Returns `cᵀ Q c`."""
    curvature = tf.linalg.matvec(gram, coefficients)
    return tf.tensordot(coefficients, curvature, axes=1)


def _both(gram: tf.Tensor, slopes: tf.Tensor) -> tf.Tensor:
    product = gram[0, 0] * gram[1, 1]
    determinant = product - gram[0, 1] ** 2
    usable = determinant > _PARALLEL * product
    rate = -_divide(slopes[0], gram[0, 0])
    alone = tf.stack([rate, tf.zeros_like(rate)])
    both = -tf.stack(
        [
            gram[1, 1] * slopes[0] - gram[0, 1] * slopes[1],
            gram[0, 0] * slopes[1] - gram[0, 1] * slopes[0],
        ]
    ) / tf.where(usable, determinant, tf.ones_like(determinant))
    # A negative μ would undo what earlier batches agreed on, to fit this one;
    # one above 1 would let it grow without end.
    most = tf.constant(_MOST_MOMENTUM, gram.dtype)
    bounded = tf.stack(
        [-_divide(slopes[0] + gram[0, 1] * most, gram[0, 0]), most]
    )
    both = tf.where(both[1] > most, bounded, both)
    return tf.where(usable & (both[1] >= 0), both, alone)


def _divide(numerator: tf.Tensor, denominator: tf.Tensor) -> tf.Tensor:
    return tf.math.divide_no_nan(numerator, denominator)


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
