"""Damping rules."""

import math

import keras
import pytest
import tensorflow as tf

from keras_natgrad.step import (
    ConstantDamping,
    LevenbergMarquardt,
    get_damping,
)

RULE = LevenbergMarquardt(
    initial="auto",
    decay=0.5,
    period=3,
    relative=2.0,
    minimum=1e-3,
    maximum=1e3,
)


def adapt(ratio, damping=1.0, mean_eigenvalue=1.0, rule=RULE, share=1.0):
    dtype = "float64"
    return float(
        rule.adapt(
            tf.constant(damping, dtype),
            tf.constant(ratio, dtype),
            tf.constant(share, dtype),
            tf.constant(mean_eigenvalue, dtype),
        )
    )


@pytest.mark.parametrize(
    ("ratio", "factor"),
    [
        (-math.inf, 2.0),
        (-1.0, 2.0),
        (0.0, 2.0),
        (0.2499, 2.0),
        (0.25, 1.0),
        (0.5, 1.0),
        (0.75, 1.0),
        (0.7501, 0.5),
        (1.0, 0.5),
        (10.0, 0.5),
        (math.nan, 2.0),
    ],
)
def test_rule_table(ratio, factor):
    assert adapt(ratio, damping=0.125) == 0.125 * factor


@pytest.mark.parametrize("ratio", [math.nan, 1.0])
def test_rule_under_xla(ratio):
    def call(ratio):
        one = tf.constant(1.0, tf.float64)
        return RULE.adapt(0.125 * one, ratio, one, one)

    compiled = tf.function(call, jit_compile=True)
    value = tf.constant(ratio, tf.float64)
    assert float(compiled(value)) == float(call(value))


def test_bounds_are_relative_to_the_mean_eigenvalue():
    assert adapt(1.0, damping=0.015, mean_eigenvalue=10.0) == 0.01
    assert adapt(0.0, damping=9e3, mean_eigenvalue=10.0) == 1e4


@pytest.mark.parametrize(
    ("ratio", "share", "factor"),
    [
        (1.0, 0.5, 0.5),
        (1.0, 0.49, 0.1),
        (0.5, 0.1, 1.0),
        (0.1, 0.1, 2.0),
        (math.nan, math.nan, 2.0),
    ],
)
def test_dominant_damping_falls_to_a_tenth(ratio, share, factor):
    found = adapt(ratio, share=share)
    assert found == pytest.approx(factor, rel=1e-15)


def test_damping_outside_the_bounds_stays_while_the_ratio_is_fair():
    assert adapt(0.5, damping=1e-9) == 1e-9


@pytest.mark.parametrize("scale", [2.0**-20, 2.0**30])
def test_scale_of_the_loss_does_not_matter(scale):
    """λ follows the Fisher when the loss is multiplied by a constant."""
    first = float(RULE.start(tf.constant(0.75, tf.float64)))
    scaled = float(RULE.start(tf.constant(0.75 * scale, tf.float64)))
    assert scaled == scale * first
    for ratio in (0.0, 0.5, 1.0):
        for damping in (1e-4, 1.0, 1e4):
            assert adapt(ratio, damping * scale, 0.75 * scale) == pytest.approx(
                scale * adapt(ratio, damping, 0.75), rel=1e-14
            )


def test_start():
    mean = tf.constant(3.0, tf.float64)
    assert float(RULE.start(mean)) == 6.0
    fixed = LevenbergMarquardt(initial=0.1)
    assert float(fixed.start(mean)) == 0.1


def test_decay_is_exact_in_float64():
    rule = LevenbergMarquardt(
        decay=0.77, period=1, relative=1.0, minimum=0.0, maximum=1e6
    )
    assert adapt(1.0, rule=rule) == pytest.approx(0.77, rel=1e-15)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_dtype_is_kept(dtype):
    mean = tf.constant(1.0, dtype)
    for rule in (RULE, LevenbergMarquardt(initial=0.1)):
        assert rule.start(mean).dtype == dtype
        assert rule.adapt(mean, mean, mean, mean).dtype == dtype


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"initial": 0.0}, "`initial` must be a positive number"),
        ({"initial": "large"}, "`initial` must be a positive number"),
        ({"relative": -1.0}, "`relative` must be a positive number"),
        ({"inverse_ratio": 0.0}, "`inverse_ratio` must be a positive"),
        ({"decay": 1.0}, "`decay` must be between 0 and 1"),
        ({"decay": 0.0}, "`decay` must be between 0 and 1"),
        ({"period": 0}, "`period` must be a positive number of steps"),
        ({"minimum": -1.0}, "`minimum` must lie between 0 and `maximum`"),
        (
            {"minimum": 2.0, "maximum": 1.0},
            "`minimum` must lie between 0 and `maximum`",
        ),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        LevenbergMarquardt(**arguments)
    assert "Received: " in str(error.value)


def test_config_round_trip():
    config = keras.saving.serialize_keras_object(RULE)
    assert get_damping(config) == RULE


def test_get_damping():
    assert get_damping("auto") == LevenbergMarquardt()
    assert get_damping(RULE) is RULE
    assert get_damping(2) == ConstantDamping(2.0)
    assert get_damping(2).to_config() == 2.0
    assert get_damping(0.0).is_zero and not get_damping(2).is_zero
    schedule = keras.optimizers.schedules.ExponentialDecay(1.0, 10, 0.9)
    assert get_damping(schedule).schedule is schedule
    config = keras.saving.serialize_keras_object(schedule)
    assert get_damping(config).schedule(0) == 1.0


@pytest.mark.parametrize("value", [-1.0, True, None, "off", [1.0], math.nan])
def test_get_damping_of_something_else(value):
    with pytest.raises(ValueError, match="`damping` must be 'auto'") as error:
        get_damping(value)
    assert f"Received: damping={value!r}" in str(error.value)
