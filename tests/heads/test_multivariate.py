"""Heads of one multivariate distribution."""

import keras
import numpy as np
import pytest
import tensorflow as tf
import tensorflow_probability as tfp
from scipy.special import polygamma

from keras_natgrad import heads

from .test_families import factor

RNG = np.random.default_rng(0)
HEADS = {
    "mvn_1": (heads.MultivariateNormalTriL(), RNG.normal(size=(3, 2))),
    "mvn_3": (heads.MultivariateNormalTriL(), RNG.normal(size=(3, 9))),
    "mvn_exp": (heads.MultivariateNormalTriL("exp"), RNG.normal(size=(3, 5))),
    "dirichlet": (heads.Dirichlet(), RNG.normal(size=(3, 4))),
    "dirichlet_exp": (heads.Dirichlet("exp"), 3 * RNG.normal(size=(3, 4))),
    "multinomial": (heads.Multinomial(5), RNG.normal(size=(3, 4))),
}
each = pytest.mark.parametrize("name", HEADS)


def divergence_hessian(head, eta):
    """Hessian of `KL(p ‖ p(η))` in float64, by TFP's divergence."""
    fixed, eta = head.distribution(tf.constant(eta)), tf.constant(eta)
    with tf.GradientTape(persistent=True) as outer:
        outer.watch(eta)
        with tf.GradientTape() as inner:
            inner.watch(eta)
            divergence = fixed.kl_divergence(head.distribution(eta))
        gradient = inner.gradient(divergence, eta)
    return outer.jacobian(gradient, eta, experimental_use_pfor=False)


@pytest.mark.parametrize("name", [n for n in HEADS if n != "multinomial"])
def test_fisher_is_the_hessian_of_the_divergence(name):
    head, outputs = HEADS[name]
    fisher = head.fisher(outputs)
    for found, eta in zip(fisher, outputs, strict=True):
        np.testing.assert_allclose(
            found, divergence_hessian(head, eta), rtol=1e-8, atol=1e-9
        )


def test_multinomial_is_as_many_categorical_draws():
    head, outputs = HEADS["multinomial"]
    one = heads.Categorical().fisher(outputs)
    np.testing.assert_allclose(head.fisher(outputs), 5 * one, rtol=1e-12)


@each
def test_factor_products(name):
    head, outputs = HEADS[name]
    dense = factor(head, outputs)
    fisher = head.fisher(outputs).numpy()
    np.testing.assert_allclose(
        dense @ dense.swapaxes(-1, -2), fisher, rtol=1e-10, atol=1e-12
    )
    vector = np.random.default_rng(1).normal(size=outputs.shape)
    np.testing.assert_allclose(
        head.fisher_factor_transpose_product(outputs, vector),
        np.einsum("nij,ni->nj", dense, vector),
        rtol=1e-10,
        atol=1e-12,
    )


@each
def test_log_prob_samples_and_scores(name):
    head, outputs = HEADS[name]
    many = np.tile(outputs[0], (20_000, 1))
    draws = head.sample(many, [1, 2])
    head.validate_targets(many, draws)
    np.testing.assert_allclose(
        head.log_prob(many, draws),
        head.distribution(tf.constant(many)).log_prob(draws),
        rtol=1e-9,
    )
    scores = head.score(many, draws).numpy()
    products = scores[:, :, None] * scores[:, None, :]
    for values, expected in (
        (scores, 0.0),
        (products, head.fisher(outputs[:1])[0]),
    ):
        error = values.std(axis=0) / np.sqrt(len(values))
        difference = np.abs(values.mean(axis=0) - expected)
        assert np.all(difference <= 5 * error + 1e-9)


@each
def test_every_product_compiles(name):
    head, outputs = HEADS[name][0], tf.constant(HEADS[name][1], tf.float32)

    def everything(outputs):
        return (
            head.fisher(outputs),
            head.fisher_factor_product(outputs, outputs),
            head.fisher_factor_transpose_product(outputs, outputs),
        )

    compiled = tf.function(everything, jit_compile=True)(outputs)
    for actual, expected in zip(compiled, everything(outputs), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=2e-4, atol=2e-5)


def test_dirichlet_of_extreme_concentrations():
    """Float32 entries from 1e-6 to 1e6: finite, semidefinite, accurate."""
    rng = np.random.default_rng(0)
    raw = rng.uniform(-13.8, 13.8, size=(10_000, 5)).astype(np.float32)
    head = heads.Dirichlet("exp")
    dense = factor(head, raw)
    assert np.all(np.isfinite(dense))
    fisher = dense @ dense.swapaxes(-1, -2)
    alpha = np.exp(raw.astype(float))
    total = alpha.sum(-1, keepdims=True)
    exact = -polygamma(1, total)[..., None] * (
        alpha[:, :, None] * alpha[:, None, :]
    )
    exact += np.eye(5) * (alpha**2 * polygamma(1, alpha))[:, :, None]
    error = np.abs(fisher - exact) / np.abs(exact).max((1, 2), keepdims=True)
    assert error.max() < 1e-5


@each
def test_head_survives_saving(name):
    head = HEADS[name][0]
    restored = keras.saving.deserialize_keras_object(
        keras.saving.serialize_keras_object(head)
    )
    assert restored == head


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: heads.MultivariateNormalTriL().validate((None, 6)),
            r"one of \[2, 5, 9, 14, 20\]",
        ),
        (lambda: heads.Dirichlet().validate((None, 1)), "at least two"),
        (lambda: heads.Dirichlet("sigmoid"), "`concentration` must be"),
        (lambda: heads.Multinomial(0), "positive number of draws or trials"),
        (
            lambda: heads.Multinomial(2).validate_targets(
                np.zeros([1, 2]), np.array([[1.0, 2.0]])
            ),
            "counts per class that sum to 2",
        ),
        (
            lambda: heads.Dirichlet().validate_targets(
                np.zeros([1, 2]), np.array([[0.0, 1.0]])
            ),
            "positive shares that sum to 1",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_triangle_is_filled_as_tfp_does():
    outputs = tf.constant([[0.0, 0.0, 1.0, 2.0, 3.0]])
    head = heads.MultivariateNormalTriL("exp")
    scale = head.distribution(outputs).scale.to_dense()[0].numpy()
    raw = tfp.math.fill_triangular(tf.constant([1.0, 2.0, 3.0])).numpy()
    np.testing.assert_allclose(scale[1, 0], raw[1, 0])
    np.testing.assert_allclose(np.diag(scale), np.exp(np.diag(raw)), rtol=1e-6)
