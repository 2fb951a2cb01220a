"""Normal distribution: least squares, or a predicted scale as well."""

from __future__ import annotations

import math
from typing import Any

import keras
import tensorflow as tf

from keras_natgrad.heads.family import Family, Information, Parameter
from keras_natgrad.heads.probability import distributions


@keras.saving.register_keras_serializable(package="keras_natgrad")
class Normal(Family):
    """Independent normal targets.

    With a fixed scale the `K` outputs are the means of `K` targets: least
    squares. With a link the network predicts the scales as well: the outputs
    are first all means, then all raw scales. The Fisher matrix in
    (loc, log scale) is `diag(1/scale², 2)`.

    Args:
        scale: The standard deviation of the targets: a positive number, or
            the link that makes it from the outputs, e.g. `"softplus"`. The
            mean squared error is the negative log-likelihood for `scale=√½`.
            Defaults to `1.0`.

    Raises:
        ValueError: If `scale` is neither positive and finite nor a link.

    Example:

    >>> head = keras_natgrad.heads.Normal(scale=0.5)
    >>> outputs = tf.constant([[1.0, 2.0]])
    >>> head.fisher(outputs).numpy()
    array([[[4., 0.],
            [0., 4.]]], dtype=float32)
    >>> head = keras_natgrad.heads.Normal(scale="log_variance")
    >>> fisher = head.fisher(tf.constant([[1.0, 0.0]]))  # mean 1, variance 1
    >>> fisher.numpy().round(6)
    array([[[1. , 0. ],
            [0. , 0.5]]], dtype=float32)
    """

    parameters = (Parameter("loc", "real"), Parameter("scale", "positive"))
    distribution_name = "Normal"

    def __init__(self, scale: float | str | Any = 1.0) -> None:
        super().__init__(scale=scale)

    def unit_log_prob(
        self, values: dict[str, tf.Tensor], targets: tf.Tensor
    ) -> tf.Tensor:
        """Returns the log-density of each unit."""
        return normal_log_prob(targets - values["loc"], values["scale"])

    def information(self, values: dict[str, tf.Tensor]) -> Information:
        """Returns the Fisher matrix of each unit in its coordinates."""
        return normal_information(values["scale"])


@keras.saving.register_keras_serializable(package="keras_natgrad")
class MultivariateNormalDiag(Normal):
    """Normal targets in d dimensions with a diagonal covariance.

    The outputs are the d means, then the d raw scales. It is `Normal` with a
    predicted scale, except that the event of the distribution is the vector of
    all targets. The Fisher matrix in (loc, log scale) is `diag(1/scale², 2)`.

    Args:
        scale: The standard deviations, a positive number or the link that
            makes them from the outputs. Defaults to `"softplus"`.

    Raises:
        ValueError: If `scale` is neither positive and finite nor a link.
    """

    def __init__(self, scale: float | str | Any = "softplus") -> None:
        super().__init__(scale=scale)

    def distribution(self, outputs: tf.Tensor) -> Any:
        """Builds the `MultivariateNormalDiag`."""
        values = self.values(outputs)
        loc = values["loc"]
        scale = tf.broadcast_to(values["scale"], tf.shape(loc))
        return distributions().MultivariateNormalDiag(loc, scale)


def normal_log_prob(residual: tf.Tensor, scale: tf.Tensor) -> tf.Tensor:
    """Returns the log-density of a normal at `loc + residual`.

    TFP subtracts `loc / scale` from `y / scale`, whose gradients are only
    rounding if the scale is small compared with the mean.
    """
    return -(
        0.5 * tf.square(residual / scale)
        + tf.math.log(scale)
        + 0.5 * math.log(2.0 * math.pi)
    )


def normal_information(scale: tf.Tensor) -> Information:
    """Returns the Fisher matrix of a normal in (loc, log scale)."""
    return Information((1.0 / tf.square(scale), 2.0 * tf.ones_like(scale)))
