"""Transposes and further rows of small matrices."""

import numpy as np
import pytest
import tensorflow as tf

from keras_natgrad.linalg import append_row, transposed


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    "shape", [(81, 80), (3, 50), (50, 3), (64, 300), (200, 200)]
)
def test_transposed_has_the_same_bits(shape, dtype):
    rng = np.random.default_rng(0)
    matrix = (10.0 ** rng.uniform(-30, 30, size=shape)).astype(dtype)
    matrix[rng.random(shape) < 0.5] *= -1
    for function in (
        transposed,
        tf.function(transposed),
        tf.function(transposed, jit_compile=True),
    ):
        np.testing.assert_array_equal(function(tf.constant(matrix)), matrix.T)


@pytest.mark.parametrize(
    "shape", [(80, 80), (784, 80), (784, 400), (2, 300, 100)]
)
def test_further_row(shape):
    rng = np.random.default_rng(0)
    matrix = rng.normal(size=shape).astype("float32")
    row = rng.normal(size=(*shape[:-2], 1, shape[-1])).astype("float32")
    for function in (
        append_row,
        tf.function(append_row),
        tf.function(append_row, jit_compile=True),
    ):
        np.testing.assert_array_equal(
            function(tf.constant(matrix), tf.constant(row)),
            np.concatenate([matrix, row], axis=-2),
        )
