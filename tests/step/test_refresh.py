"""Periods and their warm-up."""

import numpy as np
import pytest
import tensorflow as tf

from keras_natgrad.step import Refresh, is_multiple


def renewals(refresh, period, steps, dtype=tf.int32):
    """Steps at which something is renewed, as an optimizer does it."""
    due_at, found = tf.constant(0, tf.int32), []
    for step in range(steps):
        step = tf.constant(step, dtype)
        if refresh.is_due(step, due_at):
            found.append(int(step))
            due_at = refresh.next_due(step, period)
            assert due_at.dtype == tf.int32
    return found


@pytest.mark.parametrize("dtype", [tf.int32, tf.int64])
@pytest.mark.parametrize("period", [1, 3, 5, 100])
def test_multiples_without_growth(period, dtype):
    refresh = Refresh(1, 1, growth=None)
    expected = list(range(0, 12, period))
    assert renewals(refresh, period, 12, dtype) == expected


def test_late_renewal_returns_to_multiples():
    """After steps that were not usable."""
    refresh = Refresh(1, 1, growth=None)
    assert int(refresh.next_due(tf.constant(7), 5)) == 10


@pytest.mark.parametrize("growth", [0.1, 0.2, 1.0])
@pytest.mark.parametrize("period", [1, 4, 10])
def test_gaps_grow_up_to_the_period(growth, period):
    found = renewals(Refresh(1, 1, growth), period, 200)
    assert found[:2] == [0, 1]
    for step, following in zip(found[:-1], found[1:], strict=True):
        gap = int(np.float32(growth) * np.float32(step))
        assert following - step == min(max(gap, 1), period)
    assert np.diff(found)[-1] == period


def test_in_a_graph():
    refresh = Refresh(1, 1, 0.5)
    traced = tf.function(
        lambda step: refresh.next_due(step, 4), jit_compile=True
    )
    for step in range(12):
        step = tf.constant(step)
        assert int(traced(step)) == int(refresh.next_due(step, 4))


@pytest.mark.parametrize("dtype", [tf.int32, tf.int64])
def test_is_multiple(dtype):
    steps = [tf.constant(step, dtype) for step in range(7)]
    found = [int(step) for step in steps if is_multiple(step, 3)]
    assert found == [0, 3, 6]


def test_wrong_arguments():
    with pytest.raises(ValueError, match="`curvature_update_period` must"):
        Refresh(0, 1)
    with pytest.raises(ValueError, match="`inverse_update_period` must"):
        Refresh(1, 0)
    with pytest.raises(ValueError, match="`refresh_growth` must be"):
        Refresh(1, 1, 0.0)
