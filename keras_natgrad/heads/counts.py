"""Families of counts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_natgrad.checks import check_integer
from keras_natgrad.heads.family import Family, Information, Parameter
from keras_natgrad.heads.probability import distributions
from keras_natgrad.heads.special import dispersion_information, zero_truncation


@keras.saving.register_keras_serializable(package="keras_natgrad")
class Poisson(Family):
    r"""Poisson targets: counts.

    The Fisher matrix in log rate is the rate.

    Args:
        rate: The rate, a number or a link. Defaults to `"exp"`.

    Raises:
        ValueError: If an argument is neither a number in its range nor a link.
    """

    parameters = (Parameter("rate", "positive"),)
    distribution_name = "Poisson"
    target_support = "count"
    in_float64 = True

    def __init__(self, rate: float | str | Any = "exp") -> None:
        super().__init__(rate=rate)

    def information(self, values: dict[str, tf.Tensor]) -> Information:
        """Returns the Fisher matrix of each unit in its coordinates."""
        return Information((values["rate"],))


@keras.saving.register_keras_serializable(package="keras_natgrad")
class Geometric(Family):
    r"""Geometric targets: failures before the first success.

    The Fisher matrix in the logit of the probability p of success is `1 − p`.

    Args:
        probs: The probability of success, a number or a link. Defaults to
            `"sigmoid"`.

    Raises:
        ValueError: If an argument is neither a number in its range nor a link.
    """

    parameters = (Parameter("probs", "unit"),)
    distribution_name = "Geometric"
    target_support = "count"

    def __init__(self, probs: float | str | Any = "sigmoid") -> None:
        super().__init__(probs=probs)

    def information(self, values: dict[str, tf.Tensor]) -> Information:
        """Returns the Fisher matrix of each unit in its coordinates."""
        return Information((tf.sigmoid(-values["probs"]),))


@keras.saving.register_keras_serializable(package="keras_natgrad")
class NegativeBinomial(Family):
    r"""Negative binomial targets by their mean: overdispersed counts.

    The variance is `mean + mean² / total_count`. The Fisher matrix in
    (log mean, log total_count), with μ and r, is diagonal:

        log mean:         r μ / (r + μ)
        log total_count:  r² (ψ₁(r) − E ψ₁(r + Y) − μ / (r (r + μ))).

    Args:
        mean: The mean, a number or a link. Defaults to `"softplus"`.
        total_count: The number of failures, the inverse dispersion, a number or
            a link. Defaults to `"softplus"`.

    Raises:
        ValueError: If an argument is neither a number in its range nor a link.

    References:
        - Lawless, 1987.
    """

    parameters = (
        Parameter("mean", "positive"),
        Parameter("total_count", "positive"),
    )
    target_support = "count"
    in_float64 = True

    def __init__(
        self,
        mean: float | str | Any = "softplus",
        total_count: float | str | Any = "softplus",
    ) -> None:
        super().__init__(mean=mean, total_count=total_count)

    def units(self, values: dict[str, tf.Tensor]) -> Any:
        """Builds the units' distributions; see `Family.units()`."""
        mean, count = values["mean"], values["total_count"]
        return distributions().NegativeBinomial(
            count, logits=tf.math.log(mean) - tf.math.log(count)
        )

    def information(self, values: dict[str, tf.Tensor]) -> Information:
        """Returns the Fisher matrix of each unit in its coordinates."""
        mean, count = values["mean"], values["total_count"]
        wide_mean = tf.cast(mean, tf.float64)
        logits = tf.math.log(wide_mean) - tf.math.log(
            tf.cast(count, tf.float64)
        )
        return Information(
            (
                mean / (1.0 + mean / count),
                dispersion_information(logits, count),
            )
        )


@keras.saving.register_keras_serializable(package="keras_natgrad")
class NegativeBinomialLogits(Family):
    r"""Negative binomial targets by the probability of success.

    They count successes before `total_count` failures, as in TensorFlow
    Probability. The Fisher matrix in (logit probs, log total_count), with p and
    r, is `[[r p, r p], [·, r p + J]]` where J is the information of log
    total_count given the mean.

    Args:
        probs: The probability of success, a number or a link. Defaults to
            `"sigmoid"`.
        total_count: The number of failures, a number or a link. Defaults to
            `"softplus"`.

    Raises:
        ValueError: If an argument is neither a number in its range nor a link.
    """

    parameters = (
        Parameter("probs", "unit"),
        Parameter("total_count", "positive"),
    )
    distribution_name = "NegativeBinomial"
    target_support = "count"
    in_float64 = True

    def __init__(
        self,
        probs: float | str | Any = "sigmoid",
        total_count: float | str | Any = "softplus",
    ) -> None:
        super().__init__(probs=probs, total_count=total_count)

    def information(self, values: dict[str, tf.Tensor]) -> Information:
        """Returns the Fisher matrix of each unit in its coordinates."""
        logits, count = values["probs"], values["total_count"]
        slope = count * tf.sigmoid(logits)
        complement = dispersion_information(logits, count)
        return Information(
            (slope, slope + complement), coupling=slope, schur=complement
        )


@keras.saving.register_keras_serializable(package="keras_natgrad")
class ZeroInflatedPoisson(Family):
    r"""Poisson targets with extra zeros.

    With probability π (`probs`) a target is zero, otherwise Poisson with rate
    λ. The Fisher matrix in (logit π, log λ), with `e = exp(−λ)` and
    `P₀ = π + (1 − π) e`, is

        logit π:  π² (1 − π) (1 − e) / P₀
        log λ:    (1 − π) λ (1 − π λ e / P₀)
        both:     −π (1 − π) λ e / P₀.

    Args:
        probs: The probability of an extra zero, a number or a link. Defaults
            to `"sigmoid"`.
        rate: The rate, a number or a link. Defaults to `"exp"`.

    Raises:
        ValueError: If an argument is neither a number in its range nor a link.
    """

    parameters = (
        Parameter("probs", "unit"),
        Parameter("rate", "positive"),
    )
    target_support = "count"
    in_float64 = True

    def __init__(
        self,
        probs: float | str | Any = "sigmoid",
        rate: float | str | Any = "exp",
    ) -> None:
        super().__init__(probs=probs, rate=rate)

    def units(self, values: dict[str, tf.Tensor]) -> Any:
        """Builds the units' distributions; see `Family.units()`."""
        # Not with its logits argument, which TFP 0.25 counts twice.
        tfd = distributions()
        return tfd.Inflated(
            tfd.Poisson(values["rate"]),
            inflated_loc_probs=tf.sigmoid(values["probs"]),
        )

    def unit_log_prob(
        self, values: dict[str, tf.Tensor], targets: tf.Tensor
    ) -> tf.Tensor:
        """Returns the log-probability of each unit."""
        extra = tf.math.log_sigmoid(values["probs"])
        kept = tf.math.log_sigmoid(-values["probs"])
        counts = distributions().Poisson(values["rate"]).log_prob(targets)
        # log(π + (1 − π) e^{−λ}) from logarithms.
        zero = extra + tf.nn.softplus(kept - values["rate"] - extra)
        return tf.where(tf.equal(targets, 0), zero, kept + counts)

    def information(self, values: dict[str, tf.Tensor]) -> Information:
        """Returns the Fisher matrix of each unit in its coordinates."""
        logits, rate = values["probs"], values["rate"]
        extra, kept = tf.sigmoid(logits), tf.sigmoid(-logits)
        empty, positive = tf.exp(-rate), -tf.math.expm1(-rate)
        zero = extra + kept * empty
        return Information(
            (
                tf.square(extra) * kept * positive / zero,
                kept * rate * (1.0 - extra * rate * empty / zero),
            ),
            coupling=-extra * kept * rate * empty / zero,
            schur=kept * rate * zero_truncation(rate),
        )


@keras.saving.register_keras_serializable(package="keras_natgrad")
class Binomial(Family):
    """Binomial targets: successes in a fixed number of trials.

    The Fisher matrix in the logit of the probability p of success is
    `n p (1 − p)`.

    Args:
        total_count: Number of trials n, at least 1.
        probs: The probability of success, a number or a link. Defaults to
            `"sigmoid"`.

    Raises:
        ValueError: If `total_count` is not a positive integer, or `probs` is
            neither a number between 0 and 1 nor a link.
    """

    parameters = (Parameter("probs", "unit"),)
    target_support = "count"

    def __init__(
        self, total_count: float, probs: float | str | Any = "sigmoid"
    ) -> None:
        super().__init__(probs=probs)
        self.total_count = float(check_integer("total_count", total_count))

    def units(self, values: dict[str, tf.Tensor]) -> Any:
        """Builds the units' distributions; see `Family.units()`."""
        logits = values["probs"]
        count = tf.constant(self.total_count, logits.dtype)
        return distributions().Binomial(count, logits=logits)

    def information(self, values: dict[str, tf.Tensor]) -> Information:
        """Returns the Fisher matrix of each unit in its coordinates."""
        logits = values["probs"]
        spread = tf.sigmoid(logits) * tf.sigmoid(-logits)
        return Information((self.total_count * spread,))

    def targets_in_support(
        self, outputs: tf.Tensor, targets: tf.Tensor
    ) -> tf.Tensor:
        """Tells whether all targets are counts of at most n."""
        counts = super().targets_in_support(outputs, targets)
        most = tf.reduce_max(tf.cast(targets, tf.float64))
        return counts & (most <= self.total_count)

    def describe_support(self, outputs_shape: Sequence[int | None]) -> str:
        """Says in words which targets the head accepts."""
        return f"integers from 0 to {self.total_count:g}"

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments of the constructor."""
        return {"total_count": self.total_count, **super().get_config()}
