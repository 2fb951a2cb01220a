"""Independent Bernoulli distributions: binary cross-entropy."""

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_natgrad.heads import tensors
from keras_natgrad.heads.base import Head
from keras_natgrad.heads.probability import distributions


@keras.saving.register_keras_serializable(package="keras_natgrad")
class Bernoulli(Head):
    """Independent binary targets, one per output.

    With `p` the probability of one, the Fisher matrix is diagonal:

    - `from_logits=True`: `F = p (1 - p)`.
    - `from_logits=False`: `F = 1 / (p (1 - p))`.

    As in Keras, probabilities are clipped to `[ε, 1 - ε]`,
    `ε = keras.config.epsilon()`. Derivatives pass through the clipping, so that
    the score of a saturated unit agrees with its Fisher matrix and does not
    vanish.

    Targets may be any numbers in `[0, 1]`. A soft target `t` stands for the
    expected log-probability `t log p + (1 - t) log(1 - p)`, as in Keras.

    Args:
        from_logits: Boolean, whether the outputs are logits (the default) or
            probabilities.

    Example:

    >>> head = keras_natgrad.heads.Bernoulli()
    >>> outputs = tf.constant([[0.0, 0.0]])
    >>> head.fisher(outputs).numpy()
    array([[[0.25, 0.  ],
            [0.  , 0.25]]], dtype=float32)
    """

    def __init__(self, from_logits: bool = True) -> None:
        self.from_logits = bool(from_logits)

    def distribution(self, outputs: tf.Tensor) -> Any:
        """Builds the `Independent(Bernoulli)` distribution."""
        tfd = distributions()
        outputs = tensors.as_parameters(outputs)
        if self.from_logits:
            base = tfd.Bernoulli(logits=outputs, dtype=outputs.dtype)
        else:
            probability = self._clip(outputs)
            base = tfd.Bernoulli(probs=probability, dtype=outputs.dtype)
        return tfd.Independent(base, 1)

    def log_prob(self, outputs: tf.Tensor, targets: tf.Tensor) -> tf.Tensor:
        """Computes the log-probability; see `Head.log_prob()`."""
        outputs = tensors.as_parameters(outputs)
        targets = tensors.match_targets(outputs, targets)
        if self.from_logits:
            log_prob = -tf.nn.sigmoid_cross_entropy_with_logits(
                labels=targets, logits=outputs
            )
        else:
            probability = self._clip(outputs)
            log_prob = targets * tf.math.log(probability)
            log_prob += (1.0 - targets) * tf.math.log(1.0 - probability)
        return tf.reduce_sum(log_prob, axis=-1)

    def score(self, outputs: tf.Tensor, targets: tf.Tensor) -> tf.Tensor:
        """Computes `y - p`, or `(y - p) / (p (1 - p))` for probabilities."""
        outputs = tensors.as_parameters(outputs)
        targets = tensors.match_targets(outputs, targets)
        if self.from_logits:
            return targets - tf.sigmoid(outputs)
        return (targets - self._clip(outputs)) * self._fisher_diagonal(outputs)

    def fisher_factor_product(
        self, outputs: tf.Tensor, vector: tf.Tensor
    ) -> tf.Tensor:
        """Computes `√F v`; see `Head.fisher_factor_product()`."""
        diagonal = self._fisher_diagonal(outputs)
        return tf.sqrt(diagonal) * tensors.cast_like(vector, diagonal)

    def fisher_factor_transpose_product(
        self, outputs: tf.Tensor, vector: tf.Tensor
    ) -> tf.Tensor:
        """Computes `√F v`; the factor is symmetric."""
        return self.fisher_factor_product(outputs, vector)

    def fisher_vector_product(
        self, outputs: tf.Tensor, vector: tf.Tensor
    ) -> tf.Tensor:
        """Computes `F v`; see `Head.fisher_vector_product()`."""
        diagonal = self._fisher_diagonal(outputs)
        return diagonal * tensors.cast_like(vector, diagonal)

    def natural_gradient(
        self, outputs: tf.Tensor, gradient: tf.Tensor
    ) -> tf.Tensor:
        """Computes `g / F`; see `Head.natural_gradient()`.

        `F` is taken to be at least the machine epsilon, so that saturated
        logits give finite values.
        """
        diagonal = self._fisher_diagonal(outputs)
        floor = np.finfo(diagonal.dtype.as_numpy_dtype).eps
        return tensors.cast_like(gradient, diagonal) / tf.maximum(
            diagonal, floor
        )

    def targets_in_support(
        self, outputs: tf.Tensor, targets: tf.Tensor
    ) -> tf.Tensor:
        """Tells whether all targets lie in `[0, 1]`."""
        targets = tensors.match_targets(tensors.as_parameters(outputs), targets)
        return tf.reduce_all((targets >= 0.0) & (targets <= 1.0))

    def describe_support(self, outputs_shape: Sequence[int | None]) -> str:
        """Says in words which targets the head accepts."""
        return "numbers in [0, 1]; map classes to 0 and 1"

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments of the constructor."""
        return {"from_logits": self.from_logits}

    def _fisher_diagonal(self, outputs: tf.Tensor) -> tf.Tensor:
        outputs = tensors.as_parameters(outputs)
        if self.from_logits:
            # σ(-x) instead of 1 - σ(x), which cancels for large x.
            return tf.sigmoid(outputs) * tf.sigmoid(-outputs)
        probability = self._clip(outputs)
        return 1.0 / (probability * (1.0 - probability))

    @staticmethod
    def _clip(probability: tf.Tensor) -> tf.Tensor:
        return tensors.clip_with_gradient(probability, highest=1.0)
