"""Families with a location and a scale."""

from __future__ import annotations

import math
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_natgrad.heads import tensors
from keras_natgrad.heads.family import Family, Information, Parameter
from keras_natgrad.heads.normal import normal_information, normal_log_prob
from keras_natgrad.heads.special import (
    EULER_GAMMA,
    GUMBEL_SPREAD,
    student_information,
)


class LocationScale(Family):
    """Base of families whose parameters are a location and a scale.

    Args:
        scale: The scale, a positive number or the link that makes it from the
            outputs. Defaults to `"softplus"`.

    Raises:
        ValueError: If `scale` is neither positive and finite nor a link.
    """

    parameters = (Parameter("loc", "real"), Parameter("scale", "positive"))

    def __init__(self, scale: float | str | Any = "softplus") -> None:
        super().__init__(scale=scale)


@keras.saving.register_keras_serializable(package="keras_natgrad")
class LogNormal(LocationScale):
    r"""Positive targets whose logarithm is normal.

    The Fisher matrix in (loc, log scale) is `diag(1/scale², 2)`, that of the
    normal distribution of the logarithm.

    Args:
        scale: The scale, a positive number or the link that makes it from the
            outputs. Defaults to `"softplus"`.

    Raises:
        ValueError: If `scale` is neither positive and finite nor a link.
    """

    distribution_name = "LogNormal"
    target_support = "positive"
    in_float64 = True

    def unit_log_prob(
        self, values: dict[str, tf.Tensor], targets: tf.Tensor
    ) -> tf.Tensor:
        """Returns the log-density of each unit."""
        log = tf.math.log(targets)
        return normal_log_prob(log - values["loc"], values["scale"]) - log

    def information(self, values: dict[str, tf.Tensor]) -> Information:
        """Returns the Fisher matrix of each unit in its coordinates."""
        return normal_information(values["scale"])


@keras.saving.register_keras_serializable(package="keras_natgrad")
class LogitNormal(LocationScale):
    r"""Targets between 0 and 1 whose logit is normal.

    The Fisher matrix in (loc, log scale) is `diag(1/scale², 2)`, that of the
    normal distribution of the logit.

    Args:
        scale: The scale, a positive number or the link that makes it from the
            outputs. Defaults to `"softplus"`.

    Raises:
        ValueError: If `scale` is neither positive and finite nor a link.
    """

    distribution_name = "LogitNormal"
    target_support = "unit"
    in_float64 = True

    def unit_log_prob(
        self, values: dict[str, tf.Tensor], targets: tf.Tensor
    ) -> tf.Tensor:
        """Returns the log-density of each unit."""
        log, log_rest = tf.math.log(targets), tf.math.log1p(-targets)
        residual = log - log_rest - values["loc"]
        return normal_log_prob(residual, values["scale"]) - log - log_rest

    def mean(self, outputs: tf.Tensor) -> tf.Tensor:
        """Returns the mean, by quadrature: it has no closed form.

        The trapezoidal rule in the standardised logit has 601 terms; it is
        exact to 1e-9 for scales up to 20.
        """
        return self._moments(outputs)[0]

    def stddev(self, outputs: tf.Tensor) -> tf.Tensor:
        """Returns the standard deviation, by quadrature like the mean."""
        return self._moments(outputs)[1]

    def _moments(self, outputs: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        outputs = tensors.as_parameters(outputs)
        values = self.values(tf.cast(outputs, tf.float64))
        z = np.linspace(-12.0, 12.0, 601)
        weights = np.exp(-0.5 * z**2)
        weights /= np.sum(weights)
        y = tf.sigmoid(
            values["loc"][..., tf.newaxis]
            + values["scale"][..., tf.newaxis] * z
        )
        mean = tf.reduce_sum(weights * y, axis=-1, keepdims=True)
        variance = tf.reduce_sum(weights * tf.square(y - mean), axis=-1)
        return (
            tensors.cast_like(mean[..., 0], outputs),
            tensors.cast_like(tf.sqrt(variance), outputs),
        )

    def information(self, values: dict[str, tf.Tensor]) -> Information:
        """Returns the Fisher matrix of each unit in its coordinates."""
        return normal_information(values["scale"])


@keras.saving.register_keras_serializable(package="keras_natgrad")
class Laplace(LocationScale):
    r"""Laplace targets: the mean absolute error for `scale=1.0`.

    The Fisher matrix in (loc, log scale) is `diag(1/scale², 1)`. The Hessian of
    the negative log-likelihood in loc is zero almost everywhere; the Fisher
    matrix is not.

    Args:
        scale: The scale, a positive number or the link that makes it from the
            outputs. Defaults to `"softplus"`.

    Raises:
        ValueError: If `scale` is neither positive and finite nor a link.
    """

    distribution_name = "Laplace"

    def information(self, values: dict[str, tf.Tensor]) -> Information:
        """Returns the Fisher matrix of each unit in its coordinates."""
        scale = values["scale"]
        return Information((1.0 / tf.square(scale), tf.ones_like(scale)))


@keras.saving.register_keras_serializable(package="keras_natgrad")
class Logistic(LocationScale):
    r"""Logistic targets.

    The Fisher matrix in (loc, log scale) is `diag(1/(3 scale²), (π² + 3)/9)`.

    Args:
        scale: The scale, a positive number or the link that makes it from the
            outputs. Defaults to `"softplus"`.

    Raises:
        ValueError: If `scale` is neither positive and finite nor a link.
    """

    distribution_name = "Logistic"

    def information(self, values: dict[str, tf.Tensor]) -> Information:
        """Returns the Fisher matrix of each unit in its coordinates."""
        scale = values["scale"]
        spread = tf.fill(
            tf.shape(scale), tf.constant((math.pi**2 + 3) / 9, scale.dtype)
        )
        return Information((1.0 / (3.0 * tf.square(scale)), spread))


@keras.saving.register_keras_serializable(package="keras_natgrad")
class Cauchy(LocationScale):
    r"""Cauchy targets: outliers of any size.

    The Fisher matrix in (loc, log scale) is `diag(1/(2 scale²), 1/2)`.

    Args:
        scale: The scale, a positive number or the link that makes it from the
            outputs. Defaults to `"softplus"`.

    Raises:
        ValueError: If `scale` is neither positive and finite nor a link.
    """

    distribution_name = "Cauchy"

    def information(self, values: dict[str, tf.Tensor]) -> Information:
        """Returns the Fisher matrix of each unit in its coordinates."""
        scale = values["scale"]
        return Information((0.5 / tf.square(scale), 0.5 * tf.ones_like(scale)))


@keras.saving.register_keras_serializable(package="keras_natgrad")
class Gumbel(LocationScale):
    r"""Gumbel targets: maxima of many values.

    The Fisher matrix in (loc, log scale) is, with Euler's γ,

        [[1/scale², (γ − 1)/scale], [·, π²/6 + (1 − γ)²]].

    Args:
        scale: The scale, a positive number or the link that makes it from the
            outputs. Defaults to `"softplus"`.

    Raises:
        ValueError: If `scale` is neither positive and finite nor a link.
    """

    distribution_name = "Gumbel"

    def information(self, values: dict[str, tf.Tensor]) -> Information:
        """Returns the Fisher matrix of each unit in its coordinates."""
        scale = values["scale"]
        ones = tf.ones_like(scale)
        return Information(
            (
                1.0 / tf.square(scale),
                (GUMBEL_SPREAD**2 + (1.0 - EULER_GAMMA) ** 2) * ones,
            ),
            coupling=(EULER_GAMMA - 1.0) / scale,
            schur=GUMBEL_SPREAD**2 * ones,
        )


@keras.saving.register_keras_serializable(package="keras_natgrad")
class StudentT(Family):
    r"""Student's t targets: regression that is robust to outliers.

    The Fisher matrix in (loc, log scale, log df), with ν for df, is

        loc:        (ν + 1) / ((ν + 3) scale²)
        log scale:  2ν / (ν + 3)
        log df:     ν² {¼ [ψ₁(ν/2) − ψ₁((ν+1)/2)] − (ν+5)/(2ν(ν+1)(ν+3))}
        log scale with log df:  −2ν / ((ν + 1)(ν + 3)),

    and loc is orthogonal to both.

    Args:
        scale: The scale, a positive number or the link that makes it from the
            outputs. Defaults to `"softplus"`.
        df: The degrees of freedom, a positive number or a link. Defaults to
            `4.0`.

    Raises:
        ValueError: If an argument is neither a number in its range nor a link.

    References:
        - Lange, Little & Taylor, 1989.
    """

    parameters = (
        Parameter("loc", "real"),
        Parameter("scale", "positive"),
        Parameter("df", "positive"),
    )
    distribution_name = "StudentT"
    in_float64 = True

    def __init__(
        self, scale: float | str | Any = "softplus", df: float | str | Any = 4.0
    ) -> None:
        super().__init__(scale=scale, df=df)

    def information(self, values: dict[str, tf.Tensor]) -> Information:
        """Returns the Fisher matrix of each unit in its coordinates."""
        scale, df = values["scale"], values["df"]
        information, complement = student_information(df)
        return Information(
            (
                (df + 1.0) / ((df + 3.0) * tf.square(scale)),
                2.0 * df / (df + 3.0),
                information,
            ),
            coupling=-2.0 * df / ((df + 1.0) * (df + 3.0)),
            schur=complement,
        )
