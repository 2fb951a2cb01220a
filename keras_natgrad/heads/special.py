"""Special functions of Fisher matrices, without cancellation.

The entries of many Fisher matrices are small differences of large terms. The
functions here are those differences, computed so that no digits are lost;
where that takes more than float32 they compute in float64 and round.
"""

from __future__ import annotations

import math

import numpy as np
import tensorflow as tf

# B_2k of Σ B_2k / x^(2k−1), k = 1 …: Abramowitz & Stegun 6.4.12.
_BERNOULLI = (1 / 6, -1 / 30, 1 / 42, -1 / 30, 5 / 66, -691 / 2730, 7 / 6)
_SHIFT = 10


def trigamma_excess(x: tf.Tensor) -> tf.Tensor:
    """Returns `h(x) = x² ψ₁(x) − x` for positive x.

    It falls from 1 at zero to ½ at infinity. The trigamma function is
    `ψ₁ = (x + h) / x²`, and its differences, which the Fisher matrices of
    gamma functions are made of, follow from those of h.
    """
    # ψ₁(x) = Σ_{j<n} (x + j)⁻² + ψ₁(x + n) leads to where the series holds.
    small = tf.minimum(x, tf.constant(float(_SHIFT), x.dtype))
    total = tf.math.reciprocal(small + _SHIFT) + _tail(small + _SHIFT)
    for j in range(_SHIFT - 1, 0, -1):
        total += tf.square(tf.math.reciprocal(small + j))
    recurrence = 1.0 + tf.square(small) * total - small
    large = tf.maximum(x, tf.constant(float(_SHIFT), x.dtype))
    series = tf.square(large) * _tail(large)
    return tf.where(x < _SHIFT, recurrence, series)


def _tail(x: tf.Tensor) -> tf.Tensor:
    """Returns `ψ₁(x) − 1/x` by its series, for x of 10 and more."""
    y = tf.math.reciprocal(x)
    square = tf.square(y)
    total = tf.zeros_like(x)
    for coefficient in reversed(_BERNOULLI):
        total = coefficient + square * total
    return square * (0.5 + y * total)


def student_information(df: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns the Student-t information of log df, and its complement.

    That is `ν² F_νν` with `F_νν = ¼ [ψ₁(ν/2) − ψ₁((ν+1)/2)] −
    (ν+5) / (2ν(ν+1)(ν+3))` (Lange, Little & Taylor 1989), and the Schur
    complement `ν² F_νν − 2ν / ((ν+1)²(ν+3))` given the scale. Both fall as
    `ν⁻²`, so that beyond 200 their series in 1/ν are summed.
    """
    nu = tf.cast(df, tf.float64)
    near = tf.minimum(nu, 200.0)
    a, b = 0.5 * near, 0.5 * (near + 1.0)
    # ν²/4 (ψ₁(a) − ψ₁(b)) with ψ₁ = (x + h)/x².
    difference = (a + trigamma_excess(a)) - tf.square(a / b) * (
        b + trigamma_excess(b)
    )
    direct = difference - near * (near + 5.0) / (
        2.0 * (near + 1.0) * (near + 3.0)
    )
    z = tf.math.reciprocal(tf.maximum(nu, 200.0))
    series = tf.zeros_like(z)
    for coefficient in reversed(_student_series(10)):
        series = coefficient + z * series
    series *= tf.square(z)
    information = tf.where(nu < 200.0, direct, series)
    explained = 2.0 * nu / (tf.square(nu + 1.0) * (nu + 3.0))
    return (
        tf.cast(information, df.dtype),
        tf.cast(information - explained, df.dtype),
    )


def _student_series(count: int) -> list[float]:
    """Returns c of `ν² F_νν = Σ_n c_n ν^(−n−2)`.

    `Σ_k (−1)^k (ν+k)⁻²`, which ¼ [ψ₁(ν/2) − ψ₁((ν+1)/2)] is, has the Euler
    series ½ (1 + z − z³ + 3 z⁵ − 17 z⁷ + 155 z⁹ − …) z² with z = 1/ν, and
    (1 + 5z) / ((1 + z)(1 + 3z)) the coefficients q.
    """
    euler = {0: 1.0, 1: 1.0, 3: -1.0, 5: 3.0, 7: -17.0, 9: 155.0, 11: -2073.0}
    q = [1.0, 1.0]
    while len(q) < count + 2:
        q.append(-4.0 * q[-1] - 3.0 * q[-2])
    return [0.5 * (euler.get(n, 0.0) - q[n]) for n in range(2, count + 2)]


def bessel_ratio(kappa: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns `A = I₁/I₀` and `κ² A'(κ)`, for the von Mises distribution.

    `A' = 1 − A² − A/κ` loses all digits for large κ, where `κ² A'` tends to
    ½ (Jammalamadaka & SenGupta 2001); the series takes over beyond 500.
    """
    k = tf.cast(kappa, tf.float64)
    near = tf.clip_by_value(k, 1e-3, 500.0)
    a = tf.math.bessel_i1e(near) / tf.math.bessel_i0e(near)
    direct = tf.square(near) * (1.0 - tf.square(a)) - near * a
    y = tf.math.reciprocal(tf.maximum(k, 500.0))
    far = 0.5 + y * (0.25 + y * (0.375 + y * (25 / 32 + y * (65 / 32))))
    # κ² A' = κ²/2 (1 − 3κ²/8 + …) near zero.
    tiny = tf.minimum(k, 1e-3)
    close = 0.5 * tf.square(tiny) * (1.0 - 0.375 * tf.square(tiny))
    slope = tf.where(k < 1e-3, close, tf.where(k < 500.0, direct, far))
    ratio = tf.math.bessel_i1e(k) / tf.math.bessel_i0e(k)
    return tf.cast(ratio, kappa.dtype), tf.cast(slope, kappa.dtype)


# Trapezoidal rule in u = log x: the integrand decays as e^u to the left, as
# exp(−e^u) to the right and is analytic for |Im u| < π/2, so that the error is
# about exp(−π²/h).
_STEP = 0.2
_NODES = np.arange(-46.0, 4.4, _STEP)


def dispersion_information(mean: tf.Tensor, count: tf.Tensor) -> tf.Tensor:
    r"""Returns the negative binomial information of log r, given the mean.

    For Y with mean μ and total count r it is

        r² (ψ₁(r) − E ψ₁(r + Y) − μ / (r (r + μ))).

    The expectation has no closed form. With `ψ₁(x) = ∫ t e^{−xt} / (1 − e^{−t})
    dt` and the generating function of Y it is one integral over t, the same
    for all means and counts,

        r² ∫ e^{−rt} { t / (1 − e^{−t}) [1 − (1 + μ (1 − e^{−t}) / r)^{−r}]
                       − μ / (r + μ) } dt,

    which the trapezoidal rule in log(rt) finds to rounding.

    Args:
        mean: Positive tensor μ.
        count: Positive tensor r, broadcastable.

    Returns:
        Tensor, non-negative, in the dtype of `mean`. Cost: 250 terms each.
    """
    mu, r = tf.cast(mean, tf.float64), tf.cast(count, tf.float64)
    x = tf.constant(np.exp(_NODES), tf.float64)
    weights = tf.constant(_STEP * np.exp(_NODES - np.exp(_NODES)), tf.float64)
    mu, r = mu[..., tf.newaxis], r[..., tf.newaxis]
    t = x / r
    decay = -tf.math.expm1(-t)
    survival = -tf.math.expm1(-r * tf.math.log1p(mu / r * decay))
    braces = t / decay * survival - mu / (r + mu)
    total = r[..., 0] * tf.reduce_sum(weights * braces, axis=-1)
    return tf.cast(tf.maximum(total, 0.0), mean.dtype)


def zero_truncation(rate: tf.Tensor) -> tf.Tensor:
    """Returns `1 − λ / (e^λ − 1)`, the information of a truncated Poisson."""
    small = tf.minimum(rate, 0.05)
    square = tf.square(small)
    series = small * (
        0.5 - small / 12.0 * (1.0 - square / 60.0 * (1.0 - square / 42.0))
    )
    large = tf.clip_by_value(rate, 0.05, 80.0)
    direct = 1.0 - large / tf.math.expm1(large)
    return tf.where(rate < 0.05, series, direct)


def huber_masses(delta: float) -> tuple[float, float, float]:
    """Returns the parts of the Huber density, and its normaliser.

    With `Z = √(2π) erf(δ/√2) + (2/δ) exp(−δ²/2)`, the first term over Z is
    the probability `P` of at most δ, the second over Z that of more, `Q`.

    Args:
        delta: δ, a positive number.

    Returns:
        P, Q and Z.
    """
    normal = math.sqrt(2.0 * math.pi) * math.erf(delta / math.sqrt(2.0))
    tails = 2.0 / delta * math.exp(-0.5 * delta**2)
    total = normal + tails
    return normal / total, tails / total, total


EULER_GAMMA = float(np.euler_gamma)
GUMBEL_SPREAD = math.pi / math.sqrt(6.0)
