"""The negative log-likelihood of a head, as a Keras loss."""

from typing import Any

import keras
import tensorflow as tf

from keras_natgrad import heads

__all__ = ["NegativeLogLikelihood"]


@keras.saving.register_keras_serializable(package="keras_natgrad")
class NegativeLogLikelihood(keras.losses.Loss):
    """Negative log-likelihood of the targets under an output distribution.

    The last axis of the outputs holds the parameters of one distribution, so
    the loss of an example is `-head.log_prob(y_pred, y_true)`, summed over that
    axis, not averaged as in `keras.losses.MeanSquaredError`. A model compiled
    with this loss needs no further `head` argument.

    Args:
        head: A `keras_natgrad.heads.Head`, or what `keras_natgrad.heads.get()`
            accepts.
        reduction: Type of reduction to apply to the loss, as in
            `keras.losses.Loss`. Defaults to `"sum_over_batch_size"`.
        name: Optional name for the loss instance. Defaults to
            `"negative_log_likelihood"`.
        dtype: The dtype of the loss's computations. Defaults to `None`, which
            means using `keras.config.floatx()`.

    Raises:
        ValueError: If `head` does not denote a head, or, when called, if the
            number of outputs does not fit the head or the shape of the targets
            does not fit the outputs.

    Example:

    ```python
    loss = keras_natgrad.losses.NegativeLogLikelihood(
        keras_natgrad.heads.Normal(scale=0.1)
    )
    model.compile(optimizer=optimizer, loss=loss)
    ```
    """

    def __init__(
        self,
        head: Any,
        reduction: str | None = "sum_over_batch_size",
        name: str | None = "negative_log_likelihood",
        dtype: Any = None,
    ) -> None:
        super().__init__(name=name, reduction=reduction, dtype=dtype)
        self.head = heads.get(head)

    def call(self, y_true: tf.Tensor, y_pred: tf.Tensor) -> tf.Tensor:
        """Computes the loss of every example and position.

        Args:
            y_true: Tensor of targets, in the shape that the head models.
            y_pred: Tensor of outputs of shape `[..., K]`.

        Returns:
            Tensor of shape `y_pred.shape[:-1]`.
        """
        self.head.validate(y_pred.shape)
        return -self.head.log_prob(y_pred, y_true)

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments of the constructor, to be saved with a model.

        Returns:
            Dictionary of the constructor's arguments.
        """
        return {
            **super().get_config(),
            "head": keras.saving.serialize_keras_object(self.head),
            "dtype": self.dtype,
        }


def _convert(
    loss: NegativeLogLikelihood,
) -> tuple[heads.Head, heads.LossWeight]:
    return loss.head, heads.LossWeight(units="sum")


heads.register_loss(NegativeLogLikelihood, _convert)
