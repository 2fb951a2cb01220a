"""Special functions against sums and quadrature that do not cancel."""

import numpy as np
import pytest
import tensorflow as tf
from scipy.integrate import quad
from scipy.special import gammaln, polygamma, psi

from keras_natgrad import heads
from keras_natgrad.heads.special import dispersion_information, sphere_ratios

MOST = 2_000_000  # Counts that are summed one by one.
NODES = np.polynomial.legendre.leggauss(600)


def start(x):
    """`x / (1 + x) − log(1 + x)`, by its series near zero."""
    if x < 0.05:
        return sum((-1.0) ** (k + 1) * x**k * (1 - 1 / k) for k in range(2, 25))
    return x / (1 + x) - np.log1p(x)


def negative_binomial_log_prob(y, mean, count):
    return (
        gammaln(y + count)
        - gammaln(count)
        - gammaln(y + 1)
        - y * np.log1p(count / mean)
        - count * np.log1p(mean / count)
    )


def squared_dispersion_score(mean, count):
    """`E s²` with the score s of log r, as a sum over the counts.

    s(y) = r [g(μ/r) + Σ_{j<y} (μ − j) / ((r + j) (r + μ))]. Beyond the first
    two million counts the sum is an integral.
    """
    spread = np.sqrt(mean + mean**2 / count)
    top = mean + 12 * spread + 40 * (1 + mean / count) + 60
    last = int(min(top, MOST))
    j = np.arange(float(last))
    steps = np.cumsum((mean - j) / ((count + j) * (count + mean)))
    scores = count * (start(mean / count) + np.concatenate([[0.0], steps]))
    y = np.arange(last + 1.0)
    mass = np.exp(negative_binomial_log_prob(y, mean, count))
    total = np.sum(mass * scores**2)
    if top <= MOST:
        return total

    def integrand(u):
        y = np.exp(u)
        score = count * (
            psi(count + y)
            - psi(count)
            - np.log1p(mean / count)
            + (mean - y) / (count + mean)
        )
        mass = np.exp(negative_binomial_log_prob(y, mean, count))
        return mass * y * score**2

    edges = np.linspace(np.log(last + 0.5), np.log(10 * top), 60)
    return total + sum(
        quad(integrand, *pair, epsabs=1e-9 * total)[0]
        for pair in zip(edges, edges[1:], strict=False)
    )


@pytest.mark.parametrize("count", [1e-3, 1e-1, 10.0, 150.0, 250.0, 1e3, 1e5])
@pytest.mark.parametrize("mean", [1e-3, 1e-1, 10.0, 1e3, 1e5])
def test_dispersion_information_at_extremes(mean, count):
    """Relative error, also where it is 1e-17 of the terms it comes from."""
    found = dispersion_information(
        tf.constant([np.log(mean / count)], tf.float64),
        tf.constant([count], tf.float64),
    )
    expected = squared_dispersion_score(mean, count)
    np.testing.assert_allclose(found, [expected], rtol=1e-7)


@pytest.mark.parametrize("logits", [80.0, 89.0, 200.0, 1e4])
def test_negative_binomial_of_large_logits(logits):
    """E ψ₁(r + Y) → 0: log r has the information r² ψ₁(r) given the logit."""
    raw = tf.constant([[logits, np.log(3.0)]], tf.float32)
    fisher = heads.NegativeBinomialLogits("sigmoid", "exp").fisher(raw)
    expected = [[3.0, 3.0], [3.0, 9.0 * polygamma(1, 3.0)]]
    np.testing.assert_allclose(fisher[0], expected, rtol=1e-6)


def test_negative_binomial_heads_agree_where_the_mean_is_huge():
    """Both parametrisations at mean 1e30 and total count 1e-2, float32."""
    mean, count = 1e30, 1e-2
    by_mean = heads.NegativeBinomial("exp", "exp").fisher(
        tf.constant([[np.log(mean), np.log(count)]], tf.float32)
    )[0]
    by_logits = heads.NegativeBinomialLogits("sigmoid", "exp").fisher(
        tf.constant([[np.log(mean / count), np.log(count)]], tf.float32)
    )[0]
    # Given the mean, d logit = −d log r.
    map_back = np.array([[1.0, -1.0], [0.0, 1.0]])
    np.testing.assert_allclose(
        map_back.T @ by_logits.numpy() @ map_back, by_mean, rtol=1e-5, atol=1e-8
    )


def sphere_moments(kappa, dimension):
    """Variances across and along the mean direction, by quadrature.

    The angle θ from it has the density `exp(κ (cos θ − 1)) sin^{d−2} θ`.
    """
    far = np.pi
    if kappa > 0:
        far = min(np.pi, 9.0 * np.sqrt((dimension + 2.0) / kappa))
    nodes, weights = NODES
    angle = 0.5 * far * (nodes + 1.0)
    drop = 2.0 * np.sin(0.5 * angle) ** 2  # 1 − cos θ
    logs = np.log(weights) - kappa * drop
    logs += (dimension - 2) * np.log(np.sin(angle))
    mass = np.exp(logs - logs.max())
    mass /= mass.sum()
    mean = np.sum(mass * drop)
    along = np.sum(mass * (drop - mean) ** 2)
    across = np.sum(mass * np.sin(angle) ** 2) / (dimension - 1)
    return across, along


@pytest.mark.parametrize("dimension", [2, 3, 5, 50, 200])
def test_sphere_ratios(dimension):
    kappa = np.concatenate([[0.0], 10.0 ** np.arange(-12, 8.5, 0.5)])
    across, along = sphere_ratios(tf.constant(kappa), dimension)
    expected = [sphere_moments(k, dimension) for k in kappa]
    np.testing.assert_allclose(across, [e[0] for e in expected], rtol=1e-10)
    np.testing.assert_allclose(along, [e[1] for e in expected], rtol=2e-8)
