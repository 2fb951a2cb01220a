"""Saved and loaded, training continues bit for bit."""

import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

import keras_natgrad as kng
from tests.training.networks import (
    FEATURES,
    assert_equal,
    compiled,
    cross_entropy,
    data,
    mlp,
    state,
)

ROOT = Path(__file__).resolve().parents[2]
FIT = {"batch_size": 8, "shuffle": False, "verbose": 0}

# What a user runs another day. Weights only need the model's code as well.
CONTINUE = """
import sys
import keras
import numpy as np
import keras_natgrad

folder = sys.argv[1]
arrays = np.load(f"{folder}/data.npz")
x, y = arrays["x"], arrays["y"]
fit = dict(batch_size=8, shuffle=False, verbose=0)


def save(name, model):
    variables = [*model.weights, *model.optimizer.variables]
    values = {str(i): v.numpy() for i, v in enumerate(variables)}
    np.savez(f"{folder}/{name}.npz", **values)


model = keras.saving.load_model(f"{folder}/model.keras")
assert type(model.optimizer) is keras_natgrad.KFAC
model.optimizer.attach(model)
model.run_eagerly = True
model.fit(x, y, epochs=2, **fit)
save("model", model)

config = keras.saving.load_model(f"{folder}/model.keras", compile=False)
config = config.get_config()
model = keras.Sequential.from_config(config)
optimizer = keras_natgrad.KFAC().attach(model)
loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
model.compile(optimizer, loss=loss, run_eagerly=True)
optimizer.build(model.trainable_variables)
model.load_weights(f"{folder}/model.weights.h5")
model.fit(x, y, epochs=2, **fit)
save("weights", model)

model = keras.saving.load_model(f"{folder}/unattached.keras")
try:
    model.fit(x, y, **fit)
except ValueError as error:
    assert "not attached" in str(error), error
    assert "optimizer.attach(model)" in str(error), error
else:
    raise AssertionError("no error")
model.optimizer.attach(model)
model.run_eagerly = True
before = model.evaluate(x, y, verbose=0)
model.fit(x, y, epochs=3, **fit)
assert model.evaluate(x, y, verbose=0) < before
print("continued")
"""


def deep():
    """Batch normalisation, which has moving statistics.

    There is no Dropout: Keras does not save the state of its seed.
    """
    return keras.Sequential(
        [
            keras.Input((FEATURES,)),
            keras.layers.Dense(5),
            keras.layers.BatchNormalization(),
            keras.layers.Dense(3),
        ]
    )


def values(path):
    arrays = np.load(path)
    return [arrays[str(i)] for i in range(len(arrays.files))]


@pytest.mark.filterwarnings("ignore:These variables")
def test_a_new_process_continues_bit_for_bit(tmp_path):
    x, y = data()
    np.savez(tmp_path / "data.npz", x=x, y=y)
    model = compiled(deep())
    model.fit(x, y, epochs=3, **FIT)
    model.save(tmp_path / "model.keras")
    model.save_weights(tmp_path / "model.weights.h5")
    unattached = mlp()
    unattached.compile(kng.KFAC(), loss=cross_entropy())
    unattached.save(tmp_path / "unattached.keras")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(
            [str(ROOT), os.environ.get("PYTHONPATH", "")]
        ),
    }
    done = subprocess.run(
        [sys.executable, "-c", CONTINUE, str(tmp_path)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "continued" in done.stdout
    model.fit(x, y, epochs=2, **FIT)
    assert_equal(values(tmp_path / "model.npz"), state(model))
    assert_equal(values(tmp_path / "weights.npz"), state(model))


def test_saved_between_refreshes(tmp_path):
    """The cached inverses are saved too, and not made anew."""
    x, y = data()
    model = compiled(optimizer=kng.KFAC(inverse_update_period=10))
    for _ in range(3):
        model.train_on_batch(x, y)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    loaded.optimizer.attach(loaded)
    loaded.run_eagerly = True
    for each in (model, loaded):
        for _ in range(2):
            each.train_on_batch(x, y)
    assert_equal(state(loaded), state(model))


def test_subclassed_model_through_weights(tmp_path):
    @keras.saving.register_keras_serializable(package="test_saving")
    class Net(keras.Model):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.hidden = keras.layers.Dense(5, activation="tanh")
            self.last = keras.layers.Dense(3)

        def call(self, x):
            return self.last(self.hidden(x))

    x, y = data()
    model = compiled(Net())
    model.train_on_batch(x, y)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    loaded.optimizer.attach(loaded)
    loaded.run_eagerly = True
    model.train_on_batch(x, y)
    loaded.train_on_batch(x, y)
    assert_equal(state(loaded), state(model))


def test_weights_reach_an_attached_optimizer_that_is_not_built(tmp_path):
    """`load_weights` builds it; saved unbuilt, it stays so."""
    x, y = data()
    model = compiled()
    model.train_on_batch(x, y)
    model.save_weights(tmp_path / "model.weights.h5")
    compiled().save_weights(tmp_path / "new.weights.h5")
    other = compiled(mlp())
    other.load_weights(tmp_path / "new.weights.h5")
    assert not other.optimizer.built
    other.load_weights(tmp_path / "model.weights.h5")
    assert_equal(state(other), state(model))
    for each in (model, other):
        each.train_on_batch(x, y)
    assert_equal(state(other), state(model))


def test_saved_after_attaching_only(tmp_path):
    x, y = data()
    model = compiled()
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    loaded.optimizer.attach(loaded)
    loaded.run_eagerly = True
    model.train_on_batch(x, y)
    loaded.train_on_batch(x, y)
    assert_equal(state(loaded), state(model))


def test_loss_scale_wrapper_survives_saving(tmp_path):
    x, y = data()
    optimizer = keras.optimizers.LossScaleOptimizer(kng.KFAC())
    model = mlp()
    optimizer.inner_optimizer.attach(model)
    model.compile(optimizer, loss=cross_entropy(), run_eagerly=True)
    model.train_on_batch(x, y)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    loaded.optimizer.inner_optimizer.attach(loaded)
    loaded.run_eagerly = True
    model.train_on_batch(x, y)
    loaded.train_on_batch(x, y)
    assert_equal(state(loaded), state(model))


def test_frozen_layer_and_saving(tmp_path):
    x, y = data()
    model = mlp()
    model.layers[0].trainable = False
    compiled(model)
    model.train_on_batch(x, y)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    loaded.optimizer.attach(loaded)
    loaded.run_eagerly = True
    model.train_on_batch(x, y)
    loaded.train_on_batch(x, y)
    assert_equal(state(loaded), state(model))
