"""Learning rate and momentum, given or from the quadratic model."""

from __future__ import annotations

from dataclasses import dataclass

import tensorflow as tf

# Two directions whose normalised Gram determinant is below this are parallel
# to rounding, and the second one is left out.
_PARALLEL = 1e-6
# Largest momentum that the quadratic model may choose.
_MOST_MOMENTUM = 1.0
# Largest ratio of a layer's rate to the common one, and of that to the layer's.
_SPREAD = 3.0


@dataclass(frozen=True)
class StepLength:
    """How the update `δ = α Δ + μ δ₋₁` gets its two coefficients.

    Attributes:
        automatic_rate: α from the quadratic model.
        momentum: μ, or `None` for μ from the quadratic model.
        spring: μ of SPRING, which is part of Δ; zero for none. The momentum is
            zero then.
    """

    automatic_rate: bool
    momentum: float | None
    spring: float = 0.0

    @property
    def needs_model(self) -> bool:
        """Whether any coefficient comes from the quadratic model."""
        return self.automatic_rate or self.momentum is None


def quadratic_coefficients(
    gram: tf.Tensor,
    slopes: tf.Tensor,
    length: StepLength,
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
        length: Which coefficients are free.
        learning_rate: Scalar. The value of α where it is not free.

    Returns:
        Tensor `[2]`.
    """
    rate = tf.cast(learning_rate, gram.dtype)
    if length.automatic_rate and length.momentum is None:
        return _both(gram, slopes)
    if length.automatic_rate:
        momentum = tf.constant(length.momentum, gram.dtype)
        rate = -_divide(slopes[0] + gram[0, 1] * momentum, gram[0, 0])
        return tf.stack([rate, momentum])
    if length.momentum is None:
        momentum = -_divide(slopes[1] + gram[0, 1] * rate, gram[1, 1])
        return tf.stack([rate, momentum])
    return tf.stack([rate, tf.constant(length.momentum, gram.dtype)])


def layer_coefficients(
    gram: tf.Tensor,
    slopes: tf.Tensor,
    length: StepLength,
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
    its own gradient. So no rate is outside [α/3, 3α].

    Args:
        gram: Tensor `[L + 1, L + 1]`, Q, with δ₋₁ last.
        slopes: Tensor `[L + 1]`, b.
        length: `StepLength`, with the rate free.
        learning_rate: Scalar.
        samples: n, scalar.

    Returns:
        Tensor `[L + 1]`.
    """
    layers = int(gram.shape[0]) - 1
    common = quadratic_coefficients(
        of_all_layers(gram), of_all_layers(slopes), length, learning_rate
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
    bounds = tf.stack([common[0] / _SPREAD, common[0] * _SPREAD])
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


def _both(gram: tf.Tensor, slopes: tf.Tensor) -> tf.Tensor:
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
    most = tf.constant(_MOST_MOMENTUM, gram.dtype)
    bounded = tf.stack(
        [-_divide(slopes[0] + gram[0, 1] * most, gram[0, 0]), most]
    )
    both = tf.where(both[1] > most, bounded, both)
    return tf.where(usable & (both[1] >= 0), both, alone)


def _divide(numerator: tf.Tensor, denominator: tf.Tensor) -> tf.Tensor:
    return tf.math.divide_no_nan(numerator, denominator)
