"""Rescaled targets under a location-scale head give the same training."""

import functools

import keras
import numpy as np
import pytest

import keras_natgrad as kng

UNITS = (1e-3, 1e3)


def make_model(unit, dtype):
    """A network whose predicted distribution is that of `unit · y`."""
    keras.utils.set_random_seed(3)
    model = keras.Sequential(
        [
            keras.Input((3,), dtype=dtype),
            keras.layers.Dense(5, activation="tanh", dtype=dtype),
            keras.layers.Dense(2, dtype=dtype),
        ]
    )
    kernel, bias = model.layers[-1].get_weights()
    # The location is multiplied, the logarithm of the scale is shifted.
    kernel[:, 0] *= unit
    bias[0] *= unit
    bias[1] += np.log(unit)
    model.layers[-1].set_weights([kernel, bias])
    return model


def make_data(dtype, examples=64):
    generator = np.random.default_rng(0)
    x = generator.normal(size=(examples, 3)).astype(dtype)
    noise = np.exp(0.5 * x[:, :1]) * generator.normal(size=(examples, 1))
    return x, (np.sin(x[:, :1]) + x[:, 1:2] + noise).astype(dtype)


def train(head, unit, dtype, steps, **arguments):
    """Returns locations and log-scales in units of y after every step."""
    x, y = make_data(dtype)
    model = make_model(unit, dtype)
    optimizer = kng.KFAC(**arguments).attach(model)
    model.compile(optimizer, kng.losses.NegativeLogLikelihood(head))
    outputs = []
    for _ in range(steps):
        model.train_on_batch(x, (unit * y).astype(dtype))
        raw = model.predict_on_batch(x).copy()
        raw[:, 0] /= unit
        raw[:, 1] -= np.log(unit)
        outputs.append(raw)
    return np.array(outputs)


@functools.cache
def train_undamped(head, unit):
    arguments = dict(
        learning_rate=0.3,
        momentum=0.0,
        damping=0.0,
        fisher="exact",
        block="full",
        curvature_update_period=1,
        inverse_update_period=1,
        # The length of a step in the Fisher metric has no unit either.
        norm_constraint=0.05,
        quadratic_model="exact",
    )
    return train(head, unit, "float64", 20, **arguments)


@pytest.mark.slow
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize(
    "head",
    [
        kng.heads.Normal(scale="exp"),
        kng.heads.StudentT(scale="exp"),
        kng.heads.Gumbel(scale="exp"),
    ],
    ids=lambda head: type(head).__name__,
)
def test_full_fisher_does_not_see_the_unit(head, unit):
    expected = train_undamped(head, 1.0)
    found = train_undamped(head, unit)
    assert np.ptp(expected[:, :, 0]) > 1.0
    assert np.abs(expected[-1] - expected[0]).max() > 0.1
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
