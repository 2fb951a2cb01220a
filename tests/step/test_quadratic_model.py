"""The running average of the quadratic model's curvature."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_natgrad as kng
from keras_natgrad.step import (
    AveragedGram,
    Refresh,
    StateFactory,
    get_quadratic_model,
)


def averaged(model, growth=None):
    def add(name, shape, initializer):
        return keras.Variable(initializer, shape, "float64", name=name)

    refresh = Refresh(1, 1, growth)
    factory = StateFactory(
        add, add, lambda name, shape: keras.Variable("zeros", shape, "int32")
    )
    return AveragedGram(model, refresh, factory)


def add(average, gram, norms, step):
    average.add(
        tf.constant(gram, tf.float64), tf.constant(norms, tf.float64), step
    )


def read(average, norms):
    return average.read(tf.constant(norms, tf.float64)).numpy()


GRAM = np.array([[4.0, 1.0], [1.0, 9.0]])


@pytest.mark.parametrize("step", [0, 3, 1000])
def test_without_memory_it_is_that_of_the_batch(step):
    average = averaged(get_quadratic_model("exact"))
    for gram in (7 * GRAM, GRAM):
        add(average, gram, [2.0, 3.0], step)
    np.testing.assert_allclose(read(average, [2.0, 3.0]), GRAM, rtol=1e-12)


def test_quotients_are_averaged_and_norms_are_those_of_the_step():
    average = averaged(kng.QuadraticModel(period=1, decay=0.75))
    add(average, GRAM, [2.0, 3.0], 100)
    add(average, 2 * GRAM, [1.0, 1.0], 101)
    quotient = GRAM / np.outer([2.0, 3.0], [2.0, 3.0])
    mean = (0.75 * 0.25 * quotient + 0.25 * 2 * GRAM) / (0.75 * 0.25 + 0.25)
    expected = mean * np.outer([5.0, 0.5], [5.0, 0.5])
    np.testing.assert_allclose(read(average, [5.0, 0.5]), expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("step", "decay"), [(0, 0.0), (10, 0.0), (20, 0.5), (50, 0.8), (999, 0.9)]
)
def test_span_is_a_fifth_of_the_steps(step, decay):
    """With a period of two, and a largest decay of 0.9."""
    average = averaged(kng.QuadraticModel(period=2, decay=0.9))
    found = average._decay(tf.constant(step), tf.float64)
    np.testing.assert_allclose(found, decay, atol=1e-12)


def test_a_direction_of_zero_says_nothing():
    average = averaged(kng.QuadraticModel(period=1, decay=0.75))
    add(average, [[4.0, 0.0], [0.0, 0.0]], [2.0, 0.0], 100)
    np.testing.assert_allclose(
        read(average, [2.0, 5.0]), [[4.0, 0.0], [0.0, 0.0]]
    )
    add(average, GRAM, [2.0, 3.0], 101)
    np.testing.assert_allclose(read(average, [2.0, 3.0]), GRAM, rtol=1e-12)
    add(average, [[4.0, 0.0], [0.0, 0.0]], [2.0, 0.0], 102)
    np.testing.assert_allclose(read(average, [2.0, 3.0]), GRAM, rtol=1e-12)


def test_due_at_multiples_of_the_period():
    average = averaged(kng.QuadraticModel(period=3))
    due = []
    for step in range(10):
        if average.is_due(tf.constant(step)):
            due.append(step)
            add(average, GRAM, [1.0, 1.0], tf.constant(step))
    assert due == [0, 3, 6, 9]


@pytest.mark.parametrize(
    ("few", "alone", "then"),
    [(False, 11, [12, 14, 16, 19, 22]), (True, 21, [22, 24, 26])],
)
def test_gaps_open_with_the_steps(few, alone, then):
    """At a fifth of the steps, or a tenth where examples are few."""
    average = averaged(kng.QuadraticModel(period=4), growth=0.5)
    due = []
    for step in range(60):
        if average.is_due(tf.constant(step)):
            due.append(step)
            average.add(
                tf.constant(GRAM),
                tf.ones([2], tf.float64),
                tf.constant(step),
                few,
            )
    assert due[:alone] == list(range(alone))
    assert due[alone : alone + len(then)] == then
    assert np.diff(due)[-3:].tolist() == [4, 4, 4]


def test_names_and_configs():
    assert get_quadratic_model("estimated") == kng.QuadraticModel()
    assert get_quadratic_model("exact") == kng.QuadraticModel("exact", 1, 0.0)
    model = kng.QuadraticModel("exact", 3, 0.5)
    config = keras.saving.serialize_keras_object(model)
    assert get_quadratic_model(config) == model
    optimizer = kng.KFAC(quadratic_model=model)
    again = kng.KFAC.from_config(optimizer.get_config())
    assert again.settings.quadratic_model == model


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "sampled"}, "`kind` must be 'exact' or 'estimated'"),
        ({"period": 0}, "`period` must be a positive number of steps"),
        ({"decay": 1.0}, r"`decay` must be in \[0, 1\)"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        kng.QuadraticModel(**arguments)


def test_bad_name():
    with pytest.raises(ValueError, match="or a keras_natgrad.QuadraticModel"):
        kng.KFAC(quadratic_model="none")
