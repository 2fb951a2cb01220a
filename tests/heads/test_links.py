"""The identity link at the ends of its range, and the loss that has it."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_natgrad
from keras_natgrad import heads

EPSILON = 1e-7


@pytest.mark.parametrize(
    ("support", "raw", "inside"),
    [
        ("positive", [-1.0, 0.0, 0.3, 5.0], [EPSILON, EPSILON, 0.3, 5.0]),
        ("unit", [-1.0, 0.0, 0.3, 1.0], [EPSILON, EPSILON, 0.3, 1 - EPSILON]),
    ],
)
def test_identity_clips_as_keras_and_passes_derivatives(support, raw, inside):
    link, raw = heads.links.Identity(support), tf.constant(raw, tf.float64)
    inside = np.array(inside)
    with tf.GradientTape() as tape:
        tape.watch(raw)
        value = link.value(raw)
    if support == "positive":
        expected, derivative, slope = inside, np.ones(4), 1 / inside
    else:
        expected = np.log(inside) - np.log1p(-inside)
        derivative = slope = 1 / (inside * (1 - inside))
    np.testing.assert_allclose(value, expected, rtol=1e-12)
    np.testing.assert_allclose(tape.gradient(value, raw), derivative)
    np.testing.assert_allclose(link.slope(raw), slope)


def test_poisson_of_rates_that_are_zero_or_negative():
    """`F = 1/λ` and the score `y/λ − 1` at the rate raised to ε."""
    head, _ = heads.from_loss("poisson")
    rates = tf.constant([[0.0], [-2.0], [0.5]], tf.float64)
    raised = np.array([[EPSILON], [EPSILON], [0.5]])
    targets = np.array([[0.0], [3.0], [1.0]])
    np.testing.assert_allclose(head.fisher(rates)[..., 0], 1 / raised)
    np.testing.assert_allclose(head.score(rates, targets), targets / raised - 1)
    ones = tf.ones_like(rates)
    for product in (
        head.fisher_factor_product(rates, ones),
        head.fisher_factor_transpose_product(rates, ones),
    ):
        np.testing.assert_allclose(product, raised**-0.5)


def test_poisson_loss_of_a_relu_trains():
    x = np.random.default_rng(0).normal(size=(64, 3)).astype("float32")
    y = np.random.default_rng(1).poisson(np.exp(0.5 * x[:, :1]))
    model = keras.Sequential(
        [keras.Input((3,)), keras.layers.Dense(1, activation="relu")]
    )
    optimizer = keras_natgrad.KFAC().attach(model)
    model.compile(optimizer, loss="poisson", run_eagerly=True)
    assert np.any(model(x).numpy() == 0.0)
    model.fit(x, y, batch_size=32, epochs=2, verbose=0)
    assert all(np.all(np.isfinite(w)) for w in model.get_weights())
