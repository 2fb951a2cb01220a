"""Heads of the robust losses of Keras: huber, log_cosh and the logarithmic."""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf
from scipy.integrate import quad

from keras_natgrad import heads
from keras_natgrad._compat import loss_options
from keras_natgrad.heads import from_loss
from keras_natgrad.heads.special import huber_masses

LOSSES = {
    "huber": keras.losses.Huber(dtype="float64"),
    "huber_wide": keras.losses.Huber(delta=2.5, dtype="float64"),
    "log_cosh": keras.losses.LogCosh(dtype="float64"),
    "msle": keras.losses.MeanSquaredLogarithmicError(dtype="float64"),
}
each_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


def values(loss):
    """Positive outputs and targets on both sides of any δ, and two outputs
    that the logarithmic loss raises to ε."""
    rng = np.random.default_rng(0)
    outputs = rng.uniform(0.1, 6.0, size=(7, 3))
    if isinstance(loss, keras.losses.MeanSquaredLogarithmicError):
        outputs[0, 0], outputs[3, 2] = -0.5, 0.0
    return outputs, rng.uniform(0.1, 6.0, size=(7, 3))


@each_loss
def test_log_prob_is_minus_the_loss_up_to_a_constant_of_the_targets(loss):
    outputs, targets = values(loss)
    other = outputs[::-1].copy()
    head, weight = from_loss(loss, outputs.shape)
    coefficients = weight.coefficients(outputs).numpy()

    def negative(eta):
        return np.sum(coefficients * -head.log_prob(eta, targets))

    np.testing.assert_allclose(
        negative(outputs) - negative(other),
        loss(targets, outputs) - loss(targets, other),
        rtol=1e-10,
        atol=1e-13,
    )


@each_loss
def test_gradient_is_the_weighted_score(loss):
    outputs, targets = values(loss)
    head, weight = from_loss(loss, outputs.shape)
    variable = tf.Variable(outputs)
    with tf.GradientTape() as tape:
        value = loss(targets, variable)
    coefficients = weight.coefficients(outputs).numpy()
    np.testing.assert_allclose(
        tape.gradient(value, variable),
        -coefficients[:, None] * head.score(outputs, targets).numpy(),
        rtol=1e-9,
        atol=1e-12,
    )


@pytest.mark.parametrize("name", ["huber", "huber_wide", "log_cosh"])
def test_fisher_is_the_variance_of_the_score_of_the_loss(name):
    """Quadrature of ψ² exp(−loss), ψ the derivative of Keras's loss."""
    loss = LOSSES[name]
    delta = loss_options(loss).get("delta", 1.0)

    def loss_of(y):
        size = abs(y)
        if isinstance(loss, keras.losses.LogCosh):
            return np.logaddexp(y, -y) - np.log(2.0)
        inside = size <= delta
        return 0.5 * y**2 if inside else delta * (size - 0.5 * delta)

    def psi(y):
        if isinstance(loss, keras.losses.LogCosh):
            return np.tanh(y)
        return np.clip(y, -delta, delta)

    def integral(function):
        parts = [(0.0, delta), (delta, 40.0)]
        return sum(quad(function, *part, epsabs=1e-13)[0] for part in parts)

    expected = integral(lambda y: psi(y) ** 2 * np.exp(-loss_of(y)))
    expected /= integral(lambda y: np.exp(-loss_of(y)))
    head, _ = from_loss(loss)
    fisher = head.fisher(np.array([[0.7]]))
    np.testing.assert_allclose(fisher, [[[expected]]], rtol=1e-8)


def test_logarithmic_fisher_is_zero_where_keras_raises_the_mean():
    head, _ = from_loss(LOSSES["msle"])
    outputs = np.array([[2.0], [0.0], [-3.0]])
    fisher = head.fisher(outputs).numpy()
    np.testing.assert_allclose(fisher[:, 0, 0], [2.0 / 9.0, 0.0, 0.0])
    natural = head.natural_gradient(outputs, np.ones_like(outputs))
    np.testing.assert_allclose(natural, [[4.5], [0.0], [0.0]])


def test_delta_of_every_form_of_the_huber_loss():
    wide = heads.Huber(scale=1.0, delta=2.5)
    assert from_loss(LOSSES["huber_wide"])[0] == wide
    partial = functools.partial(keras.losses.huber, delta=2.5)
    assert from_loss(partial)[0] == wide
    assert from_loss("huber")[0] == heads.Huber(scale=1.0) != wide


@pytest.mark.parametrize("delta", [1e-3, 0.3, 1.0, 3.0, 50.0])
def test_parts_of_the_huber_density(delta):
    """`P + Q = 1`, and Z is the integral of exp(−huber)."""
    inside, outside, total = huber_masses(delta)
    near = 2.0 * quad(lambda z: np.exp(-0.5 * z**2), 0.0, min(delta, 12.0))[0]
    far = 2.0 / delta * np.exp(-0.5 * delta**2)
    np.testing.assert_allclose(
        [inside, outside, total],
        [near / (near + far), far / (near + far), near + far],
        rtol=1e-9,
        atol=1e-15,
    )


@pytest.mark.parametrize(
    "head",
    [
        heads.Huber(0.7, delta=0.4),
        heads.Huber(2.0),
        heads.HyperbolicSecant(1.5),
    ],
    ids=repr,
)
def test_quantiles_moments_and_distribution_function(head):
    outputs = np.array([[0.3]])
    distribution = head.distribution(outputs).distribution
    for probability in (1e-6, 0.02, 0.5, 0.8, 0.999):
        y = head.quantile(outputs, probability).numpy()
        np.testing.assert_allclose(
            head.cdf(outputs, y), [[probability]], rtol=1e-9
        )

    def density(y):
        return float(distribution.prob(np.array([[y]]))[0, 0])

    points = {"points": [0.3, 0.3 - 0.28, 0.3 + 0.28, -1.7, 2.3]}
    mass, below, square = (
        quad(function, -60, upper, limit=400, **points)[0]
        for function, upper in (
            (density, 60.0),
            (density, 1.1),
            (lambda y: (y - 0.3) ** 2 * density(y), 60.0),
        )
    )
    np.testing.assert_allclose(mass, 1.0, rtol=1e-8)
    np.testing.assert_allclose(head.cdf(outputs, [[1.1]]), [[below]], rtol=1e-8)
    np.testing.assert_allclose(head.mean(outputs), outputs)
    np.testing.assert_allclose(head.stddev(outputs), [[square**0.5]], rtol=1e-7)


@pytest.mark.parametrize(
    "head", [heads.Huber(1.0), heads.HyperbolicSecant(1.0)], ids=repr
)
def test_draws_have_the_distribution_function(head):
    """100 000 draws in float32: Kolmogorov's distance below 5/√n."""
    outputs = tf.zeros([100_000, 1])
    draws = np.sort(head.sample(outputs, [1, 2])[:, 0])
    assert np.all(np.isfinite(draws))
    cdf = head.cdf(outputs, draws[:, None])[:, 0]
    ranks = (np.arange(len(draws)) + 0.5) / len(draws)
    assert np.abs(cdf - ranks).max() < 5 / len(draws) ** 0.5


@pytest.mark.parametrize("delta", [0.0, -1.0, np.inf, True])
def test_delta_must_be_positive(delta):
    with pytest.raises(ValueError, match="`delta` must be a positive, finite"):
        heads.Huber(delta=delta)
