"""The guard against a surge of the loss."""

import math

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_natgrad.step.guard import SurgeGuard, _debiased, loss_before


class Guard:
    """A `SurgeGuard` with its state."""

    def __init__(self):
        self.rule = SurgeGuard()
        self.state = self.rule.build(add_variable)

    def is_surge(self, loss):
        return self.rule.is_surge(self.state, loss)

    def is_blamed(self, loss, before):
        return self.rule.is_blamed(self.state, loss, before)

    def accept(self, loss):
        self.rule.accept(self.state, loss)


@pytest.fixture
def make_guard():
    """Factory of float64 guards that have accepted some losses."""

    def make(losses=()):
        guard = Guard()
        for loss in losses:
            guard.accept(tf.constant(loss, tf.float64))
        return guard

    return make


def add_variable(name, shape, initializer):
    return keras.Variable(
        initializer, shape=shape, dtype="float64", trainable=False, name=name
    )


def is_surge(guard, loss):
    return bool(guard.is_surge(tf.constant(loss, tf.float64)))


def recomputed(losses):
    """Average, deviation and threshold by weights `0.9 ** age`."""
    weights = 0.9 ** np.arange(len(losses))[::-1]
    averages = [
        np.average(losses[:seen], weights=weights[-seen:])
        for seen in range(1, len(losses) + 1)
    ]
    # Each loss against the average before it; the first has none.
    differences = [0.0, *np.abs(np.subtract(losses[1:], averages[:-1]))]
    deviation = np.average(differences, weights=weights)
    average = averages[-1]
    return average, deviation, average + 5 * deviation + 0.5 * abs(average)


@pytest.mark.parametrize("loss", [-1e30, 0.0, 1e30, math.inf])
def test_nothing_is_a_surge_before_the_first_loss(loss, make_guard):
    assert not is_surge(make_guard(), loss)


@pytest.mark.parametrize("count", [1, 3, 100])
@pytest.mark.parametrize("loss", [-2.0, 0.0, 0.1, 3.0])
def test_an_equal_loss_is_none(loss, count, make_guard):
    assert not is_surge(make_guard([loss] * count), loss)


@pytest.mark.parametrize(
    ("loss", "threshold"), [(2.0, 3.0), (-2.0, -1.0)], ids=["pos", "neg"]
)
def test_half_the_average_above_losses_without_noise(
    loss, threshold, make_guard
):
    guard = make_guard([loss] * 4)
    assert not is_surge(guard, threshold - 1e-6)
    assert is_surge(guard, threshold + 1e-6)
    assert is_surge(guard, math.inf)


@pytest.mark.parametrize("count", [1, 2, 5, 40])
def test_average_and_threshold_are_the_debiased_ones(count, make_guard):
    losses = np.random.default_rng(0).normal(1.0, 0.5, size=count)
    guard = make_guard(losses)
    average, deviation, threshold = recomputed(losses)
    found = [float(value) for value in _debiased(guard.state)]
    np.testing.assert_allclose(
        found, [average, deviation, 1 - 0.9**count], rtol=1e-12, atol=1e-15
    )
    assert not is_surge(guard, threshold - 1e-9)
    assert is_surge(guard, threshold + 1e-9)


def test_noise_is_none(make_guard):
    """An average near zero leaves the deviations alone to allow for it.

    The mean absolute deviation of a normal is 0.8 of the standard deviation,
    so the threshold is near 4: of 300 batches less than 0.01 are expected
    beyond. The first losses are left out, as the deviation is unknown then.
    """
    losses = np.random.default_rng(1).normal(size=320)
    guard = make_guard(losses[:20])
    for loss in losses[20:]:
        assert not is_surge(guard, loss)
        guard.accept(tf.constant(loss, tf.float64))
    assert is_surge(guard, 8.0)


def test_decisions_do_not_depend_on_the_scale(make_guard):
    rng = np.random.default_rng(2)
    losses = rng.normal(1.0, 0.3, size=30)
    probes = np.linspace(-1.0, 6.0, 50)

    def decisions(scale):
        guard, found = make_guard(), []
        for loss in scale * losses:
            guard.accept(tf.constant(loss, tf.float64))
            found.append([is_surge(guard, scale * probe) for probe in probes])
        return np.array(found)

    expected = decisions(1.0)
    assert expected.any() and not expected.all()
    for scale in (1e3, 1e-3):
        np.testing.assert_array_equal(decisions(scale), expected)


def test_nan_is_no_surge_by_itself(make_guard):
    """Losses that are no numbers are the optimizer's to skip."""
    guard = make_guard([1.0, 1.0])
    assert not is_surge(guard, math.nan)
    assert is_surge(guard, 2.0)


def test_an_accepted_nan_ends_the_guard(make_guard):
    """It stays in the averages, and nothing compares with them any more."""
    guard = make_guard([1.0, math.nan, 1.0])
    assert not is_surge(guard, 1e30)


@pytest.mark.parametrize("jit_compile", [False, True])
def test_float32_loss_in_a_graph(jit_compile, make_guard):
    guard, expected = make_guard(), make_guard([1.0, 1.25])

    @tf.function(jit_compile=jit_compile)
    def accept(loss):
        surge = guard.is_surge(loss)
        guard.accept(loss)
        return surge

    found = [bool(accept(tf.constant(v))) for v in (1.0, 1.25)]
    assert found == [False, False]
    np.testing.assert_allclose(
        _debiased(guard.state), _debiased(expected.state), rtol=1e-12
    )
    assert accept(tf.constant(9.0))


@pytest.mark.parametrize(
    ("before", "blamed"), [(1.0, True), (1.4, True), (1.6, False), (2.5, False)]
)
@pytest.mark.parametrize("scale", [1.0, 1e3, 1e-3])
def test_step_is_blamed_for_more_than_half_of_a_surge(
    before, blamed, scale, make_guard
):
    """A hard batch was as bad before the step."""
    guard = make_guard([scale, scale, scale])
    found = guard.is_blamed(
        tf.constant(2.0 * scale, tf.float64),
        tf.constant(before * scale, tf.float64),
    )
    assert bool(found) == blamed


@pytest.mark.parametrize("jit_compile", [None, False, True])
def test_loss_before_leaves_the_weights_as_they_are(jit_compile):
    rng = np.random.default_rng(0)
    values, steps = rng.normal(size=(2, 5)).astype("float32")
    weight, velocity = keras.Variable(values), keras.Variable(steps)

    def measure():
        return loss_before(
            lambda: tf.reduce_sum(weight.value**2), [weight], [velocity]
        )

    if jit_compile is not None:
        measure = tf.function(measure, jit_compile=jit_compile)
    expected = np.sum((values - steps) ** 2)
    np.testing.assert_allclose(measure(), expected, rtol=1e-5)
    np.testing.assert_array_equal(weight, values)
    np.testing.assert_array_equal(velocity, steps)
