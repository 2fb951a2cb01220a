"""What training and attaching leave untouched."""

import json
import zipfile

import keras
import numpy as np
import pytest

import keras_natgrad as kng
from tests.training.networks import (
    FEATURES,
    assert_close,
    assert_equal,
    compiled,
    data,
    mlp,
    state,
    weights,
)

layers = keras.layers


def noisy():
    """Dropout and batch normalisation: both change state in training."""

    def glorot(seed):
        return keras.initializers.GlorotNormal(seed=seed)

    return keras.Sequential(
        [
            keras.Input((FEATURES,)),
            layers.Dense(8, kernel_initializer=glorot(1)),
            layers.BatchNormalization(),
            layers.Activation("tanh"),
            layers.Dropout(0.5, seed=3),
            layers.Dense(3, kernel_initializer=glorot(2)),
        ]
    )


def hidden_state(model):
    variables = [*model.non_trainable_variables, *model.metrics_variables]
    return [variable.numpy() for variable in variables]


@pytest.mark.variants("True")
@pytest.mark.parametrize("run_eagerly", [True, False])
@pytest.mark.filterwarnings("ignore:These variables")
def test_second_forward_pass_leaves_no_trace(run_eagerly):
    """Levenberg-Marquardt evaluates the loss again; nobody notices."""
    x, y = data()
    adaptive = kng.LevenbergMarquardt(initial=0.1, period=1)
    found = []
    for damping in (0.1, adaptive):
        model = compiled(
            noisy(),
            kng.KFAC(damping=damping),
            metrics=["accuracy"],
            run_eagerly=run_eagerly,
        )
        logs = model.train_on_batch(x, y)
        found.append([*hidden_state(model), np.array(logs)])
        assert np.array(found[-1][-1]).shape == (2,)
    assert_equal(*found)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:These variables")
def test_second_forward_pass_leaves_no_trace_over_many_steps():
    """With a learning rate of zero, the runs stay comparable."""
    x, y = data()
    found = []
    for damping in (0.1, kng.LevenbergMarquardt(initial=0.1, period=1)):
        model = compiled(
            noisy(),
            kng.KFAC(0.0, momentum=0.0, damping=damping),
            metrics=["accuracy"],
        )
        model.fit(x, y, batch_size=8, epochs=2, shuffle=False, verbose=0)
        found.append(hidden_state(model))
    assert_equal(*found)


@pytest.mark.variants("True")
@pytest.mark.filterwarnings("ignore:These variables")
@pytest.mark.parametrize("run_eagerly", [True, False])
def test_second_forward_pass_has_the_same_dropout_mask(float64, run_eagerly):
    """A tiny step must change the loss as predicted; another mask would
    change it a thousand times as much."""
    x, y = data()
    optimizer = kng.KFAC(
        1e-5, momentum=0.0, damping=kng.LevenbergMarquardt(0.1, period=1)
    )
    model = compiled(noisy(), optimizer, run_eagerly=run_eagerly)
    for _ in range(3):
        model.train_on_batch(x, y)
        assert optimizer.statistics["reduction_ratio"] == pytest.approx(
            1.0, abs=1e-2
        )


def test_attach_leaves_class_and_config_alone():
    model = mlp()
    before = model.get_config(), type(model), set(vars(model))
    kng.KFAC().attach(model)
    assert model.get_config() == before[0]
    assert type(model) is before[1]
    assert set(vars(model)) - before[2] == {"train_step"}
    assert all("call" not in vars(layer) for layer in model.layers)


def content(path):
    with zipfile.ZipFile(path) as file:
        config = json.loads(file.read("config.json"))
        config.pop("date_saved", None)
        return config, sorted(file.namelist())


def test_attach_leaves_the_saved_file_alone(tmp_path):
    model = mlp()
    model.save(tmp_path / "before.keras")
    kng.KFAC().attach(model)
    model.save(tmp_path / "after.keras")
    assert content(tmp_path / "before.keras") == content(
        tmp_path / "after.keras"
    )
    loaded = keras.saving.load_model(tmp_path / "after.keras")
    assert_equal(weights(loaded), weights(model))
    assert type(loaded) is keras.Sequential


def test_attaching_again_changes_nothing():
    x, y = data()
    left, right = compiled(), compiled()
    left.fit(x, y, shuffle=False, epochs=2, verbose=0)
    right.fit(x, y, shuffle=False, epochs=1, verbose=0)
    function = right.train_function
    assert right.optimizer.attach(right) is right.optimizer
    assert right.train_function is function
    right.fit(x, y, shuffle=False, epochs=1, verbose=0)
    assert_equal(state(left), state(right))


@pytest.mark.parametrize("run_eagerly", [True, False])
def test_recompiling_with_another_optimizer_is_the_stock_step(run_eagerly):
    x, y = data()
    model = compiled()
    plain = mlp()
    plain.set_weights(model.get_weights())
    for each in (model, plain):
        each.compile("adam", "sparse_categorical_crossentropy")
        each.run_eagerly = run_eagerly
        each.fit(x, y, shuffle=False, epochs=2, verbose=0)
    assert_close(state(model), state(plain))


def test_recompiling_after_training_with_another_optimizer_and_back():
    x, y = data()
    optimizer = kng.KFAC()
    model = compiled(optimizer=optimizer)
    model.train_on_batch(x, y)
    compiled(model, keras.optimizers.SGD(0.01))
    model.train_on_batch(x, y)
    assert optimizer.statistics["batches"] == 1
    compiled(model, optimizer)
    model.train_on_batch(x, y)
    assert optimizer.statistics["batches"] == 2


def test_attaching_after_a_first_fit_with_another_optimizer():
    """Keras made a training function, which must not be kept."""
    x, y = data()
    model = compiled(optimizer=keras.optimizers.SGD(0.01))
    model.fit(x, y, verbose=0)
    optimizer = kng.KFAC()
    compiled(model, optimizer)
    model.fit(x, y, verbose=0)
    assert optimizer.statistics["batches"] == 1


@pytest.mark.slow
def test_export(tmp_path):
    x, y = data()
    model = compiled(run_eagerly=False)
    model.fit(x, y, verbose=0)
    model.export(tmp_path / "exported", verbose=False)
    layer = keras.layers.TFSMLayer(
        tmp_path / "exported", call_endpoint="serving_default"
    )
    outputs = layer(x)
    outputs = (
        next(iter(outputs.values())) if isinstance(outputs, dict) else (outputs)
    )
    np.testing.assert_allclose(outputs, model(x), rtol=1e-5, atol=1e-6)
