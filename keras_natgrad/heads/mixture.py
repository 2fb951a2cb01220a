"""Mixtures of normal distributions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_natgrad.checks import check_integer, check_probability
from keras_natgrad.heads import tensors
from keras_natgrad.heads.base import Head
from keras_natgrad.heads.categorical import Categorical
from keras_natgrad.heads.generic import Distribution
from keras_natgrad.heads.normal import Normal
from keras_natgrad.heads.probability import (
    bijectors,
    distributions,
    mathematics,
)

#: How `NormalMixture` finds its Fisher matrix.
METHODS = ("monte_carlo", "complete_data")
# Limit for the search for a quantile, which ends at the last digit.
_MOST_ITERATIONS = 100


@keras.saving.register_keras_serializable(package="keras_natgrad")
class NormalMixture(Head):
    r"""A mixture of normals: one target with several likely values.

    The outputs are the C logits of the components, their C means and, unless
    the scale is fixed, their C raw scales. The Fisher matrix of a mixture has
    no closed form:

    - `fisher="monte_carlo"`: the average over `samples` draws of the outer
      products of their scores, unbiased, as in `heads.Distribution`.
    - `fisher="complete_data"`: the Fisher matrix for targets that come with
      their component. With the shares π it is exact and block-diagonal,

          logits: diag(π) − π πᵀ,    component k: π_k × that of Normal,

      and an upper bound, because not observing the component loses information.
      The more the components overlap, the shorter the steps. Products cost
      `O(C)`.

    Args:
        components: Number of components C, at least 2.
        scale: The standard deviations, a positive number or the link that
            makes them from the outputs. Defaults to `"softplus"`.
        fisher: `"monte_carlo"` (the default) or `"complete_data"`.
        samples: Draws of `"monte_carlo"`. Defaults to `16`.

    Raises:
        ValueError: If an argument is out of its range.

    References:
        - [Bishop, 1994](https://publications.aston.ac.uk/id/eprint/373/)
        - Dempster, Laird & Rubin, 1977.
    """

    def __init__(
        self,
        components: int,
        scale: float | str | Any = "softplus",
        fisher: str = "monte_carlo",
        samples: int = 16,
    ) -> None:
        self.components = check_integer("components", components, least=2)
        self.samples = check_integer("samples", samples)
        if fisher not in METHODS:
            raise ValueError(
                f"`fisher` must be one of {METHODS}. Received: "
                f"fisher={fisher!r}"
            )
        self.method = fisher
        self._weights = Categorical()
        self._units = Normal(scale)
        self.parameter_count = self.components * (
            1 + len(self._units.parameter_names)
        )
        self._sampled = Distribution(
            self._by_residuals,
            self.parameter_count,
            method="monte_carlo",
            samples=self.samples,
        )

    def distribution(self, outputs: tf.Tensor) -> Any:
        """Builds the `MixtureSameFamily` of normals."""
        tfd = distributions()
        logits, loc, scale = self._values(outputs)
        return tfd.MixtureSameFamily(
            tfd.Categorical(logits=logits), tfd.Normal(loc, scale)
        )

    def log_prob(self, outputs: tf.Tensor, targets: tf.Tensor) -> tf.Tensor:
        """Computes the log-density; see `Head.log_prob()`."""
        outputs = tensors.as_parameters(outputs)
        targets = tensors.match_targets(outputs[..., :1], targets)
        return self._by_residuals(outputs).log_prob(targets[..., 0])

    def cdf(self, outputs: tf.Tensor, targets: tf.Tensor) -> tf.Tensor:
        """Returns the distribution function at the targets.

        Args:
            outputs: Tensor or array of shape `[..., K]`.
            targets: Tensor or array of shape `[...]` or `[..., 1]`.

        Returns:
            Tensor `[...]`.
        """
        outputs = tensors.as_parameters(outputs)
        targets = tensors.match_targets(outputs[..., :1], targets)
        return self.distribution(outputs).cdf(targets[..., 0])

    def quantile(self, outputs: tf.Tensor, probability: float) -> tf.Tensor:
        """Returns the value that targets stay below with a probability.

        It lies between the lowest and the highest of the components' quantiles;
        a root search on the distribution function finds it.

        Args:
            outputs: Tensor or array of shape `[..., K]`.
            probability: Number between 0 and 1.

        Returns:
            Tensor `[...]`.

        Raises:
            ValueError: If `probability` is not between 0 and 1.
        """
        check_probability(probability)
        logits, loc, scale = self._values(outputs)
        shares = tf.nn.softmax(logits)
        # The smaller tail, because 1 − p has fewer digits.
        side = 1.0 if probability <= 0.5 else -1.0
        tail = tf.constant(min(probability, 1.0 - probability), loc.dtype)
        ends = loc + side * scale * tf.math.ndtri(tail)
        standard = distributions().Normal(
            tf.zeros([], loc.dtype), tf.ones([], loc.dtype)
        )

        def excess(value: tf.Tensor) -> tf.Tensor:
            z = side * (value[..., tf.newaxis] - loc) / scale
            mass = tf.reduce_sum(shares * standard.cdf(z), axis=-1)
            return side * (mass - tail)

        found = mathematics().find_root_chandrupatla(
            excess,
            low=tf.reduce_min(ends, axis=-1),
            high=tf.reduce_max(ends, axis=-1),
            position_tolerance=tf.zeros([], loc.dtype),  # To the last digit.
            max_iterations=_MOST_ITERATIONS,
        )
        return found.estimated_root

    def factor_rank(self, parameter_count: int) -> int:
        """Returns the number of draws, or of outputs."""
        if self.method == "monte_carlo":
            return self.samples
        return parameter_count

    def fisher_factor_product(
        self, outputs: tf.Tensor, vector: tf.Tensor
    ) -> tf.Tensor:
        """Multiplies by the scores of draws, or block by block."""
        if self.method == "monte_carlo":
            return self._sampled.fisher_factor_product(outputs, vector)
        return self._by_block(
            outputs, vector, lambda head, x, v: head.fisher_factor_product(x, v)
        )

    def fisher_factor_transpose_product(
        self, outputs: tf.Tensor, vector: tf.Tensor
    ) -> tf.Tensor:
        """Multiplies by the transpose, likewise."""
        if self.method == "monte_carlo":
            return self._sampled.fisher_factor_transpose_product(
                outputs, vector
            )
        return self._by_block(
            outputs,
            vector,
            lambda head, x, v: head.fisher_factor_transpose_product(x, v),
        )

    def validate(self, outputs_shape: Sequence[int | None]) -> None:
        """Checks the number of outputs."""
        super().validate(outputs_shape)
        size = tuple(outputs_shape)[-1]
        if size not in (None, self.parameter_count):
            names = ", ".join(("logits", *self._units.parameter_names))
            raise ValueError(
                f"The head {self!r} takes {self.parameter_count} outputs "
                f"({names} of all components). Received: "
                f"outputs_shape={tuple(outputs_shape)}"
            )

    def targets_in_support(
        self, outputs: tf.Tensor, targets: tf.Tensor
    ) -> tf.Tensor:
        """Tells whether all targets are finite numbers."""
        outputs = tensors.as_parameters(outputs)
        targets = tensors.match_targets(outputs[..., :1], targets)
        return tf.reduce_all(tf.math.is_finite(targets))

    def describe_support(self, outputs_shape: Sequence[int | None]) -> str:
        """Says in words which targets the head accepts."""
        return "finite numbers; remove or mask missing values"

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments of the constructor."""
        return {
            "components": self.components,
            **self._units.get_config(),
            "fisher": self.method,
            "samples": self.samples,
        }

    def _by_block(
        self,
        outputs: tf.Tensor,
        vector: tf.Tensor,
        product: Callable[[Head, tf.Tensor, tf.Tensor], tf.Tensor],
    ) -> tf.Tensor:
        """Applies a product to the weights and to the components."""
        outputs = tensors.as_parameters(outputs)
        logits, units = self._split(outputs)
        first, rest = self._split(
            tensors.cast_like(vector, outputs) * tf.ones_like(outputs)
        )
        return tf.concat(
            [
                product(self._weights, logits, first),
                self._roots(logits) * product(self._units, units, rest),
            ],
            axis=-1,
        )

    def _split(self, tensor: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        return tensor[..., : self.components], tensor[..., self.components :]

    def _values(
        self, outputs: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """Returns logits, means and scales, `[..., C]` each."""
        logits, units = self._split(tensors.as_parameters(outputs))
        values = self._units.values(units)
        loc = values["loc"]
        return logits, loc, values["scale"] * tf.ones_like(loc)

    def _by_residuals(self, outputs: tf.Tensor) -> Any:
        """Builds the same distribution from `(y − loc) / scale`.

        TFP's normal subtracts `loc / scale` from `y / scale`, whose gradients
        are only rounding if the scale is small compared with the mean.
        """
        tfd, tfb = distributions(), bijectors()
        logits, loc, scale = self._values(outputs)
        standard = tfd.Normal(tf.zeros_like(loc), tf.ones_like(loc))
        return tfd.MixtureSameFamily(
            tfd.Categorical(logits=logits),
            tfb.Chain([tfb.Shift(loc), tfb.Scale(scale)])(standard),
        )

    def _roots(self, logits: tf.Tensor) -> tf.Tensor:
        """Returns `√π` for each parameter of the components."""
        root = tf.exp(0.5 * tf.nn.log_softmax(logits))
        return tf.concat([root] * len(self._units.parameter_names), axis=-1)
