"""PRONG of convolutions, in both forms, equals the definition."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_natgrad as kng
from keras_natgrad.callbacks.whiten import _velocities
from keras_natgrad.layers import input_moments, rewhiten
from tests.reference import prong
from tests.reference.bridge import patches_of, randomize
from tests.training.networks import assert_close, cross_entropy, weights

L = keras.layers
BATCH, RATE = 12, 0.25
DAMPINGS = [(0.05, False), (0.2, True)]


def batch(seed=0, steps=False):
    """Images, or series, with a mean, and labels."""
    rng = np.random.default_rng(seed)
    x = 1.0 + rng.normal(size=(BATCH, 5, 4, 2))
    x = x + np.roll(x, 1, axis=1)
    return x[:, :, 0] if steps else x, rng.integers(0, 3, size=BATCH)


def images_model(use_bias=True):
    model = keras.Sequential(
        [
            keras.Input((5, 4, 2)),
            L.Conv2D(3, 2, padding="same", activation="tanh"),
            L.Conv2D(3, (2, 1), strides=2, use_bias=use_bias),
            L.GlobalAveragePooling2D(),
        ]
    )
    randomize(model)
    return model


def series_model():
    model = keras.Sequential(
        [
            keras.Input((5, 2)),
            L.Conv1D(3, 2, padding="causal", activation="tanh"),
            L.Conv1D(3, 2, dilation_rate=2, padding="same"),
            L.GlobalAveragePooling1D(),
        ]
    )
    randomize(model)
    return model


def every_step(damping, relative, **kwargs):
    """Statistics of the last batch alone, renewed at every step."""
    return kng.PRONG(
        RATE,
        damping=damping,
        relative_damping=relative,
        factor_decay=0.0,
        curvature_update_period=1,
        inverse_update_period=1,
        refresh_growth=None,
        **kwargs,
    )


def reference_step(model, x, y, damping, relative):
    """(W, b) as matrices after a step: from (V, d), and in closed form.

    The gradient is that of the plain model, the patches are copies of its
    inputs.
    """
    loss = cross_entropy()
    with tf.GradientTape() as tape:
        value = loss(y, model(x))
    gradients = tape.gradient(value, [v.value for v in model.weights])
    pairs, inputs = [], x
    for index, layer in enumerate(model.layers[:2]):
        patches = patches_of(layer, np.asarray(inputs))
        inputs = layer(inputs)
        white = prong.whitening(patches, damping, relative)
        kernel, bias = (v.numpy().reshape(-1, 3) for v in layer.weights)
        own = [g.numpy().reshape(-1, 3) for g in gradients[2 * index :][:2]]
        w, b = prong.step(kernel.T, bias[0], (own[0].T, own[1][0]), white, RATE)
        closed = prong.closed_step(
            np.vstack([kernel, bias]), np.vstack(own), white, RATE
        )
        pairs.append((np.vstack([w.T, b]), closed))
    return pairs


@pytest.mark.parametrize(("damping", "relative"), DAMPINGS)
@pytest.mark.parametrize("form", ["preconditioner", "layers"])
@pytest.mark.parametrize("steps", [False, True], ids=["images", "series"])
def test_a_step_equals_the_definition(form, damping, relative, steps, float64):
    x, y = batch(steps=steps)
    model = series_model() if steps else images_model()
    expected = reference_step(model, x, y, damping, relative)
    if form == "preconditioner":
        optimizer = every_step(damping, relative).attach(model)
        model.compile(optimizer, loss=cross_entropy(), run_eagerly=True)
        model.train_on_batch(x, y)
    else:
        model = kng.layers.whitened(model)
        model.compile(keras.optimizers.SGD(RATE), loss=cross_entropy())
        callback = kng.callbacks.Whiten(x, 1, damping, relative)
        callback.set_model(model)
        callback.whiten()
        model.train_on_batch(x, y)
        model = kng.layers.canonical(model)
    for layer, pair in zip(model.layers, expected, strict=False):
        matrix = np.vstack([v.numpy().reshape(-1, 3) for v in layer.weights])
        for each in pair:
            np.testing.assert_allclose(matrix, each, rtol=1e-9, atol=1e-12)


@pytest.mark.variants("True-0.0", "False-0.0")
@pytest.mark.parametrize("momentum", [0.0, 0.5])
@pytest.mark.parametrize("use_bias", [True, False])
def test_both_forms_agree(momentum, use_bias, float64):
    """Over steps and whitenings, on other batches every time."""
    left = images_model(use_bias)
    right = kng.layers.whitened(left)
    optimizer = every_step(0.2, True, momentum=momentum).attach(left)
    left.compile(optimizer, loss=cross_entropy(), run_eagerly=True)
    right.compile(keras.optimizers.SGD(RATE, momentum), loss=cross_entropy())
    moments = None
    for step in range(6):
        x, y = batch(step)
        now = input_moments(right, x)
        # The preconditioner is of the batch before, but for the first.
        for layer, each in zip(right.layers, moments or now, strict=False):
            velocities = _velocities(right.optimizer, layer)
            rewhiten(layer, each, 0.2, True, velocities)
        moments = now
        before = left.layers[0].kernel.numpy()
        left.train_on_batch(x, y)
        right.train_on_batch(x, y)
        assert np.max(np.abs(left.layers[0].kernel.numpy() - before)) > 1e-3
        assert_close(
            weights(left), weights(kng.layers.canonical(right)), 1e-8, 1e-11
        )
