"""Outputs whose Fisher is zero or not finite, although the gradient is not."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_natgrad as kng
from keras_natgrad.step.damping import least_scale
from tests.training.networks import compiled, state, weights


def raw_data(size=128):
    """Features in units that nobody has standardised; three classes."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(size, 6)) * [1, 3, 10, 100, 300, 1000]
    labels = np.argmax(x[:, :3] / [1, 3, 10], axis=1)
    return (x + 500).astype("float32"), labels


def network(units, activation=None):
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Dense(16, activation="relu"),
            keras.layers.Dense(units, activation=activation),
        ]
    )


@pytest.mark.variants("softmax")
@pytest.mark.parametrize("kind", ["softmax", "sigmoid", "logits"])
def test_saturated_outputs_are_trained(kind):
    """The Fisher is zero to rounding; the loss is far from its minimum."""
    x, y = raw_data()
    loss = keras.losses.SparseCategoricalCrossentropy()
    model = network(3, "softmax")
    if kind != "softmax":
        y = (y[:, None] == 0).astype("float32")
        model = network(1, "sigmoid" if kind == "sigmoid" else None)
        loss = keras.losses.BinaryCrossentropy(from_logits=kind == "logits")
    compiled(model, loss=loss, run_eagerly=False)
    first = model.evaluate(x, y, verbose=0)
    assert first > 5
    losses = []
    for _ in range(60):
        model.reset_metrics()
        losses.append(float(model.train_on_batch(x, y)))
    assert min(losses) < 0.2 * first
    assert all(np.all(np.isfinite(each)) for each in state(model))


def test_logits_taken_for_probabilities():
    """`from_logits=True` forgotten: the weights stay finite."""
    x, y = raw_data()
    x = (x - x.mean(axis=0)) / x.std(axis=0)
    model = network(3)
    compiled(model, loss="sparse_categorical_crossentropy")
    for _ in range(20):
        model.train_on_batch(x, y)
    assert all(np.all(np.isfinite(each)) for each in state(model))


class Broken(kng.heads.Normal):
    """A head of somebody's own, whose Fisher is never finite."""

    def fisher_factor_product(self, outputs, vectors):
        return np.nan * super().fisher_factor_product(outputs, vectors)


@pytest.mark.variants("True")
@pytest.mark.parametrize("eager", [True, False])
def test_a_fisher_that_is_not_finite(eager):
    """Gradient descent is left, with the damping alone."""
    x, _ = raw_data()
    x = (x - x.mean(axis=0)) / x.std(axis=0)
    model = network(1)
    optimizer = kng.KFAC().attach(model, head=Broken())
    model.compile(optimizer, "mse", run_eagerly=eager, jit_compile=False)
    first = model.evaluate(x, x[:, :1], verbose=0)
    for _ in range(10):
        model.train_on_batch(x, x[:, :1])
    assert model.evaluate(x, x[:, :1], verbose=0) < first
    assert all(np.all(np.isfinite(each)) for each in weights(model))


def test_least_scale(float64):
    """Proportional to the loss; tiny beside the Fisher of a usual network."""
    gradients = [tf.constant([3.0, 0.0], "float64"), tf.constant([[4.0]])]
    gradients = [tf.cast(each, "float64") for each in gradients]
    found = least_scale(gradients, tf.constant(2.0))
    np.testing.assert_allclose(found, 5e-6 * 25 / 2, rtol=1e-6)
    scaled = least_scale([10 * each for each in gradients], tf.constant(20.0))
    np.testing.assert_allclose(scaled, 10 * found, rtol=1e-6)
    assert least_scale(gradients, tf.constant(0.0)) == 0
