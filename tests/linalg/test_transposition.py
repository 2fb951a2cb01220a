"""Transposes by a product with the identity."""

import numpy as np
import pytest
import tensorflow as tf

from keras_natgrad.linalg import transposed


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    "shape", [(81, 80), (3, 50), (50, 3), (64, 300), (200, 200)]
)
def test_the_same_bits(shape, dtype):
    rng = np.random.default_rng(0)
    matrix = (10.0 ** rng.uniform(-30, 30, size=shape)).astype(dtype)
    matrix[rng.random(shape) < 0.5] *= -1
    for function in (
        transposed,
        tf.function(transposed),
        tf.function(transposed, jit_compile=True),
    ):
        np.testing.assert_array_equal(function(tf.constant(matrix)), matrix.T)
