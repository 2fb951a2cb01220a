"""Families whose negative log-likelihoods are robust losses of Keras."""

from __future__ import annotations

import math
from typing import Any

import keras
import tensorflow as tf

from keras_natgrad.heads.family import Information
from keras_natgrad.heads.location_scale import LocationScale
from keras_natgrad.heads.normal import normal_log_prob
from keras_natgrad.heads.probability import bijectors, distributions
from keras_natgrad.heads.special import huber_masses


@keras.saving.register_keras_serializable(package="keras_natgrad")
class Huber(LocationScale):
    r"""Normal targets with the tails of a Laplace distribution.

    The density is proportional to `exp(−huber_δ(z))`, `z = (y − loc)/scale`:
    for `scale=1.0` the Huber loss. With `P` the probability of `|z| ≤ δ` and
    `Q = 1 − P`,

        P = √(2π) erf(δ/√2) / Z,   Z = √(2π) erf(δ/√2) + (2/δ) exp(−δ²/2),

    the score in loc, `clip(z, −δ, δ)/scale`, has the variance P/scale², and the
    Fisher matrix in (loc, log scale) is `diag(P/scale², 2 P + (1 − δ²) Q)`.

    Args:
        scale: The scale, a positive number or the link that makes it from the
            outputs. Defaults to `"softplus"`.
        delta: δ, a positive number. Defaults to `1.0`.

    Raises:
        ValueError: If `scale` is neither positive and finite nor a link, or
            `delta` is not positive and finite.

    References:

    - [Huber, 1964](https://doi.org/10.1214/aoms/1177703732)
    """

    def __init__(
        self, scale: float | str | Any = "softplus", delta: float = 1.0
    ) -> None:
        super().__init__(scale=scale)
        if isinstance(delta, bool) or not 0.0 < delta < math.inf:
            raise ValueError(
                "`delta` must be a positive, finite number, such as 1.0. "
                f"Received: delta={delta!r}"
            )
        self.delta = float(delta)

    def units(self, values: dict[str, tf.Tensor]) -> Any:
        """Builds the units' distributions; see `Family.units()`."""
        return _symmetric().Huber(values["loc"], values["scale"], self.delta)

    def information(self, values: dict[str, tf.Tensor]) -> Information:
        """Returns the Fisher matrix of each unit in its coordinates."""
        inside, outside, _ = huber_masses(self.delta)
        scale = values["scale"]
        # 2 P + Q − δ² Q: E[z² ψ²] − 1 with ψ = clip(z, −δ, δ).
        spread = 2.0 * inside + (1.0 - self.delta**2) * outside
        return Information(
            (inside / tf.square(scale), spread * tf.ones_like(scale))
        )

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments of the constructor."""
        return {**super().get_config(), "delta": self.delta}


@keras.saving.register_keras_serializable(package="keras_natgrad")
class HyperbolicSecant(LocationScale):
    r"""Hyperbolic secant targets: the log-cosh loss for `scale=1.0`.

    The density is `1 / (π scale cosh z)`, `z = (y − loc)/scale`, and the Fisher
    matrix in (loc, log scale) is `diag(1/(2 scale²), π²/8)`.

    Args:
        scale: The scale, a positive number or the link that makes it from the
            outputs. Defaults to `"softplus"`.

    Raises:
        ValueError: If `scale` is neither positive and finite nor a link.
    """

    def units(self, values: dict[str, tf.Tensor]) -> Any:
        """Builds the units' distributions; see `Family.units()`."""
        return _symmetric().HyperbolicSecant(values["loc"], values["scale"])

    def information(self, values: dict[str, tf.Tensor]) -> Information:
        """Returns the Fisher matrix of each unit in its coordinates."""
        scale = values["scale"]
        # E[tanh² z] = ½ and E[z² tanh² z] − 1 = π²/8.
        return Information(
            (
                0.5 / tf.square(scale),
                (math.pi**2 / 8.0) * tf.ones_like(scale),
            )
        )


@keras.saving.register_keras_serializable(package="keras_natgrad")
class Log1pNormal(LocationScale):
    r"""Targets above −1 for which log(1 + y) is normal.

    The mean of log(1 + y) is log(1 + loc), with loc raised to
    `ε = keras.config.epsilon()`: for `scale=√½` the mean squared logarithmic
    error of non-negative targets. (Keras raises targets to ε as well.) The
    Fisher matrix in (loc, log scale) is `diag(1/((1 + loc) scale)², 2)`, and
    zero in loc where loc is not above ε.

    Args:
        scale: The standard deviation of log(1 + y), a positive number or the
            link that makes it from the outputs. Defaults to `"softplus"`.

    Raises:
        ValueError: If `scale` is neither positive and finite nor a link.
    """

    target_support = "above_minus_one"
    in_float64 = True

    def units(self, values: dict[str, tf.Tensor]) -> Any:
        """Builds the units' distributions; see `Family.units()`."""
        loc = tf.maximum(values["loc"], keras.config.epsilon())
        base = distributions().LogNormal(tf.math.log1p(loc), values["scale"])
        return distributions().TransformedDistribution(
            base, bijectors().Shift(tf.constant(-1.0, loc.dtype))
        )

    def unit_log_prob(
        self, values: dict[str, tf.Tensor], targets: tf.Tensor
    ) -> tf.Tensor:
        """Returns the log-density of each unit."""
        loc = tf.maximum(values["loc"], keras.config.epsilon())
        log = tf.math.log1p(targets)
        residual = log - tf.math.log1p(loc)
        return normal_log_prob(residual, values["scale"]) - log

    def information(self, values: dict[str, tf.Tensor]) -> Information:
        """Returns the Fisher matrix of each unit in its coordinates."""
        loc, scale = values["loc"], values["scale"]
        epsilon = keras.config.epsilon()
        slope = 1.0 / (1.0 + tf.maximum(loc, epsilon))
        return Information(
            (
                tf.where(loc > epsilon, tf.square(slope / scale), 0.0),
                2.0 * tf.ones_like(scale),
            )
        )


def _symmetric() -> Any:
    """Returns the module of symmetric distributions, which loads TFP."""
    distributions()  # Says what to install if TFP is missing.
    from keras_natgrad.heads import symmetric

    return symmetric
