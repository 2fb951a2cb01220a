"""The minimum of the quadratic model of the loss along a few directions."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import tensorflow as tf

from keras_natgrad.step.trust_region import norm_scale

# Two directions whose normalised Gram determinant is below this are parallel
# to rounding, and the second one is left out.
_PARALLEL = 1e-6


class Free(Protocol):
    """Which coefficients of `δ = −α Δ + μ δ₋₁` the model chooses.

    Attributes:
        automatic_rate: Whether it chooses α.
        momentum: μ, or `None` if the model chooses it.
        most_momentum: Largest μ that it may choose.
        spread: Largest ratio of a layer's rate to the common one, and of that
            to the layer's.
    """

    @property
    def automatic_rate(self) -> bool:
        """See above."""

    @property
    def momentum(self) -> float | None:
        """See above."""

    @property
    def most_momentum(self) -> float:
        """See above."""

    @property
    def spread(self) -> float:
        """See above."""


class Decision(NamedTuple):
    """The coefficients of a step, and what the quadratic model says of them.

    Attributes:
        coefficients: Tensor `[2]`, (α, μ), or `[parts + 1]` with an α for
            each part.
        learning_rate: α, or the mean of the parts' rates, weighted by their
            slopes `∇ᵀP∇`.
        change: Predicted change of the loss, `None` without a model.
        fisher_share: `δᵀFδ / δᵀ(F + λD)δ`, in [0, 1], D the metric of the
            damping; `None` without a model.
    """

    coefficients: tf.Tensor
    learning_rate: tf.Tensor
    change: tf.Tensor | None = None
    fisher_share: tf.Tensor | None = None


class Quadratic(NamedTuple):
    """The model `M(c) = bᵀc + ½ cᵀ(Q + R)c` along −Δ (or its parts) and δ₋₁.

    Attributes:
        gram: Q, `δ_iᵀ F δ_j`, tensor `[n, n]` with δ₋₁ last.
        damped: Q + R, with the damping and the regularizers.
        slopes: b, `∇ᵀδ_i`, tensor `[n]`.
        bound: Largest `δᵀFδ`, or `None`.
    """

    gram: tf.Tensor
    damped: tf.Tensor
    slopes: tf.Tensor
    bound: float | None

    @classmethod
    def along(
        cls,
        gram: tf.Tensor,
        ridge: tf.Tensor,
        slopes: tf.Tensor,
        bound: float | None,
    ) -> Quadratic:
        """Returns the model from products with +Δ; the sign enters here.

        Args:
            gram: Tensor `[n, n]`, with Δ or its parts first.
            ridge: Likewise, of the damping and the regularizers.
            slopes: Tensor `[n]`.
            bound: See the class.
        """
        ones = tf.ones([int(slopes.shape[0]) - 1], slopes.dtype)
        signs = tf.concat([-ones, [1.0]], axis=0)
        both = signs[:, tf.newaxis] * signs
        gram = gram * both
        return cls(gram, gram + ridge * both, slopes * signs, bound)

    def decide(self, coefficients: tf.Tensor) -> Decision:
        """Returns coefficients inside the trust region, and their promise."""
        if self.bound is not None:
            coefficients *= norm_scale(
                quadratic_form(self.gram, coefficients), self.bound
            )
        rate = coefficients[0]
        if coefficients.shape[0] > 2:
            shares = tf.math.divide_no_nan(
                self.slopes, tf.reduce_sum(self.slopes[:-1])
            )
            rate = tf.tensordot(shares[:-1], coefficients[:-1], axes=1)
        return Decision(
            coefficients,
            rate,
            model_change(self.damped, self.slopes, coefficients),
            tf.math.divide_no_nan(
                quadratic_form(self.gram, coefficients),
                quadratic_form(self.damped, coefficients),
            ),
        )


class QuadraticForm(NamedTuple):
    """The quadratic model of a step.

    Attributes:
        common: Along the whole of −Δ and δ₋₁.
        parts: Along the parts of −Δ and δ₋₁, or `None`.
        few: Scalar bool: the batch has too few examples for rates by part.
        samples: int32 scalar, how many samples the estimate of Q is the mean
            of.
    """

    common: Quadratic
    parts: Quadratic | None = None
    few: tf.Tensor | None = None
    samples: tf.Tensor | None = None


def quadratic_coefficients(
    gram: tf.Tensor,
    slopes: tf.Tensor,
    free: Free,
    learning_rate: tf.Tensor,
) -> tf.Tensor:
    """Returns (α, μ) that minimise the quadratic model, as far as free.

    The model of the loss change along `c₁ Δ + c₂ δ₋₁` is

        M(c) = bᵀ c + ½ cᵀ Q c,   b = (∇ᵀΔ, ∇ᵀδ₋₁),   Q_ij = δ_iᵀ (F + λI) δ_j

    (Martens & Grosse 2015, section 7). Free coefficients minimise it with
    the given ones held. A previous update of zero (the first step), or one
    parallel to Δ, gets no weight of its own.

    Args:
        gram: Tensor `[2, 2]`, Q.
        slopes: Tensor `[2]`, b.
        free: Which coefficients are free.
        learning_rate: Scalar. The value of α where it is not free.

    Returns:
        Tensor `[2]`.
    """
    rate = tf.cast(learning_rate, gram.dtype)
    if free.automatic_rate and free.momentum is None:
        return _both(gram, slopes, free)
    if free.automatic_rate:
        momentum = tf.constant(free.momentum, gram.dtype)
        rate = -_divide(slopes[0] + gram[0, 1] * momentum, gram[0, 0])
        return tf.stack([rate, momentum])
    if free.momentum is None:
        momentum = -_divide(slopes[1] + gram[0, 1] * rate, gram[1, 1])
        return tf.stack([rate, momentum])
    return tf.stack([rate, tf.constant(free.momentum, gram.dtype)])


def layer_coefficients(
    gram: tf.Tensor,
    slopes: tf.Tensor,
    free: Free,
    learning_rate: tf.Tensor,
    samples: tf.Tensor | float,
) -> tf.Tensor:
    """Returns (α₁, …, α_L, μ): a rate for each layer's part of Δ.

    `quadratic_coefficients` gives the best common α, and μ. Around them each
    layer's rate `α + e_l` minimises

        M(c) + ½ (1 + 2 L/n) Σ_l Q_ll e_l²,

    with the model M of `quadratic_coefficients` along the parts Δ_l and
    δ₋₁. The inverse of each block is right only up to a factor, and does not
    know the other layers; both show in M. The second term, as large as the
    layers' own part in the curvature of M, keeps in check what the few
    examples of a batch say of so many coefficients. Where Q is the mean over n
    samples, the slope of M along one layer has the variance of L others that
    are as large, over n. Wiener's factor for signal and noise in that ratio,
    1/(1 + L/n), is that of e with L/n in the second term. A layer with a part
    of zero has the common rate.

    A layer that is coupled to the others and has little slope of its own may
    still get many times the common rate, or a negative one, which takes it up
    its own gradient. So no rate is outside [α/s, s α] with the spread s.

    Args:
        gram: Tensor `[L + 1, L + 1]`, Q, with δ₋₁ last.
        slopes: Tensor `[L + 1]`, b.
        free: Which coefficients are free; the rate is.
        learning_rate: Scalar.
        samples: n, scalar.

    Returns:
        Tensor `[L + 1]`.
    """
    layers = int(gram.shape[0]) - 1
    common = quadratic_coefficients(
        of_all_layers(gram), of_all_layers(slopes), free, learning_rate
    )
    rates = for_each_layer(common, layers)
    slope = (slopes + tf.linalg.matvec(gram, rates))[:layers]
    own = gram[:layers, :layers]
    # In units of √Q_ll the equations are (Q + k diag Q) e = −slope with a unit
    # diagonal: the matrix has no eigenvalue below k = 1 + 2 L/n.
    unit = tf.math.reciprocal_no_nan(tf.sqrt(tf.linalg.diag_part(own)))
    identity = tf.eye(layers, dtype=own.dtype)
    weight = 1 + 2 * layers / tf.cast(samples, own.dtype)
    matrix = own * unit * unit[:, tf.newaxis] + weight * identity
    finite = tf.math.is_finite(tf.reduce_sum(matrix))
    matrix = tf.where(finite, matrix, identity)
    deviations = -unit * tf.squeeze(
        tf.linalg.cholesky_solve(
            tf.linalg.cholesky(matrix), (unit * slope)[:, tf.newaxis]
        ),
        axis=1,
    )
    # With both coefficients free, α may be negative.
    bounds = tf.stack([common[0] / free.spread, common[0] * free.spread])
    found = tf.clip_by_value(
        common[0] + deviations, tf.reduce_min(bounds), tf.reduce_max(bounds)
    )
    return tf.concat([found, common[1:]], axis=0)


def of_all_layers(values: tf.Tensor) -> tf.Tensor:
    """Returns products with Δ and δ₋₁, from those with the parts of Δ.

    Args:
        values: Tensor `[L + 1]` or `[L + 1, L + 1]`, with δ₋₁ last.

    Returns:
        Tensor `[2]` or `[2, 2]`.
    """
    for axis in range(values.shape.rank):
        layers, last = tf.split(values, [values.shape[axis] - 1, 1], axis=axis)
        total = tf.reduce_sum(layers, axis=axis, keepdims=True)
        values = tf.concat([total, last], axis=axis)
    return values


def for_each_layer(coefficients: tf.Tensor, layers: int) -> tf.Tensor:
    """Returns the coefficients of L parts of Δ, all with its rate, and δ₋₁."""
    rates = tf.fill([layers], coefficients[0])
    return tf.concat([rates, coefficients[1:]], axis=0)


def model_change(
    gram: tf.Tensor, slopes: tf.Tensor, coefficients: tf.Tensor
) -> tf.Tensor:
    """Returns the predicted loss change M(c)."""
    curvature = tf.linalg.matvec(gram, coefficients)
    return tf.tensordot(slopes + 0.5 * curvature, coefficients, axes=1)


def quadratic_form(gram: tf.Tensor, coefficients: tf.Tensor) -> tf.Tensor:
    """Returns `cᵀ Q c`."""
    curvature = tf.linalg.matvec(gram, coefficients)
    return tf.tensordot(coefficients, curvature, axes=1)


def _both(gram: tf.Tensor, slopes: tf.Tensor, free: Free) -> tf.Tensor:
    product = gram[0, 0] * gram[1, 1]
    determinant = product - gram[0, 1] ** 2
    usable = determinant > _PARALLEL * product
    rate = -_divide(slopes[0], gram[0, 0])
    alone = tf.stack([rate, tf.zeros_like(rate)])
    both = -tf.stack(
        [
            gram[1, 1] * slopes[0] - gram[0, 1] * slopes[1],
            gram[0, 0] * slopes[1] - gram[0, 1] * slopes[0],
        ]
    ) / tf.where(usable, determinant, tf.ones_like(determinant))
    # A negative μ would undo what earlier batches agreed on, to fit this one;
    # one above 1 would let it grow without end.
    most = tf.constant(free.most_momentum, gram.dtype)
    bounded = tf.stack(
        [-_divide(slopes[0] + gram[0, 1] * most, gram[0, 0]), most]
    )
    both = tf.where(both[1] > most, bounded, both)
    return tf.where(usable & (both[1] >= 0), both, alone)


def _divide(numerator: tf.Tensor, denominator: tf.Tensor) -> tf.Tensor:
    return tf.math.divide_no_nan(numerator, denominator)
