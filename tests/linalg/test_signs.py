"""Random signs."""

import numpy as np
import tensorflow as tf

from keras_natgrad.linalg import random_signs

SEED = tf.constant([1, 2])


def test_random_signs():
    signs = random_signs([1000], SEED, tf.float64)
    assert signs.dtype == tf.float64
    assert set(np.unique(signs)) == {-1.0, 1.0}
    assert abs(np.mean(signs)) < 0.16  # five standard errors
    again = random_signs([1000], SEED, tf.float64)
    other = random_signs([1000], tf.constant([1, 3]), tf.float64)
    np.testing.assert_array_equal(signs, again)
    assert np.any(signs != other)


def test_compiled_signs_are_the_same():
    signs = random_signs([1000], SEED, tf.float32)
    for compiled in (False, True):

        @tf.function(jit_compile=compiled)
        def draw(shape):
            return random_signs(shape, SEED, tf.float32)

        # The shape is no constant in the graph.
        np.testing.assert_array_equal(draw(tf.constant([1000])), signs)
