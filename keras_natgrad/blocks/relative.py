"""Closed forms of the relative Fisher information metric.

The response of a unit to its input is a random variable y whose distribution
depends on the pre-activation `t = wᵀx̃` alone. Its Fisher information is then

    g(w | x) = ν(t) x̃ x̃ᵀ,    ν(t) = E[(∂ log p(y | t) / ∂t)²],

and that of a layer `V(z) ⊗ x̃ x̃ᵀ` per example, with `V = diag(ν(z_j))` where
the units respond independently (Sun & Nielsen 2017, arXiv:1606.06069).
"""

from __future__ import annotations

import tensorflow as tf

from keras_natgrad.linalg import scalar


def tanh_information(t: tf.Tensor) -> tf.Tensor:
    """Returns `ν = sech² t` of y in {−1, 1}, `p(1) = (1 + tanh t) / 2`."""
    # 1 − tanh² loses its digits where |t| is large.
    return 4 * tf.sigmoid(2 * t) * tf.sigmoid(-2 * t)


def sigmoid_information(t: tf.Tensor) -> tf.Tensor:
    """Returns `ν = σ(t) (1 − σ(t))` of y ~ Bernoulli(σ(t))."""
    return tf.sigmoid(t) * tf.sigmoid(-t)


def linear_information(t: tf.Tensor, noise_scale: float = 1.0) -> tf.Tensor:
    """Returns `ν = 1 / σ²` of y ~ N(t, σ²)."""
    return tf.ones_like(t) / scalar(noise_scale, t.dtype) ** 2


def relu_information(
    t: tf.Tensor,
    slope: float | tf.Tensor = 0.0,
    softness: float = 1.0,
    noise_scale: float = 1.0,
) -> tf.Tensor:
    """Returns ν of a softened leaky or parametric rectifier with noise.

    With the slope ι of the negative side, the softness ω and

        y ~ N(r(t), σ²),    r(t) = ω ln(exp(ι t / ω) + exp(t / ω)),

    it is the square of the derivative over σ²,

        ν = [ι + (1 − ι) sigmoid((1 − ι) t / ω)]² / σ².

    Args:
        t: Tensor of pre-activations.
        slope: ι, a number or a tensor that broadcasts to `t`.
        softness: ω > 0. The rectifier itself is the limit of zero.
        noise_scale: σ > 0.
    """
    slope = scalar(slope, t.dtype)
    gate = tf.sigmoid((1 - slope) * t / scalar(softness, t.dtype))
    derivative = slope + (1 - slope) * gate
    return tf.square(derivative / scalar(noise_scale, t.dtype))


def elu_information(
    t: tf.Tensor, alpha: float = 1.0, noise_scale: float = 1.0
) -> tf.Tensor:
    """Returns ν of y ~ N(elu(t), σ²): 1 for `t ≥ 0`, else `(α eᵗ)²`; by σ²."""
    below = scalar(alpha, t.dtype) * tf.exp(tf.minimum(t, 0))
    derivative = tf.where(t >= 0, tf.ones_like(t), below)
    return tf.square(derivative / scalar(noise_scale, t.dtype))


def softmax_information(z: tf.Tensor) -> tf.Tensor:
    """Returns `V = diag(η) − η ηᵀ` of y ~ Categorical(η), η = softmax(z).

    Args:
        z: Tensor `[..., m]`.

    Returns:
        Tensor `[..., m, m]`.
    """
    p = tf.nn.softmax(z)
    return tf.linalg.diag(p) - p[..., :, tf.newaxis] * p[..., tf.newaxis, :]


def two_layer_information(
    slopes: tf.Tensor, kernel: tf.Tensor, information: tf.Tensor
) -> tf.Tensor:
    """Returns V of a layer whose response is that of the layer after it.

    With the units `h = f(z)` deterministic, the next pre-activations
    `t = C₀ᵀ h + b` and their information `U(t)`,

        V = (C₀ U C₀ᵀ) ∘ (f'(z) f'(z)ᵀ).

    The slopes are `f'`. For tanh and sigmoid that is ν itself; for the
    rectifiers, whose ν is `f'²`, it is not.

    Args:
        slopes: `f'(z)`, tensor `[..., m]`.
        kernel: C₀, tensor `[m, k]`, without its bias.
        information: U, tensor `[..., k, k]`.

    Returns:
        Tensor `[..., m, m]`.
    """
    pulled = tf.matmul(tf.matmul(kernel, information), kernel, transpose_b=True)
    return pulled * slopes[..., :, tf.newaxis] * slopes[..., tf.newaxis, :]
