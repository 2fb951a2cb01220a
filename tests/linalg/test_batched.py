"""Inverses of many matrices at once."""

import numpy as np
import pytest
import tensorflow as tf

from keras_natgrad.linalg import damped_inverses


def matrices(count, size, seed=0):
    rng = np.random.default_rng(seed)
    roots = rng.normal(size=(count, size, 2 * size))
    return roots @ np.swapaxes(roots, 1, 2)


@pytest.mark.variants("False-4-5", "False-1-150", "True-1-5")
@pytest.mark.parametrize(("count", "size"), [(4, 5), (1, 5), (1, 150), (2, 40)])
@pytest.mark.parametrize("compiled", [False, True])
def test_inverses(count, size, compiled):
    given, dampings = matrices(count, size), np.linspace(0.0, 2.0, count)
    run = tf.function(damped_inverses, jit_compile=compiled)
    result = run(tf.constant(given), tf.constant(dampings))
    eye = np.eye(size)
    expected = np.linalg.inv(given + dampings[:, None, None] * eye)
    np.testing.assert_allclose(result.inverses, expected, rtol=1e-9, atol=1e-12)
    assert int(result.retries) == 0
    assert np.all(result.succeeded)


@pytest.mark.parametrize("compiled", [False, True])
def test_only_failed_ones_are_damped_more(compiled):
    given = matrices(3, 4)
    vector = np.array([1.0, 2.0, 0.0, 1.0])
    given[1] = np.outer(vector, vector) - 1e-12 * np.eye(4)
    run = tf.function(damped_inverses, jit_compile=compiled)
    result = run(tf.constant(given), tf.zeros([3], tf.float64))
    assert np.all(result.succeeded)
    assert int(result.retries) >= 1
    for index in (0, 2):
        np.testing.assert_allclose(
            result.inverses[index], np.linalg.inv(given[index]), rtol=1e-9
        )
    assert np.all(np.isfinite(result.inverses[1]))


def test_hopeless_ones_are_reported_and_not_tried_again():
    given = matrices(3, 4)
    given[0], given[2] = 0.0, np.nan
    result = damped_inverses(tf.constant(given), tf.zeros([3], tf.float64))
    np.testing.assert_array_equal(result.succeeded, [False, True, False])
    assert int(result.retries) == 0
    np.testing.assert_allclose(
        result.inverses[1], np.linalg.inv(given[1]), rtol=1e-9
    )
