"""Periods."""

import numpy as np
import pytest
import tensorflow as tf

from keras_natgrad.step import is_due
from keras_natgrad.step.refresh import check_period


@pytest.mark.parametrize("dtype", [tf.int32, tf.int64])
@pytest.mark.parametrize(
    ("period", "dense_steps", "expected"),
    [
        (1, 0, [0, 1, 2, 3, 4, 5, 6, 7]),
        (3, 0, [0, 3, 6]),
        (5, 0, [0, 5]),
        (3, 2, [0, 1, 3, 6]),
        (4, 3, [0, 1, 2, 4]),
        (100, 4, [0, 1, 2, 3]),
    ],
)
def test_is_due(dtype, period, dense_steps, expected):
    found = [
        step
        for step in range(8)
        if is_due(tf.constant(step, dtype), period, dense_steps)
    ]
    assert found == expected


def test_is_due_in_a_graph():
    traced = tf.function(lambda step: is_due(step, 2), jit_compile=True)
    steps = tf.range(4)
    np.testing.assert_array_equal(
        [bool(traced(step)) for step in steps], [True, False, True, False]
    )


@pytest.mark.parametrize("value", [1, 7])
def test_check_period(value):
    assert check_period("period", value) == value


@pytest.mark.parametrize("value", [0, -1, 1.5, 2.0, True, None, "5"])
def test_check_period_of_something_else(value):
    with pytest.raises(ValueError, match="`every` must be a positive") as error:
        check_period("every", value)
    assert f"Received: every={value!r}" in str(error.value)
