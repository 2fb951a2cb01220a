"""When the layers have learning rates of their own, and how different."""

import keras
import numpy as np
import pytest

import keras_natgrad as kng
from tests.reference.bridge import dense_layers, mlp

pytestmark = pytest.mark.usefixtures("float64")


def test_one_rate_where_the_estimate_may_not_divide_it():
    for by_layer, kwargs, size in (
        (True, {}, 3),
        (True, {"momentum": kng.Spring(0.5)}, 2),
        (True, {"learning_rate": 0.1}, 2),
        (False, {}, 2),
    ):
        model = mlp([3, 4, 1])
        optimizer = kng.KFAC(
            quadratic_model=kng.QuadraticModel(by_layer=by_layer), **kwargs
        ).attach(model)
        model.compile(optimizer, "mse", run_eagerly=True)
        model.train_on_batch(np.ones((4, 3)), np.ones((4, 1)))
        assert optimizer.engine.model.average._quotients.shape == (size, size)


@pytest.mark.parametrize("batch", [255, 256])
def test_few_examples_have_one_rate(batch):
    """Batches of 256 examples have rates by layer, smaller ones have not."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(batch, 3)), rng.normal(size=(batch, 1))
    kernels = []
    for by_layer in (True, False):
        keras.utils.set_random_seed(0)
        model = mlp([3, 8, 8, 1])
        optimizer = kng.KFAC(
            quadratic_model=kng.QuadraticModel(by_layer=by_layer)
        ).attach(model)
        model.compile(optimizer, "mse", run_eagerly=True)
        for _ in range(6):
            model.train_on_batch(x, y)
        kernels.append([layer.kernel.numpy() for layer in dense_layers(model)])
    for by_layer, common in zip(*kernels, strict=True):
        difference = np.abs(by_layer - common).max()
        if batch < 256:
            assert difference < 1e-9
        else:
            assert difference > 1e-3


def test_averages_are_not_mixed_up():
    """Large batches at a rate of zero, then small ones: as without layers."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(256, 3)), rng.normal(size=(256, 1))
    kernels = []
    for by_layer in (True, False):
        keras.utils.set_random_seed(0)
        model = mlp([3, 8, 8, 1])
        optimizer = kng.KFAC(
            quadratic_model=kng.QuadraticModel(by_layer=by_layer)
        ).attach(model)
        model.compile(optimizer, "mse", run_eagerly=True)
        for rate, batch in ((0.0, 256), (1.0, 64)):
            optimizer.learning_rate = rate
            start = [layer.kernel.numpy() for layer in dense_layers(model)]
            for _ in range(4):
                model.train_on_batch(x[:batch], y[:batch])
        kernels.append([layer.kernel.numpy() for layer in dense_layers(model)])
    for by_layer, common, old in zip(*kernels, start, strict=True):
        assert np.abs(common - old).max() > 1e-3
        np.testing.assert_allclose(by_layer, common, rtol=0, atol=1e-9)


@pytest.mark.slow
def test_a_smaller_last_batch_in_between():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(300, 3)), rng.normal(size=(300, 1))
    model = mlp([3, 8, 8, 1])
    optimizer = kng.KFAC().attach(model)
    model.compile(optimizer, "mse")
    losses = model.fit(x, y, batch_size=256, epochs=10, verbose=0)
    assert losses.history["loss"][-1] < 0.5 * losses.history["loss"][0]
    by_layer, common = (
        optimizer.engine.model.average,
        optimizer.engine.model.common,
    )
    assert by_layer._quotients.shape == (4, 4)
    assert common._quotients.shape == (2, 2)
    assert optimizer.statistics["retracted"] == 0
