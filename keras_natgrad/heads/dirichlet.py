"""Heads of concentrations: shares, and counts with varying shares."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from keras_natgrad.checks import check_integer
from keras_natgrad.heads import tensors
from keras_natgrad.heads.base import Head
from keras_natgrad.heads.links import get_link, link_config
from keras_natgrad.heads.probability import distributions
from keras_natgrad.heads.special import trigamma_excess
from keras_natgrad.heads.targets import clip_inside


class _DownDate(NamedTuple):
    """A Fisher matrix `D − D^½ w wᵀ D^½` in the logarithms of K parameters.

    Attributes:
        root: `√D`, `[..., K]`.
        w: `[..., K]`.
        rest: `1 − ‖w‖²`, `[..., 1]`, in [0, 1].
    """

    root: tf.Tensor
    w: tf.Tensor
    rest: tf.Tensor


class _Concentrations(Head):
    """Base class of heads of K concentrations α, at least two.

    The Fisher matrix in log α is diagonal minus rank one, `D − D^½ w wᵀ D^½`; a
    factor of it is `D^½ (I − (1 − √(1 − c)) w wᵀ / c)` with `c = ‖w‖²`. Given D
    and w, all products cost `O(K)`.
    """

    _instead = ""

    def __init__(self, concentration: Any) -> None:
        self._link = get_link(concentration, "concentration", "positive")

    @abc.abstractmethod
    def _down_date(self, alpha: tf.Tensor, total: tf.Tensor) -> _DownDate:
        """Returns D and w from float64 concentrations and their sum."""

    def log_prob(self, outputs: tf.Tensor, targets: tf.Tensor) -> tf.Tensor:
        """Computes the log-probability; see `Head.log_prob()`."""
        outputs = tensors.as_parameters(outputs)
        targets = tensors.match_targets(outputs, targets)
        # In float64, for differences of log Γ at large concentrations.
        wide = self.distribution(tf.cast(outputs, tf.float64))
        log_prob = wide.log_prob(tf.cast(targets, tf.float64))
        return tensors.cast_like(log_prob, outputs)

    def fisher_factor_product(
        self, outputs: tf.Tensor, vector: tf.Tensor
    ) -> tf.Tensor:
        """Multiplies by the factor."""
        scale, w, share = self._factor(outputs)
        vector = tensors.cast_like(vector, w)
        product = scale * _shrink_along(w, share, vector)
        return tensors.cast_like(product, tensors.as_parameters(outputs))

    def fisher_factor_transpose_product(
        self, outputs: tf.Tensor, vector: tf.Tensor
    ) -> tf.Tensor:
        """Multiplies by the transposed factor."""
        scale, w, share = self._factor(outputs)
        vector = scale * tensors.cast_like(vector, w)
        product = _shrink_along(w, share, vector)
        return tensors.cast_like(product, tensors.as_parameters(outputs))

    def validate(self, outputs_shape: Sequence[int | None]) -> None:
        """Checks that there are at least two concentrations."""
        super().validate(outputs_shape)
        if tuple(outputs_shape)[-1] == 1:
            raise ValueError(
                f"A {type(self).__name__} head needs one output per share, at "
                f"least two{self._instead}. Received: "
                f"outputs_shape={tuple(outputs_shape)}"
            )

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments of the constructor."""
        return {"concentration": link_config(self._link)}

    def _factor(
        self, outputs: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """Returns `√D` times the link's slope, w and `(1 − √(1 − c)) / c`."""
        # In float64: one dominant share makes 1 − w² a small difference.
        outputs = tf.cast(outputs, tf.float64)
        alpha = self._link.value(outputs)
        total = tf.reduce_sum(alpha, axis=-1, keepdims=True)
        root, w, rest = self._down_date(alpha, total)
        share = 1.0 / (1.0 + tf.sqrt(tf.clip_by_value(rest, 0.0, 1.0)))
        return self._link.slope(outputs) * root, w, share


def _shrink_along(
    w: tf.Tensor, share: tf.Tensor, vector: tf.Tensor
) -> tf.Tensor:
    """Returns `(I − share · w wᵀ) v`."""
    inner = tf.reduce_sum(w * vector, axis=-1, keepdims=True)
    return vector - share * w * inner


@keras.saving.register_keras_serializable(package="keras_natgrad")
class Dirichlet(_Concentrations):
    """Dirichlet targets: shares that sum to one.

    With α the concentrations and α₀ their sum, the Fisher matrix in log α is
    `diag(α_i² ψ₁(α_i)) − ψ₁(α₀) α αᵀ`. All products cost `O(K)`.

    Args:
        concentration: Link of the concentrations. Defaults to `"softplus"`.

    Raises:
        ValueError: If `concentration` is not a link for positive parameters.
    """

    _instead = "; for one proportion use keras_natgrad.heads.Beta()"

    def __init__(self, concentration: Any = "softplus") -> None:
        super().__init__(concentration)

    def distribution(self, outputs: tf.Tensor) -> Any:
        """Builds the `Dirichlet` distribution."""
        outputs = tensors.as_parameters(outputs)
        return distributions().Dirichlet(self._link.value(outputs))

    def sample(self, outputs: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        """Draws shares, none of which is rounded to zero."""
        draws = super().sample(outputs, seed)
        return clip_inside(draws, "positive")

    def targets_in_support(
        self, outputs: tf.Tensor, targets: tf.Tensor
    ) -> tf.Tensor:
        """Tells whether all targets are positive shares that sum to one."""
        targets = tensors.match_targets(tensors.as_parameters(outputs), targets)
        total = tf.reduce_sum(targets, axis=-1)
        return tf.reduce_all(targets > 0) & tf.reduce_all(
            tf.abs(total - 1.0) < 1e-3
        )

    def describe_support(self, outputs_shape: Sequence[int | None]) -> str:
        """Says in words which targets the head accepts."""
        return "positive shares that sum to 1; shrink zeros inwards"

    def _down_date(self, alpha: tf.Tensor, total: tf.Tensor) -> _DownDate:
        h, h_total = trigamma_excess(alpha), trigamma_excess(total)
        root = tf.sqrt(alpha + h)
        w = tf.sqrt(total + h_total) * (alpha / total) / root
        # 1 − c = ψ₁(α₀) (Σ r(α_i) − r(α₀)) with r(x) = x − 1/ψ₁(x), which
        # does not cancel if the concentrations are large.
        trigamma = (1.0 + h_total / total) / total
        rest = trigamma * (
            tf.reduce_sum(_remainder(alpha, h), axis=-1, keepdims=True)
            - _remainder(total, h_total)
        )
        return _DownDate(root, w, rest)


@keras.saving.register_keras_serializable(package="keras_natgrad")
class DirichletMultinomial(_Concentrations):
    r"""Counts of K classes in n draws, with shares that vary by example.

    The counts are multinomial with shares from a Dirichlet distribution, so
    they vary more than multinomial counts; for two classes they are
    beta-binomial. With α the concentrations and α₀ their sum, the Fisher matrix
    in log α is

        diag(α_j² E[ψ₁(α_j) − ψ₁(α_j + Y_j)]) − (ψ₁(α₀) − ψ₁(α₀ + n)) α αᵀ.

    Each count is beta-binomial, so the expectation is the finite sum
    `Σ_{i<n} P(Y_j > i) / (α_j + i)²`. It costs `O(n K)` per example. One draw
    says nothing about α₀, and the matrix is then that of `Categorical`.

    Args:
        total_count: Number of draws n, a positive integer.
        concentration: Link of the concentrations. Defaults to `"softplus"`.

    Raises:
        ValueError: If `total_count` is not a positive integer, or
            `concentration` not a link for positive parameters.

    References:
        - Mosimann, 1962, "On the compound multinomial distribution".
    """

    def __init__(
        self, total_count: float, concentration: Any = "softplus"
    ) -> None:
        super().__init__(concentration)
        self.total_count = float(check_integer("total_count", total_count))

    def distribution(self, outputs: tf.Tensor) -> Any:
        """Builds the `DirichletMultinomial` distribution."""
        alpha = self._link.value(tensors.as_parameters(outputs))
        count = tf.constant(self.total_count, alpha.dtype)
        return distributions().DirichletMultinomial(count, alpha)

    def targets_in_support(
        self, outputs: tf.Tensor, targets: tf.Tensor
    ) -> tf.Tensor:
        """Tells whether all targets are counts with the right total."""
        targets = tensors.match_targets(tensors.as_parameters(outputs), targets)
        return tensors.are_counts(targets, self.total_count)

    def describe_support(self, outputs_shape: Sequence[int | None]) -> str:
        """Says in words which targets the head accepts."""
        return f"counts per class that sum to {self.total_count:g}"

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments of the constructor."""
        return {"total_count": self.total_count, **super().get_config()}

    def _down_date(self, alpha: tf.Tensor, total: tf.Tensor) -> _DownDate:
        # With r_i = α₀/(α₀ + i), s_ji = α_j/(α_j + i) and p = α/α₀,
        #     D_j = Σ_i P(Y_j > i) s_ji²,    w_j = p_j √(Σ_i r_i² / D_j).
        n = int(self.total_count)
        survival = _survival(alpha, n)
        i = tf.range(n, dtype=alpha.dtype)
        r_kept, r_lost = _shrinkage(total, i, tf.ones_like(i))
        d, d_lost = _shrinkage(alpha, i, survival)
        p = alpha / total
        # As Σ_i P(Y_j > i) = n p_j, 1 − ‖w‖² is Σ_i r_i² / n times the excess
        # of Σ (1 − r²) / Σ r² over the mean of the same for s: no large terms.
        excess = r_lost / r_kept - tf.reduce_sum(
            p * d_lost / d, axis=-1, keepdims=True
        )
        return _DownDate(
            tf.sqrt(d), p * tf.sqrt(r_kept / d), r_kept / n * excess
        )


def _survival(alpha: tf.Tensor, count: int) -> tf.Tensor:
    """Returns `P(Y_j > i)`, i = 0 … n − 1, of the beta-binomial marginals.

    Args:
        alpha: Concentrations, `[..., K]`.
        count: n.

    Returns:
        Tensor `[..., K, n]`.
    """
    # Not α₀ − α_j, which cancels if one dominates.
    others = tf.cumsum(alpha, axis=-1, exclusive=True)
    others += tf.cumsum(alpha, axis=-1, exclusive=True, reverse=True)
    a, b = alpha[..., tf.newaxis], others[..., tf.newaxis]
    i = tf.range(count, dtype=alpha.dtype)
    # log P(i + 1) − log P(i); the log Γ of P itself would cancel.
    left = count - i
    steps = tf.math.log(left * (a + i) / ((i + 1.0) * (b + left - 1.0)))
    zero = tf.zeros_like(steps[..., :1])
    mass = tf.nn.softmax(
        tf.concat([zero, tf.cumsum(steps, axis=-1)], axis=-1), axis=-1
    )
    return tf.cumsum(mass, axis=-1, reverse=True)[..., 1:]


def _shrinkage(
    concentration: tf.Tensor, i: tf.Tensor, weights: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns `Σ_i v_i s_i²` and `Σ_i v_i (1 − s_i²)`, `s_i = c / (c + i)`."""
    c = concentration[..., tf.newaxis]
    square = tf.square(c + i)
    return (
        tf.reduce_sum(weights * tf.square(c) / square, axis=-1),
        tf.reduce_sum(weights * (i * (2.0 * c + i) / square), axis=-1),
    )


def _remainder(x: tf.Tensor, excess: tf.Tensor) -> tf.Tensor:
    """Returns `x − 1/ψ₁(x)`."""
    return x * excess / (x + excess)
