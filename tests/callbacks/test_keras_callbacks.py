"""Keras's own callbacks, with K-FAC's automatic and given learning rate."""

import keras
import numpy as np
import pytest

import keras_natgrad as kng
from tests.training.networks import (
    assert_equal,
    compiled,
    data,
    mlp,
    state,
    weights,
)

RATES = pytest.mark.parametrize("learning_rate", ["auto", 0.5])


@RATES
def test_learning_rate_scheduler(learning_rate):
    """A rate of zero stops the weights."""
    x, y = data()
    model = compiled(optimizer=kng.KFAC(learning_rate, momentum=0.0))
    start = float(model.optimizer.learning_rate.numpy())
    seen = []
    callbacks = [
        keras.callbacks.LearningRateScheduler(
            lambda epoch, rate: rate / 2 if epoch < 2 else 0.0
        ),
        keras.callbacks.LambdaCallback(
            on_epoch_end=lambda epoch, logs: seen.append(weights(model))
        ),
    ]
    history = model.fit(x, y, epochs=4, verbose=0, callbacks=callbacks).history
    np.testing.assert_allclose(
        history["learning_rate"], [start / 2, start / 4, 0.0, 0.0]
    )
    assert np.any(seen[0][0] != seen[1][0])
    assert_equal(seen[1], seen[2])
    assert_equal(seen[2], seen[3])


@RATES
def test_reduce_on_plateau(learning_rate):
    x, y = data()
    model = compiled(optimizer=kng.KFAC(learning_rate))
    start = float(model.optimizer.learning_rate.numpy())
    callback = keras.callbacks.ReduceLROnPlateau(
        monitor="loss", factor=0.1, patience=1, min_delta=100.0
    )
    model.fit(x, y, epochs=3, verbose=0, callbacks=[callback])
    rate = float(model.optimizer.learning_rate.numpy())
    assert rate == pytest.approx(0.01 * start, rel=1e-5)
    # A small rate makes for small steps, automatic or not.
    before = weights(model)
    model.train_on_batch(x, y)
    moved = max(
        np.max(np.abs(a - b))
        for a, b in zip(before, weights(model), strict=True)
    )
    assert 0 < moved < 0.5


def test_early_stopping_restores_weights():
    x, y = data()
    model = compiled()
    callback = keras.callbacks.EarlyStopping(
        monitor="loss",
        patience=1,
        min_delta=100.0,
        restore_best_weights=True,
        start_from_epoch=0,
    )
    history = model.fit(x, y, epochs=5, verbose=0, callbacks=[callback])
    assert len(history.epoch) < 5


def test_terminate_on_nan():
    x, y = data()
    model = compiled()
    callback = keras.callbacks.TerminateOnNaN()
    x[0, 0] = np.nan
    history = model.fit(x, y, epochs=5, verbose=0, callbacks=[callback])
    assert len(history.epoch) == 1
    assert model.optimizer.statistics["skipped"] == 1


def test_swap_ema_weights():
    x, y = data()
    model = compiled(optimizer=kng.KFAC(use_ema=True))
    callback = keras.callbacks.SwapEMAWeights(swap_on_epoch=True)
    history = model.fit(
        x, y, epochs=3, verbose=0, validation_data=(x, y), callbacks=[callback]
    )
    assert np.all(np.isfinite(history.history["val_loss"]))


class Interrupt(keras.callbacks.Callback):
    """Stops the program, as a crash would, at the start of an epoch."""

    def __init__(self, epoch):
        super().__init__()
        self.epoch = epoch

    def on_epoch_begin(self, epoch, logs=None):
        if epoch == self.epoch:
            raise KeyboardInterrupt


FIT = {"epochs": 4, "batch_size": 8, "shuffle": False, "verbose": 0}


@pytest.mark.slow
@pytest.mark.parametrize("run_eagerly", [True, False])
def test_backup_and_restore(tmp_path, run_eagerly):
    x, y = data()
    uninterrupted = compiled(run_eagerly=run_eagerly)
    uninterrupted.fit(x, y, **FIT)
    backup = keras.callbacks.BackupAndRestore(tmp_path / "backup")
    with pytest.raises(KeyboardInterrupt):
        compiled(run_eagerly=run_eagerly).fit(
            x, y, callbacks=[backup, Interrupt(2)], **FIT
        )
    model = compiled(run_eagerly=run_eagerly)
    backup = keras.callbacks.BackupAndRestore(tmp_path / "backup")
    history = model.fit(x, y, callbacks=[backup], **FIT)
    assert history.epoch == [2, 3]
    assert_equal(state(model), state(uninterrupted))


@pytest.mark.slow
@pytest.mark.parametrize("weights_only", [True, False])
def test_model_checkpoint(tmp_path, weights_only):
    x, y = data()
    name = "{epoch}.weights.h5" if weights_only else "{epoch}.keras"
    callback = keras.callbacks.ModelCheckpoint(
        tmp_path / name, save_weights_only=weights_only
    )
    uninterrupted = compiled()
    uninterrupted.fit(x, y, callbacks=[callback], **FIT)
    if weights_only:
        model = compiled()
        model.optimizer.build(model.trainable_variables)
        model.load_weights(tmp_path / "2.weights.h5")
    else:
        model = keras.saving.load_model(tmp_path / "2.keras")
        model.run_eagerly = True
        model.optimizer.attach(model)
    assert model.optimizer.statistics["batches"] == 6
    model.fit(x, y, initial_epoch=2, **FIT)
    assert_equal(state(model), state(uninterrupted))


def test_models_of_callbacks_stay_apart():
    x, y = data()
    left, right = compiled(), compiled(mlp())
    left.fit(x, y, verbose=0)
    assert right.optimizer.statistics == {}
