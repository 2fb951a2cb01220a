"""Symmetric distributions that TensorFlow Probability does not have.

The module loads TensorFlow Probability, so heads import it only when they build
a distribution.
"""

from __future__ import annotations

import abc
import math
from typing import Any

import tensorflow as tf
import tensorflow_probability as tfp
from tensorflow_probability import distributions as tfd

from keras_natgrad.heads.special import huber_masses


class Symmetric(tfd.Distribution):
    """A location-scale family whose density is symmetric about its location.

    A subclass provides the logarithm of the standard density, the probability
    of its right tail and the inverse of that, and the variance. Draws are
    quantiles of uniform numbers.

    Args:
        loc: Tensor, the location.
        scale: Positive tensor, the scale.
        **settings: Further arguments of the subclass, to be stored.
    """

    def __init__(
        self, loc: tf.Tensor, scale: tf.Tensor, **settings: Any
    ) -> None:
        parameters = {"loc": loc, "scale": scale, **settings}
        self.loc = tf.convert_to_tensor(loc)
        self.scale = tf.convert_to_tensor(scale, self.loc.dtype)
        super().__init__(
            dtype=self.loc.dtype,
            reparameterization_type=tfd.FULLY_REPARAMETERIZED,
            validate_args=False,
            allow_nan_stats=True,
            parameters=parameters,
            name=type(self).__name__,
        )

    @abc.abstractmethod
    def standard_log_prob(self, size: tf.Tensor) -> tf.Tensor:
        """Returns the log-density at ±size for location 0 and scale 1."""

    @abc.abstractmethod
    def tail(self, size: tf.Tensor) -> tf.Tensor:
        """Returns the probability above `size ≥ 0`, which is at most ½."""

    @abc.abstractmethod
    def tail_quantile(self, probability: tf.Tensor) -> tf.Tensor:
        """Returns the size whose tail has a probability in (0, ½]."""

    @abc.abstractmethod
    def standard_variance(self) -> float:
        """Returns the variance for scale 1."""

    @classmethod
    def _parameter_properties(
        cls, dtype: Any, num_classes: Any = None
    ) -> dict[str, Any]:
        properties = tfp.util.ParameterProperties
        return {"loc": properties(), "scale": properties()}

    def _event_shape_tensor(self) -> tf.Tensor:
        return tf.constant([], tf.int32)

    def _event_shape(self) -> tf.TensorShape:
        return tf.TensorShape([])

    def _log_prob(self, value: tf.Tensor) -> tf.Tensor:
        size = tf.abs((value - self.loc) / self.scale)
        return self.standard_log_prob(size) - tf.math.log(self.scale)

    def _cdf(self, value: tf.Tensor) -> tf.Tensor:
        z = (value - self.loc) / self.scale
        tail = self.tail(tf.abs(z))
        return tf.where(z < 0, tail, 1.0 - tail)

    def _quantile(self, value: tf.Tensor) -> tf.Tensor:
        size = self.tail_quantile(tf.minimum(value, 1.0 - value))
        return self.loc + self.scale * tf.where(value < 0.5, -size, size)

    def _sample_n(self, n: tf.Tensor, seed: Any = None) -> tf.Tensor:
        shape = tf.concat([[n], self.batch_shape_tensor()], axis=0)
        seed = tfp.random.sanitize_seed(seed)
        seeds = tf.unstack(tf.random.split(seed, num=2, alg="philox"))
        uniform, sign = (
            tf.random.stateless_uniform(
                shape, seed=each, dtype=self.dtype, alg="philox"
            )
            for each in seeds
        )
        # In (0, ½]: a tail of probability zero is at infinity.
        size = self.tail_quantile(0.5 * (1.0 - uniform))
        return self.loc + self.scale * tf.where(sign < 0.5, -size, size)

    def _mean(self) -> tf.Tensor:
        return self.loc + tf.zeros_like(self.scale)

    def _variance(self) -> tf.Tensor:
        variance = tf.square(self.scale) * self.standard_variance()
        return variance + tf.zeros_like(self.loc)


class HyperbolicSecant(Symmetric):
    """Density `1 / (π cosh z)`.

    Args:
        loc: Tensor, the location.
        scale: Positive tensor, the scale.
    """

    def standard_log_prob(self, size: tf.Tensor) -> tf.Tensor:
        """Returns `−log cosh − log π`."""
        # log cosh z = z + log(1 + e^(−2z)) − log 2 does not overflow.
        rest = tf.math.log1p(tf.exp(-2.0 * size))
        return math.log(2.0 / math.pi) - size - rest

    def tail(self, size: tf.Tensor) -> tf.Tensor:
        """Returns `(2/π) arctan(e⁻ᶻ)`."""
        return (2.0 / math.pi) * tf.atan(tf.exp(-size))

    def tail_quantile(self, probability: tf.Tensor) -> tf.Tensor:
        """Returns `−log tan(π/2 q)`."""
        return -tf.math.log(tf.tan((0.5 * math.pi) * probability))

    def standard_variance(self) -> float:
        """Returns `π²/4`."""
        return math.pi**2 / 4.0


class Huber(Symmetric):
    """Density proportional to `exp(−huber(z))`: normal, with Laplace tails.

    Args:
        loc: Tensor, the location.
        scale: Positive tensor, the scale.
        delta: Positive number, where the tails begin.
    """

    def __init__(self, loc: tf.Tensor, scale: tf.Tensor, delta: float) -> None:
        self.delta = delta
        self.inside, self.outside, self.normaliser = huber_masses(delta)
        super().__init__(loc, scale, delta=delta)

    @classmethod
    def _parameter_properties(
        cls, dtype: Any, num_classes: Any = None
    ) -> dict[str, Any]:
        # δ is a Python number, not a tensor, and has no shape.
        delta = tfp.util.ParameterProperties(
            specifies_shape=False, is_tensor=False
        )
        return {**super()._parameter_properties(dtype), "delta": delta}

    def standard_log_prob(self, size: tf.Tensor) -> tf.Tensor:
        """Returns `−huber − log Z`."""
        # ½z² up to δ and δ(z − ½δ) beyond, without a square that overflows.
        clipped = tf.minimum(size, self.delta)
        return -clipped * (size - 0.5 * clipped) - math.log(self.normaliser)

    def tail(self, size: tf.Tensor) -> tf.Tensor:
        """Returns the mass of the exponential and of the normal part."""
        beyond = tf.maximum(size - self.delta, 0.0)
        exponential = 0.5 * self.outside * tf.exp(-self.delta * beyond)
        root = math.sqrt(0.5)
        middle = tf.math.erf(root * tf.minimum(size, self.delta))
        weight = math.sqrt(0.5 * math.pi) / self.normaliser
        return exponential + weight * (math.erf(root * self.delta) - middle)

    def tail_quantile(self, probability: tf.Tensor) -> tf.Tensor:
        """Returns the inverse of `tail`, piece by piece."""
        half = tf.constant(0.5 * self.outside, probability.dtype)
        far = tf.math.log(half / tf.minimum(probability, half)) / self.delta
        weight = math.sqrt(0.5 * math.pi) / self.normaliser
        mass = (tf.maximum(probability, half) - half) / weight
        # Rounding must not leave the domain [0, 1) of the inverse.
        near = tf.math.erfinv(
            tf.maximum(math.erf(math.sqrt(0.5) * self.delta) - mass, 0.0)
        )
        near = tf.minimum(math.sqrt(2.0) * near, self.delta)
        return tf.where(probability < half, self.delta + far, near)

    def standard_variance(self) -> float:
        """Returns `P + 2 Q (1 + 1/δ²)`, P and Q the masses of the parts."""
        return self.inside + 2.0 * self.outside * (1.0 + self.delta**-2)
