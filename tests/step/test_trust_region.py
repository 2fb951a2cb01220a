"""The bound on the Fisher norm."""

import numpy as np
import pytest
import tensorflow as tf

from keras_natgrad.step import norm_scale

BOUND = 0.01


def scale(norm, bound=BOUND):
    return float(norm_scale(tf.constant(norm, tf.float64), bound))


@pytest.mark.parametrize("norm", [0.0, 1e-30, 0.0099, 0.01])
def test_inside_is_untouched(norm):
    assert scale(norm) == 1.0


@pytest.mark.parametrize("norm", [0.010001, 0.5, 1e30])
def test_outside_reaches_the_bound_exactly(norm):
    assert 0.0 < scale(norm) < 1.0
    np.testing.assert_allclose(scale(norm) ** 2 * norm, BOUND, rtol=1e-14)


def test_tensor_bound():
    assert scale(4.0, tf.constant(1.0)) == 0.5


def test_random_updates_end_at_the_bound_or_stay():
    rng = np.random.default_rng(0)
    root = rng.normal(size=(6, 6))
    fisher = root @ root.T
    for size in (1e-4, 1e-2, 1.0):
        update = size * rng.normal(size=6)
        norm = update @ fisher @ update
        update *= scale(norm)
        np.testing.assert_allclose(
            update @ fisher @ update, min(norm, BOUND), rtol=1e-13
        )
