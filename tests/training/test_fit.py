"""`fit` and its relatives, in eager mode, in a graph and under XLA."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_natgrad as kng
from tests.training.networks import (
    assert_equal,
    compiled,
    data,
    mlp,
    state,
    weights,
)


def test_fit_evaluate_predict():
    """It learns, and leaves the layers as they were."""
    x, y = data(48)
    model = mlp()
    attributes = [set(vars(layer)) for layer in model.layers]
    activations = [layer.activation for layer in model.layers]
    compiled(model, metrics=["accuracy"], run_eagerly=False)
    before = model.evaluate(x, y, verbose=0)
    history = model.fit(x, y, batch_size=16, epochs=6, verbose=0).history
    loss, accuracy = model.evaluate(x, y, verbose=0)
    assert set(history) == {"loss", "accuracy"}
    assert loss < 0.5 * before[0]
    assert accuracy > 0.8
    assert history["loss"][-1] < history["loss"][0]
    outputs = model.predict(x, verbose=0)
    assert outputs.shape == (48, 3)
    assert np.mean(np.argmax(outputs, -1) == y) == pytest.approx(accuracy)
    assert [set(vars(layer)) for layer in model.layers] == attributes
    assert [layer.activation for layer in model.layers] == activations
    assert "call" not in vars(model)


def test_reported_loss_and_metrics_are_those_of_keras():
    x, y = data()
    model = compiled(metrics=["accuracy"])
    expected = model.evaluate(x, y, batch_size=24, verbose=0)
    assert model.train_on_batch(x, y) == pytest.approx(expected, rel=1e-6)


def test_train_on_batch_equals_fit():
    x, y = data()
    left, right = compiled(), compiled()
    left.fit(x, y, batch_size=24, epochs=3, shuffle=False, verbose=0)
    for _ in range(3):
        right.train_on_batch(x, y)
    assert_equal(state(left), state(right))


@pytest.mark.slow
def test_tf_data_without_a_static_batch_size():
    x, y = data(20)
    dataset = tf.data.Dataset.from_tensor_slices((x, y)).batch(8)
    model = compiled()
    model.fit(dataset, epochs=2, verbose=0)
    assert model.optimizer.statistics["batches"] == 6
    assert model.optimizer.statistics["skipped"] == 0


def test_python_generator():
    x, y = data()

    def batches():
        while True:
            yield x, y

    model = compiled()
    model.fit(batches(), steps_per_epoch=2, epochs=2, verbose=0)
    assert int(model.optimizer.iterations) == 4


def test_validation_data_leave_training_alone():
    x, y = data()
    left, right = compiled(), compiled()
    left.fit(x, y, epochs=2, shuffle=False, verbose=0)
    history = right.fit(
        x, y, epochs=2, shuffle=False, verbose=0, validation_data=(x, y)
    )
    assert "val_loss" in history.history
    assert_equal(state(left), state(right))


def test_mixed_float16_scales_the_loss():
    """Keras wraps the optimizer in a LossScaleOptimizer."""
    keras.config.set_dtype_policy("mixed_float16")
    x, y = data()
    model = compiled(auto_scale_loss=True)
    assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    losses = [float(model.train_on_batch(x, y)) for _ in range(8)]
    assert losses[-1] < 0.7 * losses[0]
    inner = model.optimizer.inner_optimizer
    assert all(v.dtype != "float16" for v in inner.variables)


def test_mixed_bfloat16():
    keras.config.set_dtype_policy("mixed_bfloat16")
    x, y = data()
    model = compiled()
    losses = [float(model.train_on_batch(x, y)) for _ in range(8)]
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.variants("exact")
@pytest.mark.parametrize("fisher", ["exact", "sampled", "empirical"])
def test_every_fisher_trains(fisher):
    x, y = data()
    model = compiled(optimizer=kng.KFAC(fisher=fisher))
    losses = [float(model.train_on_batch(x, y)) for _ in range(8)]
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.variants("kwargs0")
@pytest.mark.parametrize(
    "kwargs",
    [
        {"block": "diagonal"},
        {"block": "ekfac"},
        {"block": "full"},
        {"max_factor_size": 3},
        {"norm_constraint": 0.1},
        {"curvature_update_period": 2, "inverse_update_period": 3},
    ],
)
def test_every_approximation_trains(kwargs):
    x, y = data()
    model = compiled(optimizer=kng.KFAC(**kwargs))
    losses = [float(model.train_on_batch(x, y)) for _ in range(10)]
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize(
    ("growth", "updates", "refreshes"),
    [
        (None, 5, 3),  # 0 2 4 6 8 and 0 3 6
        (0.5, 7, 6),  # 0 1 2 3 4 6 8 and 0 1 2 3 4 6
    ],
)
def test_periods_are_counted(growth, updates, refreshes):
    x, y = data()
    optimizer = kng.KFAC(
        curvature_update_period=2,
        inverse_update_period=3,
        refresh_growth=growth,
    )
    model = compiled(optimizer=optimizer)
    for _ in range(9):
        model.train_on_batch(x, y)
    statistics = optimizer.statistics
    assert statistics["batches"] == 9
    assert statistics["curvature_updates"] == updates
    assert statistics["refreshes"] == refreshes


def test_model_on_token_positions():
    """A Dense layer applied at every position, with a temporal mask."""
    x = np.random.default_rng(0).normal(size=(8, 4, 3)).astype("float32")
    x[:, 2:] = 0.0
    y = np.argmax(x, axis=-1)
    model = keras.Sequential(
        [
            keras.Input((4, 3)),
            keras.layers.Masking(),
            keras.layers.Dense(5, activation="tanh"),
            keras.layers.Dense(3),
        ]
    )
    compiled(model)
    losses = [float(model.train_on_batch(x, y)) for _ in range(8)]
    assert losses[-1] < 0.6 * losses[0]


def test_mlp_is_reproducible():
    assert_equal(
        weights(mlp()),
        weights(mlp()),
    )
