"""What Keras users do with the arguments of an optimizer."""

import keras
import numpy as np

from tests.contract.common import FIT, compiled, distance, eager, learns
from tests.training.networks import assert_close, assert_equal, data, weights


def default_arguments(make, folder):
    """No argument at all"""
    x, y = data(64)
    learns(compiled(make()), 10, x, y, share=0.5, batch_size=64)


def configuration(make, folder):
    """`get_config`, `from_config`, `keras.saving`"""
    optimizer = make(weight_decay=0.01, clipnorm=1.0)
    copy = type(optimizer).from_config(optimizer.get_config())
    assert copy.get_config() == optimizer.get_config()
    through = keras.saving.deserialize_keras_object(
        keras.saving.serialize_keras_object(optimizer)
    )
    assert through.get_config() == optimizer.get_config()


def learning_rate_schedule(make, folder):
    """`LearningRateSchedule` as learning rate"""
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay(
        [3], [0.1, 0.0]
    )
    model = eager(make(learning_rate=schedule))
    learns(model)
    # From the fifth step on it is zero.
    assert model.optimizer.statistics["learning_rate"] == 0.0
    assert float(model.optimizer.learning_rate) == 0.0


def changed_learning_rate(make, folder):
    """`ReduceLROnPlateau`, `LearningRateScheduler`"""
    scheduler = keras.callbacks.LearningRateScheduler
    for arguments in ({}, {"learning_rate": 0.1}):
        model = eager(make(momentum=0.0, **arguments))
        start = float(model.optimizer.learning_rate.numpy())
        halve = scheduler(lambda _, rate: 0.5 * rate)
        plateau = keras.callbacks.ReduceLROnPlateau(
            "loss", factor=0.1, patience=0, min_delta=1e9
        )
        learns(model, epochs=3, callbacks=[halve, plateau])
        rate = float(model.optimizer.learning_rate.numpy())
        np.testing.assert_allclose(rate, start * 0.5**3 * 0.1**2, rtol=1e-5)
        # A small rate makes for small steps, automatic or not; zero for none.
        before = weights(model)
        model.train_on_batch(*data())
        assert 0 < distance(before, weights(model)) < 0.5
        before = weights(model)
        stop = scheduler(lambda epoch, rate: 0.0)
        history = model.fit(*data(), callbacks=[stop], **FIT).history
        assert history["learning_rate"] == [0.0]
        assert_equal(weights(model), before)


def weight_decay(make, folder):
    """`weight_decay`, `exclude_from_weight_decay`"""
    results = []
    for decay in (None, 0.5):
        optimizer = make(learning_rate=0.1, weight_decay=decay)
        model = eager(optimizer)
        optimizer.exclude_from_weight_decay(var_names=["bias"])
        start = weights(model)
        model.fit(*data(12), **FIT)
        results.append(weights(model))
    # Decoupled: w − w·wd·lr before the step, of which it is no part.
    for old, plain, decayed in zip(start, *results, strict=True):
        decay = 0.05 * old if old.ndim == 2 else 0.0 * old
        np.testing.assert_allclose(plain - decayed, decay, rtol=1e-3, atol=1e-6)


def clipping(make, folder):
    """`clipnorm`, `clipvalue`, `global_clipnorm`"""
    for name in ("clipnorm", "clipvalue", "global_clipnorm"):
        learns(eager(make(**{name: 0.05})))


def average_of_weights(make, folder):
    """`use_ema`, `ema_overwrite_frequency`, `SwapEMAWeights`"""
    model = eager(make(use_ema=True, ema_momentum=0.5))
    learns(model)
    for swap_on_epoch in (False, True):
        model = eager(make(use_ema=True, ema_momentum=0.5))
        swap = keras.callbacks.SwapEMAWeights(swap_on_epoch=swap_on_epoch)
        logs = learns(model, validation_data=data(), callbacks=[swap])
        assert np.all(np.isfinite(logs["val_loss"]))
    model = eager(
        make(use_ema=True, ema_momentum=0.5, ema_overwrite_frequency=2)
    )
    learns(model)


def loss_scale_factor(make, folder):
    """`loss_scale_factor`"""
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    results = []
    for factor in (None, 1024.0):
        model = eager(make(loss_scale_factor=factor))
        learns(model)
        results.append(weights(model))
    # A power of two: nothing is rounded.
    assert_close(*results, 1e-9, 1e-12)


def gradient_accumulation(make, folder):
    """`gradient_accumulation_steps`"""
    model = compiled(make(gradient_accumulation_steps=2))
    learns(model, epochs=5)
    # Batches are counted all, steps every second one.
    assert model.optimizer.statistics["batches"] == 10
    assert int(model.optimizer.iterations) == 5
