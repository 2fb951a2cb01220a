"""Distributions that represent Keras losses that are not log-likelihoods.

A surrogate is a known head for outputs that mean the same as those of the
loss: probabilities, logits, margins or frames. Its Fisher replaces the
curvature of the loss; the gradient stays that of the loss.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import tensorflow as tf

from keras_natgrad._compat import loss_options
from keras_natgrad.heads import tensors
from keras_natgrad.heads.base import Head
from keras_natgrad.heads.bernoulli import Bernoulli
from keras_natgrad.heads.categorical import Categorical
from keras_natgrad.heads.location_scale import Laplace
from keras_natgrad.heads.loss_weight import LossWeight
from keras_natgrad.heads.losses import resolve
from keras_natgrad.heads.normal import Normal

# Function from the values of a loss to the weights of its reduction.
Reduce = Callable[[tf.Tensor], tf.Tensor]
# Returns head parameters and coefficients; takes the loss, outputs, targets and
# reduction.
Parts = Callable[[Any, tf.Tensor, Any, Reduce], tuple[tf.Tensor, tf.Tensor]]


@dataclass(frozen=True)
class Surrogate:
    """A head in place of a loss, and how its parameters follow from the loss.

    Attributes:
        loss: The `keras.losses.Loss`.
        reduction: Its reduction.
        head: The head.
        parts: See `Parts`.
    """

    loss: Any
    reduction: str | None
    head: Head
    parts: Parts

    def term(
        self,
        outputs: tf.Tensor,
        targets: Any,
        sample_weight: Any = None,
        mask: Any = None,
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns the head's parameters and the coefficients of the loss.

        Args:
            outputs: The outputs that the loss takes.
            targets: The targets that it takes.
            sample_weight: Optional tensor, as for the loss.
            mask: Optional mask of the outputs.

        Returns:
            Parameters `[batch, ..., K]`, differentiable in the outputs, and
            coefficients `[batch, ...]`.
        """
        weight = LossWeight(reduction=self.reduction)

        def reduce(values: tf.Tensor) -> tf.Tensor:
            return weight.coefficients(
                values[..., tf.newaxis], sample_weight, mask
            )

        outputs = tensors.as_parameters(outputs)
        parameters, coefficients = self.parts(
            self.loss, outputs, targets, reduce
        )
        return parameters, tf.stop_gradient(coefficients)


def find_surrogate(
    loss: Any, outputs_shape: Sequence[int | None] | None = None
) -> Surrogate | None:
    """Returns the surrogate of a Keras loss, or `None`.

    Args:
        loss: A Keras loss, in any form that `from_loss()` takes.
        outputs_shape: Optional static shape of the outputs.
    """
    shape = None if outputs_shape is None else tuple(outputs_shape)
    resolved, reduction = resolve(loss, shape)
    found = _SURROGATES.get(type(resolved))
    if found is None:
        return None
    make_head, parts = found
    return Surrogate(resolved, reduction, make_head(resolved), parts)


def _hinge(
    loss: Any, outputs: tf.Tensor, targets: Any, reduce: Reduce
) -> tuple[tf.Tensor, tf.Tensor]:
    """Log-odds `ℓ(−1) − ℓ(1)` of the two labels, per unit.

    `p(y) ∝ exp(−ℓ(y))` is Bernoulli with these logits: 2f (hinge) or 4f
    (squared hinge) within the margin.
    """
    power = 2 if isinstance(loss, keras.losses.SquaredHinge) else 1
    negative, positive = tf.nn.relu(1.0 + outputs), tf.nn.relu(1.0 - outputs)
    return negative**power - positive**power, _unit_mean(outputs, reduce)


def _binary_focal(
    loss: Any, outputs: tf.Tensor, targets: Any, reduce: Reduce
) -> tuple[tf.Tensor, tf.Tensor]:
    """Cross-entropy of each unit, weighted as `_focal_weight` says."""
    targets = tensors.match_targets(outputs, targets)
    smoothing = loss.label_smoothing
    targets = targets * (1.0 - smoothing) + 0.5 * smoothing
    p = tf.sigmoid(outputs) if loss.from_logits else outputs
    missed = targets * (1.0 - p) + (1.0 - targets) * p
    factor = _focal_weight(missed, loss.gamma)
    if loss.apply_class_balancing:
        alpha = loss.alpha
        factor *= targets * alpha + (1.0 - targets) * (1.0 - alpha)
    outputs, factor = _last(outputs, loss.axis), _last(factor, loss.axis)
    per_unit = _unit_mean(outputs, reduce)[..., tf.newaxis]
    return outputs[..., tf.newaxis], per_unit * factor


def _categorical_focal(
    loss: Any, outputs: tf.Tensor, targets: Any, reduce: Reduce
) -> tuple[tf.Tensor, tf.Tensor]:
    """Cross-entropy, weighted as `_focal_weight` says for the true class."""
    rows = _last(tensors.match_targets(outputs, targets), loss.axis)
    outputs = _last(outputs, loss.axis)
    classes = tf.cast(tf.shape(rows)[-1], rows.dtype)
    smoothing = loss.label_smoothing
    rows = rows * (1.0 - smoothing) + smoothing / classes
    if loss.from_logits:
        p = tf.nn.softmax(outputs)
    else:
        p = outputs / tf.reduce_sum(outputs, axis=-1, keepdims=True)
    alpha = tf.constant(loss.alpha, p.dtype)
    factor = alpha * _focal_weight(1.0 - p, loss.gamma)
    weight = tf.reduce_sum(rows * factor, axis=-1)
    return outputs, reduce(outputs[..., 0]) * weight


def _focal_weight(missed: tf.Tensor, gamma: float) -> tf.Tensor:
    """Weight of the cross-entropy whose Fisher represents the focal loss.

    With q = 1 − p missed of the true class, the gradient of `−q^γ ln p` is that
    of the cross-entropy times `q^γ s`, `s = 1 − γ p ln p / q`, where the second
    term comes from the factor itself. The weight is `q^γ s²`. Near p = 1, where
    the loss falls like `q^(γ+1)`, its Fisher is then the second derivative,
    `(1 + γ)² q^(γ+1)`. With the factor `q^γ` alone, `(1 + γ)²` is missing and
    steps were too long.
    """
    q = tf.clip_by_value(missed, 0.0, 1.0)
    slope = 1.0 - gamma * tf.math.divide_no_nan(tf.math.xlog1py(1.0 - q, -q), q)
    return q**gamma * slope**2


def _overlap(
    loss: Any, outputs: tf.Tensor, targets: Any, reduce: Reduce
) -> tuple[tf.Tensor, tf.Tensor]:
    """Each probability by itself; each value of the loss is shared evenly."""
    values = tf.reduce_mean(outputs, axis=loss.axis)
    kept = tf.reduce_mean(outputs, axis=loss.axis, keepdims=True)
    shared = tf.cast(tf.size(outputs) / tf.size(values), outputs.dtype)
    weights = tf.reshape(reduce(values), tf.shape(kept)) / shared
    return outputs[..., tf.newaxis], weights * tf.ones_like(outputs)


def _classes(
    loss: Any, outputs: tf.Tensor, targets: Any, reduce: Reduce
) -> tuple[tf.Tensor, tf.Tensor]:
    """The outputs as the logits of the classes."""
    return outputs, reduce(outputs[..., 0])


def _frames(
    loss: Any, outputs: tf.Tensor, targets: Any, reduce: Reduce
) -> tuple[tf.Tensor, tf.Tensor]:
    """A path through the frames draws each frame independently."""
    weights = reduce(outputs[:, 0, 0])[:, tf.newaxis]
    return outputs, weights * tf.ones_like(outputs[..., 0])


def _relative(
    loss: Any, outputs: tf.Tensor, targets: Any, reduce: Reduce
) -> tuple[tf.Tensor, tf.Tensor]:
    """Absolute errors relative to the observed targets, weighted by 100.

    The scale of the Laplace distribution is the size of the target.
    """
    size = tf.abs(tensors.match_targets(outputs, targets))
    relative = outputs / tf.maximum(size, keras.config.epsilon())
    return relative, 100.0 * _unit_mean(outputs, reduce)


def _direction(
    loss: Any, outputs: tf.Tensor, targets: Any, reduce: Reduce
) -> tuple[tf.Tensor, tf.Tensor]:
    """Unit vectors: −⟨t, u⟩ = ½ ‖t − u‖² − 1."""
    outputs = _last(outputs, loss_options(loss)["axis"])
    unit = tf.math.l2_normalize(outputs, axis=-1)
    return unit, reduce(outputs[..., 0])


def _unit_mean(outputs: tf.Tensor, reduce: Reduce) -> tf.Tensor:
    """Returns the weights of a loss that averages over the last axis."""
    count = tf.cast(tf.shape(outputs)[-1], outputs.dtype)
    return reduce(outputs[..., 0]) / count


def _last(tensor: tf.Tensor, axis: int) -> tf.Tensor:
    return keras.ops.moveaxis(tensor, axis, -1)


def _units(loss: Any) -> Head:
    return Bernoulli(getattr(loss, "from_logits", True))


def _probabilities(loss: Any) -> Head:
    return Bernoulli(from_logits=False)


def _one_of(loss: Any) -> Head:
    return Categorical(getattr(loss, "from_logits", True), sparse=False)


_SURROGATES: dict[type, tuple[Callable[[Any], Head], Parts]] = {
    keras.losses.Hinge: (_units, _hinge),
    keras.losses.SquaredHinge: (_units, _hinge),
    keras.losses.BinaryFocalCrossentropy: (_units, _binary_focal),
    keras.losses.Dice: (_probabilities, _overlap),
    keras.losses.Tversky: (_probabilities, _overlap),
    keras.losses.CategoricalFocalCrossentropy: (_one_of, _categorical_focal),
    keras.losses.CategoricalHinge: (_one_of, _classes),
    keras.losses.CTC: (_one_of, _frames),
    keras.losses.MeanAbsolutePercentageError: (
        lambda loss: Laplace(scale=1.0),
        _relative,
    ),
    keras.losses.CosineSimilarity: (
        lambda loss: Normal(scale=1.0),
        _direction,
    ),
}
