"""Families of positive targets: durations, amounts, variances."""

from __future__ import annotations

import math
from typing import Any

import keras
import tensorflow as tf

from keras_natgrad.heads.family import Family, Information, Parameter
from keras_natgrad.heads.special import (
    EULER_GAMMA,
    GUMBEL_SPREAD,
    trigamma_excess,
)


@keras.saving.register_keras_serializable(package="keras_natgrad")
class Exponential(Family):
    r"""Exponential targets: waiting times.

    The Fisher matrix in log rate is 1.

    Args:
        rate: The rate, a number or a link. Defaults to `"exp"`.

    Raises:
        ValueError: If an argument is neither a number in its range nor a link.
    """

    parameters = (Parameter("rate", "positive"),)
    distribution_name = "Exponential"
    target_support = "nonnegative"

    def __init__(self, rate: float | str | Any = "exp") -> None:
        super().__init__(rate=rate)

    def information(self, values: dict[str, tf.Tensor]) -> Information:
        """Returns the Fisher matrix of each unit in its coordinates."""
        return Information((tf.ones_like(values["rate"]),))


@keras.saving.register_keras_serializable(package="keras_natgrad")
class Gamma(Family):
    r"""Gamma targets.

    The Fisher matrix in (log rate, log concentration), with α for the
    concentration, is `[[α, −α], [·, α² ψ₁(α)]]`.

    Args:
        rate: The rate, a number or a link. Defaults to `"softplus"`.
        concentration: The concentration, a number or a link. Defaults to
            `"softplus"`.

    Raises:
        ValueError: If an argument is neither a number in its range nor a link.
    """

    parameters = (
        Parameter("rate", "positive"),
        Parameter("concentration", "positive"),
    )
    distribution_name = "Gamma"
    target_support = "positive"
    in_float64 = True

    def __init__(
        self,
        rate: float | str | Any = "softplus",
        concentration: float | str | Any = "softplus",
    ) -> None:
        super().__init__(rate=rate, concentration=concentration)

    def information(self, values: dict[str, tf.Tensor]) -> Information:
        """Returns the Fisher matrix of each unit in its coordinates."""
        return _gamma_information(values["concentration"])


@keras.saving.register_keras_serializable(package="keras_natgrad")
class InverseGamma(Family):
    r"""Inverse gamma targets: reciprocals of gamma variables.

    The Fisher matrix in (log scale, log concentration), with α for the
    concentration, is `[[α, −α], [·, α² ψ₁(α)]]`.

    Args:
        scale: The scale, a number or a link. Defaults to `"softplus"`.
        concentration: The concentration, a number or a link. Defaults to
            `"softplus"`.

    Raises:
        ValueError: If an argument is neither a number in its range nor a link.
    """

    parameters = (
        Parameter("scale", "positive"),
        Parameter("concentration", "positive"),
    )
    distribution_name = "InverseGamma"
    target_support = "positive"
    in_float64 = True

    def __init__(
        self,
        scale: float | str | Any = "softplus",
        concentration: float | str | Any = "softplus",
    ) -> None:
        super().__init__(scale=scale, concentration=concentration)

    def mean(self, outputs: tf.Tensor) -> tf.Tensor:
        """Returns the mean, infinite for concentrations up to 1."""
        alpha = self.values(outputs)["concentration"]
        return tf.where(alpha > 1.0, super().mean(outputs), math.inf)

    def stddev(self, outputs: tf.Tensor) -> tf.Tensor:
        """Returns the deviation, infinite for concentrations up to 2."""
        alpha = self.values(outputs)["concentration"]
        return tf.where(alpha > 2.0, super().stddev(outputs), math.inf)

    def information(self, values: dict[str, tf.Tensor]) -> Information:
        """Returns the Fisher matrix of each unit in its coordinates."""
        return _gamma_information(values["concentration"])


@keras.saving.register_keras_serializable(package="keras_natgrad")
class InverseGaussian(Family):
    r"""Inverse Gaussian targets: first passage times.

    The Fisher matrix in (log loc, log concentration) is
    `diag(concentration/loc, 1/2)`.

    Args:
        loc: The mean, a number or a link. Defaults to `"softplus"`.
        concentration: The concentration, a number or a link. Defaults to
            `"softplus"`.

    Raises:
        ValueError: If an argument is neither a number in its range nor a link.
    """

    parameters = (
        Parameter("loc", "positive"),
        Parameter("concentration", "positive"),
    )
    distribution_name = "InverseGaussian"
    target_support = "positive"

    def __init__(
        self,
        loc: float | str | Any = "softplus",
        concentration: float | str | Any = "softplus",
    ) -> None:
        super().__init__(loc=loc, concentration=concentration)

    def information(self, values: dict[str, tf.Tensor]) -> Information:
        """Returns the Fisher matrix of each unit in its coordinates."""
        loc, concentration = values["loc"], values["concentration"]
        ratio = concentration / loc
        return Information((ratio, 0.5 * tf.ones_like(ratio)))


@keras.saving.register_keras_serializable(package="keras_natgrad")
class Weibull(Family):
    r"""Weibull targets: lifetimes.

    The Fisher matrix in (log scale, log concentration), with k for the
    concentration and Euler's γ, is `[[k², (γ − 1) k], [·, π²/6 + (1 − γ)²]]`.

    Args:
        scale: The scale, a number or a link. Defaults to `"softplus"`.
        concentration: The concentration, a number or a link. Defaults to
            `"softplus"`.

    Raises:
        ValueError: If an argument is neither a number in its range nor a link.
    """

    parameters = (
        Parameter("scale", "positive"),
        Parameter("concentration", "positive"),
    )
    distribution_name = "Weibull"
    target_support = "positive"

    def __init__(
        self,
        scale: float | str | Any = "softplus",
        concentration: float | str | Any = "softplus",
    ) -> None:
        super().__init__(scale=scale, concentration=concentration)

    def unit_log_prob(
        self, values: dict[str, tf.Tensor], targets: tf.Tensor
    ) -> tf.Tensor:
        """Returns the log-density of each unit, by the logarithm of y."""
        # log k + log(y/λ)^k − log y − (y/λ)^k: y/λ itself may overflow.
        k, log_y = values["concentration"], tf.math.log(targets)
        log_power = k * (log_y - tf.math.log(values["scale"]))
        return tf.math.log(k) + log_power - log_y - tf.exp(log_power)

    def information(self, values: dict[str, tf.Tensor]) -> Information:
        """Returns the Fisher matrix of each unit in its coordinates."""
        k = values["concentration"]
        ones = tf.ones_like(k)
        return Information(
            (
                tf.square(k),
                (GUMBEL_SPREAD**2 + (1.0 - EULER_GAMMA) ** 2) * ones,
            ),
            coupling=(EULER_GAMMA - 1.0) * k,
            schur=GUMBEL_SPREAD**2 * ones,
        )


def _gamma_information(concentration: tf.Tensor) -> Information:
    """Returns the Fisher matrix in (log rate or scale, log concentration)."""
    # α² ψ₁(α) = α + h(α): the complement is h itself.
    excess = trigamma_excess(concentration)
    return Information(
        (concentration, concentration + excess),
        coupling=-concentration,
        schur=excess,
    )
