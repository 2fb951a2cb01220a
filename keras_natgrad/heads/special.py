"""Special functions of Fisher matrices, without cancellation.

The entries of many Fisher matrices are small differences of large terms. These
functions compute such differences without losing digits; if float32 is not
enough, they compute in float64 and round.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import tensorflow as tf

from keras_natgrad.heads.probability import mathematics

# B_2k of Σ B_2k / x^(2k−1), k = 1 …: Abramowitz & Stegun 6.4.12.
_BERNOULLI = (1 / 6, -1 / 30, 1 / 42, -1 / 30, 5 / 66, -691 / 2730, 7 / 6)
_SHIFT = 10


def trigamma_excess(x: tf.Tensor) -> tf.Tensor:
    """Returns `h(x) = x² ψ₁(x) − x` for positive x.

    It falls from 1 at zero to ½ at infinity. The trigamma function is
    `ψ₁ = (x + h) / x²`, and differences of h give its differences, which occur
    in Fisher matrices of gamma functions.
    """
    # ψ₁(x) = Σ_{j<n} (x + j)⁻² + ψ₁(x + n) leads to where the series is
    # accurate.
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
    `ν⁻²`; beyond 200 their series in 1/ν are summed.
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


def sphere_ratios(
    kappa: tf.Tensor, dimension: int
) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns `A/κ` and `A'` with `A = I_{d/2} / I_{d/2−1}` at `κ ≥ 0`.

    They are the variances of a von Mises–Fisher vector in d dimensions, across
    and along its mean direction (Mardia & Jupp 2000), both `1/d` at zero. As
    `A' = 1 − A² − (d−1) A/κ` loses all digits for large κ, the solution
    `A = Σ a_n κ^{−n}` of this equation takes over there.

    Args:
        kappa: Non-negative float64 tensor.
        dimension: Integer d.

    Returns:
        Two tensors like `kappa`.
    """
    d, bound = float(dimension), max(500.0, 2.0 * dimension**2)
    # A/κ = (1 − κ²/(d (d+2)) + …)/d near zero.
    tiny = tf.square(tf.minimum(kappa, 1e-3)) / (d * (d + 2.0))
    near = tf.clip_by_value(kappa, 1e-3, bound)
    ratio = mathematics().bessel_iv_ratio(
        tf.constant(0.5 * d, near.dtype), near
    )
    slope = 1.0 - tf.square(ratio) - (d - 1.0) * ratio / near
    y = tf.math.reciprocal(tf.maximum(kappa, bound))
    far_ratio, far_slope = tf.zeros_like(y), tf.zeros_like(y)
    for n, coefficient in reversed(list(enumerate(_sphere_series(d, 12)))):
        far_ratio = coefficient + y * far_ratio
        far_slope = -n * coefficient + y * far_slope

    def choose(close: tf.Tensor, middle: tf.Tensor, far: tf.Tensor) -> Any:
        return tf.where(
            kappa < 1e-3, close, tf.where(kappa < bound, middle, far)
        )

    return (
        choose((1.0 - tiny) / d, ratio / near, y * far_ratio),
        choose((1.0 - 3.0 * tiny) / d, slope, y * far_slope),
    )


def _sphere_series(d: float, count: int) -> list[float]:
    """Returns a_n of `A = Σ a_n κ^{−n}` by `A' + A² + (d−1) A/κ = 1`."""
    a = [1.0]
    for n in range(1, count):
        products = sum(a[i] * a[n - i] for i in range(1, n))
        a.append(0.5 * ((n - d) * a[n - 1] - products))
    return a


# Trapezoidal rule in u = log x: the integrand decays as e^u to the left, as
# exp(−e^u) to the right and is analytic for |Im u| < π/2, so that the error is
# about exp(−π²/h).
_STEP = 0.2
_NODES = np.arange(-46.0, 4.4, _STEP)

# The expansion of the same integral: powers of 1/r, each a polynomial in σ
# that multiplies σ².
_DISPERSION = (
    (1 / 2,),
    (-1 / 2, 2 / 3),
    (1 / 2, -2.0, 3 / 2),
    (-1 / 2, 14 / 3, -9.0, 24 / 5),
    (1 / 2, -10.0, 75 / 2, -48.0, 20.0),
)


def dispersion_information(logits: tf.Tensor, count: tf.Tensor) -> tf.Tensor:
    r"""Returns the negative binomial information of log r, given the mean.

    For Y with total count r, mean μ and `σ = μ / (r + μ) = sigmoid(logits)` it
    is

        r² (ψ₁(r) − E ψ₁(r + Y) − μ / (r (r + μ))).

    The expectation has no closed form. With `ψ₁(x) = ∫ t e^{−xt} / (1 − e^{−t})
    dt` and the generating function of Y it is one integral over t, the same
    for all means and counts,

        r² ∫ e^{−rt} { t / (1 − e^{−t}) [1 − (1 + μ (1 − e^{−t}) / r)^{−r}]
                       − σ } dt,

    which the trapezoidal rule in log(rt) finds to rounding. For large r it is
    the small difference of large terms: beyond 200 its series in 1/r, which
    starts with `σ² / 2`, is summed.

    Args:
        logits: Tensor `log(μ / r)`.
        count: Positive tensor r, broadcastable.

    Returns:
        Tensor, non-negative, in the dtype of `count`. Cost: 250 terms each.
    """
    log_ratio, r = tf.cast(logits, tf.float64), tf.cast(count, tf.float64)
    share = tf.sigmoid(log_ratio)
    near = tf.minimum(r, 200.0)[..., tf.newaxis]
    x = tf.constant(np.exp(_NODES), tf.float64)
    weights = tf.constant(_STEP * np.exp(_NODES - np.exp(_NODES)), tf.float64)
    t = x / near
    decay = -tf.math.expm1(-t)
    # log(1 + μ (1 − e^{−t}) / r) without the ratio, which may overflow.
    log_base = tf.nn.softplus(log_ratio[..., tf.newaxis] + tf.math.log(decay))
    survival = -tf.math.expm1(-near * log_base)
    braces = t / decay * survival - share[..., tf.newaxis]
    direct = near[..., 0] * tf.reduce_sum(weights * braces, axis=-1)
    y = tf.math.reciprocal(tf.maximum(r, 200.0))
    series = tf.zeros_like(share * y)
    for coefficients in reversed(_DISPERSION):
        polynomial = tf.zeros_like(share)
        for coefficient in reversed(coefficients):
            polynomial = coefficient + share * polynomial
        series = polynomial + y * series
    series *= tf.square(share)
    total = tf.where(r < 200.0, tf.maximum(direct, 0.0), series)
    return tf.cast(total, count.dtype)


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

    With `Z = √(2π) erf(δ/√2) + (2/δ) exp(−δ²/2)`, the first term over Z is the
    probability `P` of at most δ, the second term over Z is the probability `Q`
    of more.

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
