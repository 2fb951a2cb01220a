"""Von Mises–Fisher directions."""

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_probability as tfp

from keras_natgrad import heads

from .test_families import factor

HEAD = heads.VonMisesFisher()


@pytest.mark.parametrize("dimension", [2, 3, 5, 20])
def test_fisher_is_the_covariance_of_the_targets(dimension):
    """50 000 draws; five standard errors."""
    eta = np.random.default_rng(dimension).normal(size=dimension)
    draws = HEAD.sample(np.tile(eta, (50_000, 1)), [1, 2]).numpy()
    centred = draws - HEAD.mean(eta[None])[0].numpy()
    products = centred[:, :, None] * centred[:, None, :]
    fisher = HEAD.fisher(eta[None])[0].numpy()
    for values, expected in ((centred, 0.0), (products, fisher)):
        error = values.std(axis=0) / np.sqrt(len(values))
        assert np.all(np.abs(values.mean(axis=0) - expected) <= 5 * error)
    np.testing.assert_allclose(
        HEAD.stddev(eta[None])[0], np.sqrt(np.diag(fisher)), rtol=1e-12
    )


def test_in_two_dimensions_it_is_the_von_mises_distribution():
    """Polar coordinates: J F Jᵀ with η = κ (cos, sin)."""
    angle, log_kappa = np.array([0.4, -2.0]), np.array([-1.0, 2.5])
    kappa = np.exp(log_kappa)
    eta = kappa[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=-1)
    across = kappa[:, None] * np.stack([-np.sin(angle), np.cos(angle)], -1)
    jacobian = np.stack([across, eta], axis=-2)
    polar = heads.VonMises("exp")
    raw = np.stack([angle, log_kappa], axis=-1)
    np.testing.assert_allclose(
        jacobian @ HEAD.fisher(eta).numpy() @ jacobian.swapaxes(-1, -2),
        polar.fisher(raw),
        rtol=1e-10,
        atol=1e-12,
    )
    y = np.array([0.3, 1.0])
    np.testing.assert_allclose(
        HEAD.log_prob(eta, np.stack([np.cos(y), np.sin(y)], axis=-1)),
        polar.log_prob(raw, y[:, None]),
        rtol=1e-10,
    )


@pytest.mark.variants("2")
@pytest.mark.parametrize("dimension", [2, 4, 30])
def test_factor_products_and_log_prob(dimension):
    rng = np.random.default_rng(0)
    eta = rng.normal(size=(4, dimension)) * [[1e-4], [0.1], [3.0], [1e3]]
    dense, fisher = factor(HEAD, eta), HEAD.fisher(eta).numpy()
    np.testing.assert_allclose(
        dense @ dense.swapaxes(-1, -2), fisher, rtol=1e-10, atol=1e-14
    )
    vector = rng.normal(size=eta.shape)
    gradient = np.einsum("nij,nj->ni", fisher, vector)
    np.testing.assert_allclose(
        HEAD.natural_gradient(eta, gradient), vector, rtol=1e-6
    )
    kappa = np.linalg.norm(eta, axis=-1)
    y = HEAD.sample(eta, [0, 1])
    expected = tfp.distributions.VonMisesFisher(eta / kappa[:, None], kappa)
    np.testing.assert_allclose(
        HEAD.log_prob(eta, y), expected.log_prob(y), rtol=1e-9, atol=1e-9
    )


def test_gradient_of_the_loss_is_finite_everywhere():
    """Autodiff passes the origin, and agrees with the score."""
    raw = [[0.0, 0.0, 0.0], [1e-30, 0.0, 0.0], [1e6, 1e6, 0.0], [1e20, 0, 0]]
    outputs = tf.constant(raw, tf.float32)
    targets = tf.constant([[0.0, 0.6, 0.8]] * 4)
    scores = heads.Head.score(HEAD, outputs, targets)
    np.testing.assert_allclose(scores, HEAD.score(outputs, targets), rtol=1e-6)
    np.testing.assert_allclose(scores[:2], targets[:2], atol=1e-6)
    for value in (
        scores,
        HEAD.log_prob(outputs, targets),
        HEAD.fisher(outputs),
        HEAD.sample(outputs, [0, 1]),
    ):
        assert np.all(np.isfinite(value))


def test_samples_near_the_uniform_distribution():
    """40 000 draws in three dimensions: mean zero, variances 1/3."""
    for size in (0.0, 1e-12, 1e-6):
        outputs = tf.constant([[size, 0.0, 0.0]] * 40_000, tf.float32)
        draws = HEAD.sample(outputs, [0, 1]).numpy()
        assert np.abs(draws.mean(axis=0)).max() < 5 / np.sqrt(3 * 40_000)
        np.testing.assert_allclose(draws.var(axis=0), 1 / 3, atol=0.01)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: HEAD.validate((None, 1)), "at least two; for angles"),
        (
            lambda: HEAD.validate_targets(np.zeros([1, 2]), np.ones([1, 2])),
            "vectors of length 1",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_gradient_of_the_loss_compiles():
    """A tape sees TFP's loops, whose gradient XLA does not compile."""
    outputs = tf.constant([[1.0, 2.0, -1.0], [0.1, 0.0, 0.3]])
    targets = HEAD.sample(outputs, [0, 1])

    @tf.function(jit_compile=True)
    def gradient(outputs):
        with tf.GradientTape(persistent=True) as tape:
            tape.watch(outputs)
            log_prob = HEAD.log_prob(outputs, targets)
        return tape.gradient(log_prob, outputs)

    np.testing.assert_allclose(
        gradient(outputs), HEAD.score(outputs, targets), rtol=1e-5
    )
