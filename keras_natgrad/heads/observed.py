"""The empirical Fisher of a loss that is not a log-likelihood of a head."""

from __future__ import annotations

from typing import Any, NoReturn

import keras
import tensorflow as tf

from keras_natgrad._compat import keras_mask
from keras_natgrad.heads import tensors
from keras_natgrad.heads.base import Head
from keras_natgrad.heads.loss_weight import LossWeight


class ObservedLoss(Head):
    """Represents a loss in the curvature; its outputs are values of the loss.

    With values `ℓ` the negative log-likelihood is `y ℓ` with the observed
    target `y = 1`, and with `y = ±1` drawn evenly for sampling. So `F = L = 1`
    in the values, and with respect to the network's outputs,

    ```
    F = s sᵀ,  s = ∂ℓ / ∂outputs,
    ```

    the empirical Fisher of this loss at the observed targets.

    It is made for one batch, is not a distribution and cannot be saved.
    """

    def distribution(self, outputs: tf.Tensor) -> NoReturn:
        """Raises an error: a loss is not a distribution.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError(
            "A loss without a head has no distribution of the targets."
        )

    def log_prob(self, outputs: tf.Tensor, targets: tf.Tensor) -> tf.Tensor:
        """Returns `−y ℓ`, summed over the last axis."""
        outputs = tensors.as_parameters(outputs)
        targets = tensors.cast_like(targets, outputs)
        return -tf.reduce_sum(targets * outputs, axis=-1)

    def sample(self, outputs: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        """Draws signs, so that the scores have the covariance 1."""
        bits = tf.random.stateless_uniform(
            tf.shape(outputs), seed, 0, 2, tf.int32, alg="philox"
        )
        return tf.cast(2 * bits - 1, tensors.as_parameters(outputs).dtype)

    def fisher_factor_product(
        self, outputs: tf.Tensor, vector: tf.Tensor
    ) -> tf.Tensor:
        """Returns the vectors: `L = 1`."""
        return tensors.cast_like(vector, tensors.as_parameters(outputs))

    def fisher_factor_transpose_product(
        self, outputs: tf.Tensor, vector: tf.Tensor
    ) -> tf.Tensor:
        """Returns the vectors: `Lᵀ = 1`."""
        return self.fisher_factor_product(outputs, vector)

    def targets_in_support(
        self, outputs: tf.Tensor, targets: tf.Tensor
    ) -> tf.Tensor:
        """Returns true: the loss itself decides what it accepts."""
        return tf.constant(True)

    def describe_fisher(self, parameter_count: int | None = None) -> str:
        """Says that the Fisher is empirical."""
        return "empirical, at the observed targets"

    def get_config(self) -> NoReturn:
        """Raises an error: nothing of this head can be saved.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError("ObservedLoss lives for one batch.")

    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self)

    def __repr__(self) -> str:
        return "ObservedLoss()"


def observe_loss(
    loss: Any,
    outputs: tf.Tensor,
    targets: Any,
    sample_weight: Any = None,
    mask: Any = None,
) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns the values of a loss before its reduction, and their weights.

    The values are differentiable in the outputs. If the loss returns one or
    more values per example, `loss = Σ c ℓ` over them, and each value counts as
    one independent observation. A loss that returns a single number, or
    anything else that is not per example, is treated as a mean over the batch
    of N examples: `ℓ_n = ⟨N ∂loss/∂outputs_n, outputs_n⟩` with the gradient
    held fixed, which has the gradient of the loss of example n.

    Args:
        loss: A `keras.losses.Loss`.
        outputs: The outputs that the loss takes, `[batch, ...]`.
        targets: The targets that it takes.
        sample_weight: Optional tensor, as for the loss.
        mask: Optional mask of the outputs.

    Returns:
        Values `[batch, ..., 1]` and coefficients `[batch, ...]`.
    """
    with tf.GradientTape() as tape:
        tape.watch(outputs)
        values = _values(loss, outputs, targets)
        own_mask = keras_mask(values)
        if own_mask is not None:
            mask = own_mask if mask is None else mask & own_mask
        weight = LossWeight(reduction=loss.reduction)
        coefficients = weight.coefficients(
            values[..., tf.newaxis], sample_weight, mask
        )
        if values.shape.rank and values.shape[0] == outputs.shape[0]:
            return values[..., tf.newaxis], coefficients
        total = tf.reduce_sum(coefficients)
        mean = tf.math.divide_no_nan(
            tf.reduce_sum(coefficients * values), total
        )
    size = tf.shape(outputs)[:1]
    count = tf.cast(size[0], outputs.dtype)
    scores = count * tf.stop_gradient(
        tape.gradient(mean, outputs, unconnected_gradients="zero")
    )
    along = tf.reshape(scores * outputs, tf.concat([size, [-1]], axis=0))
    return (
        tf.reduce_sum(along, axis=1, keepdims=True),
        tf.fill(size, total / tf.cast(size[0], total.dtype)),
    )


def _values(loss: Any, outputs: Any, targets: Any) -> tf.Tensor:
    """Calls a loss as `keras.losses.Loss.__call__`, without the reduction."""

    def convert(tensor: Any) -> Any:
        return keras.ops.convert_to_tensor(tensor, dtype=loss.dtype)

    return keras.ops.convert_to_tensor(
        loss.call(
            keras.tree.map_structure(convert, targets),
            keras.tree.map_structure(convert, outputs),
        )
    )
