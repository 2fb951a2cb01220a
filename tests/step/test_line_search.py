import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_natgrad.step import LineSearch


def search(function, loss, **kwargs):
    rate, value = LineSearch(**kwargs).search(
        lambda rate: function(rate), tf.constant(loss, tf.float64)
    )
    return float(rate), float(value)


@pytest.mark.parametrize("best", [1.0, 0.25, 2.0**-9])
def test_finds_the_minimum_on_the_grid(best):
    rate, value = search(lambda a: (a / best - 1) ** 2, 1.0)
    assert rate == best and value == 0.0


def test_stops_when_the_loss_rises_again():
    calls = []

    def evaluate(rate):
        calls.append(float(rate))
        return (rate / 0.25 - 1) ** 2

    search(evaluate, 1.0)
    assert calls == [1.0, 0.5, 0.25, 0.125]


def test_smallest_rate_where_none_lowers_the_loss():
    rate, _ = search(lambda a: 2.0 + a, 1.0, halvings=5)
    assert rate == 2.0**-5


def test_rates_with_an_infinite_loss_are_passed_over():
    rate, _ = search(lambda a: tf.where(a > 0.3, np.inf, (a - 0.125) ** 2), 1.0)
    assert rate == 0.125


def test_largest():
    rate, _ = search(lambda a: (a - 8.0) ** 2, 64.0, largest=8.0)
    assert rate == 8.0


def test_config():
    rule = LineSearch(2.0, 7)
    config = keras.saving.serialize_keras_object(rule)
    assert keras.saving.deserialize_keras_object(config) == rule


@pytest.mark.parametrize(
    "kwargs", [{"largest": 0.0}, {"halvings": 0}, {"halvings": 1.5}]
)
def test_bad_arguments(kwargs):
    with pytest.raises(ValueError, match=next(iter(kwargs))):
        LineSearch(**kwargs)
