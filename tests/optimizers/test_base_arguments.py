"""Every argument of the Keras base class.

With a huge damping the Fisher is negligible and K-FAC is gradient descent;
what Keras does around the step must then be what it does around `SGD`.
"""

import keras
import numpy as np
import pytest

import keras_natgrad as kng
from tests.training.networks import (
    HUGE,
    assert_close,
    assert_equal,
    compiled,
    data,
    like_sgd,
    state,
    weights,
)

RATE = 0.1


def run(optimizer, steps=6, **kwargs):
    x, y = data()
    model = compiled(optimizer=optimizer, **kwargs)
    for step in range(steps):
        rows = slice(8 * (step % 3), 8 * (step % 3) + 8)
        model.train_on_batch(x[rows], y[rows])
    return model


def assert_like_sgd(left, right):
    assert_close(weights(left), weights(right), 1e-3, 1e-6)


@pytest.mark.variants(
    "plain",
    "clipvalue",
    "use_ema-ema_momentum-ema_overwrite_frequency",
    "gradient_accumulation_steps-clipnorm",
)
@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"clipnorm": 0.05},
        {"clipvalue": 0.02},
        {"global_clipnorm": 0.1},
        {"use_ema": True, "ema_momentum": 0.5},
        {
            "use_ema": True,
            "ema_momentum": 0.5,
            "ema_overwrite_frequency": 2,
        },
        {"gradient_accumulation_steps": 2},
        {"gradient_accumulation_steps": 3, "clipnorm": 0.05},
        {"loss_scale_factor": 64.0},
        {"momentum": 0.9},
    ],
    ids=lambda kwargs: "-".join(kwargs) or "plain",
)
def test_like_sgd(float64, kwargs):
    assert_like_sgd(
        run(like_sgd(RATE, **kwargs)),
        run(keras.optimizers.SGD(RATE, **kwargs)),
    )


def test_weight_decay(float64):
    """It is decoupled, and multiplied by the learning rate."""
    assert_like_sgd(
        run(like_sgd(RATE, weight_decay=0.5 / HUGE)),
        run(keras.optimizers.SGD(RATE, weight_decay=0.5)),
    )


@pytest.mark.parametrize("how", ["names", "variables"])
def test_exclude_from_weight_decay(float64, how):
    models = []
    for optimizer in (
        like_sgd(RATE, weight_decay=0.5 / HUGE),
        keras.optimizers.SGD(RATE, weight_decay=0.5),
    ):
        x, y = data()
        model = compiled(optimizer=optimizer)
        if how == "names":
            optimizer.exclude_from_weight_decay(var_names=["kernel"])
        else:
            optimizer.exclude_from_weight_decay(
                var_list=[model.layers[0].kernel]
            )
        for _ in range(4):
            model.train_on_batch(x, y)
        models.append(model)
    assert_like_sgd(*models)


def test_weight_decay_with_default_arguments():
    """The learning rate attribute is 1.0: decay by that fraction."""
    plain, decayed = run(kng.KFAC(), 1), run(kng.KFAC(weight_decay=0.25), 1)
    start = run(keras.optimizers.SGD(0.0), 1)
    for w0, left, right in zip(
        weights(start), weights(plain), weights(decayed), strict=True
    ):
        np.testing.assert_allclose(
            left - 0.25 * w0, right, rtol=1e-4, atol=1e-5
        )


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [{}, {"learning_rate": 0.1}])
def test_loss_scale_factor_does_not_matter(float64, arguments):
    """A power of two scales without rounding, curvature included."""
    left = run(kng.KFAC(**arguments))
    right = run(kng.KFAC(loss_scale_factor=1024.0, **arguments))
    assert_close(weights(left), weights(right), 1e-9, 1e-12)


@pytest.mark.variants("clipnorm")
@pytest.mark.parametrize(
    "kwargs",
    [
        {"clipnorm": 0.1},
        {"clipvalue": 0.1},
        {"global_clipnorm": 0.1},
        {"use_ema": True, "ema_overwrite_frequency": 3},
        {"loss_scale_factor": 8.0},
        {"gradient_accumulation_steps": 2},
        {"weight_decay": 1e-3},
    ],
    ids=lambda kwargs: "-".join(kwargs),
)
def test_trains_with_default_arguments(kwargs):
    x, y = data()
    model = compiled(optimizer=kng.KFAC(**kwargs))
    losses = [float(model.train_on_batch(x, y)) for _ in range(30)]
    assert losses[-1] < 0.7 * losses[0]


def test_gradient_accumulation_is_one_large_batch(float64):
    """The mean gradient of two halves, with the statistics of both."""
    x, y = data()
    arguments = {
        "learning_rate": 0.1,
        "momentum": 0.0,
        "damping": 0.1,
        "fisher": "exact",
    }
    whole = compiled(optimizer=kng.KFAC(**arguments))
    halves = compiled(
        optimizer=kng.KFAC(gradient_accumulation_steps=2, **arguments)
    )
    whole.train_on_batch(x, y)
    before = weights(halves)
    halves.train_on_batch(x[:12], y[:12])
    assert_equal(weights(halves), before)
    halves.train_on_batch(x[12:], y[12:])
    assert halves.optimizer.statistics["curvature_updates"] == 2
    assert int(halves.optimizer.iterations) == 1
    # The running average weighs the second half 1 : 0.95.
    assert_close(weights(whole), weights(halves), 0.05, 1e-3)


@pytest.mark.slow
def test_gradient_accumulation_in_a_graph(float64):
    left, right = (
        run(kng.KFAC(gradient_accumulation_steps=2), run_eagerly=eagerly)
        for eagerly in (True, False)
    )
    assert_close(weights(left), weights(right), 1e-6, 1e-9)


def test_ema_overwrites_the_weights_at_the_end_of_fit(float64):
    x, y = data()
    models = []
    for make in (like_sgd, keras.optimizers.SGD):
        model = compiled(optimizer=make(RATE, use_ema=True, ema_momentum=0.9))
        model.fit(x, y, epochs=2, batch_size=24, verbose=0)
        models.append(model)
    assert_like_sgd(*models)


def test_learning_rate_schedule(float64):
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay(
        [1, 3], [RATE, 0.5 * RATE, 0.1 * RATE]
    )
    huge = keras.optimizers.schedules.PiecewiseConstantDecay(
        [1, 3], [HUGE * RATE, HUGE * 0.5 * RATE, HUGE * 0.1 * RATE]
    )
    assert_like_sgd(
        run(kng.KFAC(huge, 0.0, HUGE, block="kronecker")),
        run(keras.optimizers.SGD(schedule)),
    )


@pytest.mark.slow
def test_learning_rate_callable(float64):
    left = run(kng.KFAC(lambda: 0.1, damping=0.1))
    right = run(kng.KFAC(0.1, damping=0.1))
    # Keras keeps the learning rate in float32.
    assert_close(weights(left), weights(right), 1e-5)


def test_damping_schedule():
    schedule = keras.optimizers.schedules.ExponentialDecay(1.0, 1, 0.5)
    optimizer = kng.KFAC(damping=schedule)
    x, y = data()
    model = compiled(optimizer=optimizer)
    found = []
    for _ in range(4):
        model.train_on_batch(x, y)
        found.append(optimizer.statistics["damping"])
    np.testing.assert_allclose(found, [1.0, 0.5, 0.25, 0.125], rtol=1e-6)


def test_the_learning_rate_attribute_multiplies_the_automatic_one(float64):
    """Set to zero, nothing moves; set to a half, half as far."""
    x, y = data()
    steps = []
    for factor in (0.0, 0.5, 1.0):
        model = compiled()
        model.optimizer.learning_rate = factor
        start = weights(model)
        model.train_on_batch(x, y)
        steps.append(
            [b - a for a, b in zip(start, weights(model), strict=True)]
        )
    assert all(np.all(part == 0) for part in steps[0])
    assert_close([2 * part for part in steps[1]], steps[2], 1e-9, 1e-12)


def test_constraints_are_applied():
    x, y = data()
    model = keras.Sequential(
        [
            keras.Input((4,)),
            keras.layers.Dense(3, kernel_constraint=keras.constraints.NonNeg()),
        ]
    )
    compiled(model)
    for _ in range(3):
        model.train_on_batch(x, y)
    assert np.all(model.layers[0].kernel.numpy() >= 0)


def test_variable_names_are_unique():
    model = run(kng.KFAC(use_ema=True, gradient_accumulation_steps=2), 1)
    paths = [variable.path for variable in model.optimizer.variables]
    assert len(set(paths)) == len(paths)
    assert len(state(model)) > len(paths)
