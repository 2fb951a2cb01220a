"""Saving, loading and copying."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests.contract.common import FIT, compiled, deep, eager, learns
from tests.training.networks import (
    CLASSES,
    FEATURES,
    assert_close,
    assert_equal,
    data,
    mlp,
    state,
    weights,
)


def saved_model_file(make, folder):
    """`model.save("….keras")`, resumed bit for bit"""
    model = compiled(make(), deep())
    model.fit(*data(), epochs=2, **FIT)
    model.save(folder / "model.keras")
    loaded = keras.saving.load_model(folder / "model.keras")
    assert_equal(state(loaded), state(model))
    assert loaded.optimizer.statistics == model.optimizer.statistics
    assert loaded.optimizer.get_config() == model.optimizer.get_config()
    loaded.optimizer.attach(loaded)
    for each in (model, loaded):
        each.fit(*data(), **FIT)
    assert_equal(state(loaded), state(model))


def weights_file(make, folder):
    """`save_weights` and `load_weights` with a built optimizer"""
    model = eager(make())
    model.fit(*data(), **FIT)
    model.save_weights(folder / "model.weights.h5")
    other = eager(make())
    other.optimizer.build(other.trainable_variables)
    other.load_weights(folder / "model.weights.h5")
    for each in (model, other):
        each.fit(*data(), **FIT)
    assert_equal(state(other), state(model))


def checkpoints(make, folder):
    """`ModelCheckpoint`, `EarlyStopping(restore_best_weights=True)`"""
    model, built = eager(make()), eager(make())
    callbacks = [
        keras.callbacks.ModelCheckpoint(folder / "{epoch}.keras"),
        keras.callbacks.ModelCheckpoint(
            folder / "{epoch}.weights.h5", save_weights_only=True
        ),
    ]
    learns(model, epochs=4, callbacks=callbacks)
    loaded = keras.saving.load_model(folder / "2.keras")
    loaded.optimizer.attach(loaded)
    loaded.run_eagerly = True
    built.optimizer.build(built.trainable_variables)
    built.load_weights(folder / "2.weights.h5")
    for each in (loaded, built):
        assert each.optimizer.statistics["batches"] == 4
        each.fit(*data(), epochs=4, initial_epoch=2, **FIT)
        assert_equal(state(each), state(model))
    stop = keras.callbacks.EarlyStopping(
        "loss", min_delta=100.0, patience=1, restore_best_weights=True
    )
    history = built.fit(*data(), epochs=5, callbacks=[stop], **FIT)
    assert len(history.epoch) < 5


def backup(make, folder):
    """`BackupAndRestore` after an interruption"""

    class Interrupt(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 2:
                raise KeyboardInterrupt

    def run(*callbacks):
        model = eager(make())
        store = keras.callbacks.BackupAndRestore(folder / "backup")
        callbacks = [store, *callbacks]
        return model, model.fit(*data(), epochs=4, callbacks=callbacks, **FIT)

    with pytest.raises(KeyboardInterrupt):
        run(Interrupt())
    resumed, history = run()
    assert history.epoch == [2, 3]
    whole = eager(make())
    whole.fit(*data(), epochs=4, **FIT)
    assert_equal(state(resumed), state(whole))


def tensorflow_checkpoint(make, folder):
    """`tf.train.Checkpoint`"""
    model = eager(make())
    model.fit(*data(), **FIT)
    saved = tf.train.Checkpoint(model=model, optimizer=model.optimizer)
    path = saved.save(str(folder / "checkpoint"))
    other = eager(make())
    other.optimizer.build(other.trainable_variables)
    restored = tf.train.Checkpoint(model=other, optimizer=other.optimizer)
    restored.restore(path).assert_consumed()
    for each in (model, other):
        each.fit(*data(), **FIT)
    assert_equal(state(other), state(model))


def orbax(make, folder):
    """`OrbaxCheckpoint`, loaded and continued, where Orbax is installed"""
    pytest.importorskip("orbax.checkpoint", reason="needs orbax-checkpoint")
    # Not sequential: Keras finds what it saved by the paths of the variables,
    # which loading changes there, for its own optimizers too.
    inputs = keras.Input((FEATURES,))
    hidden = keras.layers.Dense(5, "tanh")(inputs)
    network = keras.Model(inputs, keras.layers.Dense(CLASSES)(hidden))
    model = eager(make(), network)
    store = keras.callbacks.OrbaxCheckpoint(
        str(folder / "orbax"), save_on_background=False
    )
    model.fit(*data(), epochs=2, callbacks=[store], **FIT)
    loaded = keras.saving.load_model(str(folder / "orbax"))
    loaded.optimizer.attach(loaded)
    loaded.run_eagerly = True
    for each in (model, loaded):
        each.fit(*data(), **FIT)
    assert_equal(state(loaded), state(model))


def state_tree(make, folder):
    """`get_state_tree`: every variable has its own path"""
    model = eager(make())
    model.fit(*data(), **FIT)
    tree = model.get_state_tree()
    paths = [variable.path for variable in model.optimizer.variables]
    assert len(set(paths)) == len(paths)
    assert tree["optimizer_variables"]


def export(make, folder):
    """`model.export` while the optimizer is attached"""
    x, y = data()
    model = eager(make())
    model.fit(x, y, **FIT)
    model.export(folder / "exported", verbose=False)
    loaded = tf.saved_model.load(str(folder / "exported"))
    served = loaded.serve(x)
    assert_close([served.numpy()], [model.predict(x, verbose=0)], 1e-5, 1e-6)


def clone(make, folder):
    """`clone_model`, with a new optimizer"""
    model = eager(make())
    model.fit(*data(), **FIT)
    copy = keras.models.clone_model(model)
    learns(eager(make(), copy))
    before = weights(copy)
    model.fit(*data(), **FIT)
    assert_equal(weights(copy), before)


def two_models(make, folder):
    """Two optimizers in one program, as in a GAN"""
    x, y = data()
    first, second = (keras.Sequential([mlp()]) for _ in range(2))
    left, right = make(), make()
    eager(left, first)
    eager(right, second)
    first.train_on_batch(x, y)
    assert right.statistics == {}
    second.train_on_batch(-x, y)
    for _ in range(3):
        first.train_on_batch(x, y)
        second.train_on_batch(-x, y)
    assert first.optimizer is left and second.optimizer is right
    assert left.statistics["batches"] == right.statistics["batches"] == 4
    assert any(
        np.any(a != b)
        for a, b in zip(weights(first), weights(second), strict=True)
    )
