import numpy as np
import pytest
import tensorflow as tf

from keras_natgrad.solvers.remainder import remainder


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_rounding_is_no_remainder(matrix_factor, dtype):
    generator = np.random.default_rng(0)
    matrix = generator.normal(size=(30, 200)).astype(dtype)
    # Residuals nearly in the null space of A: its terms cancel.
    null = np.eye(200) - np.linalg.pinv(matrix) @ matrix
    u = (null @ generator.normal(size=200)).astype(dtype)
    factor = matrix_factor(matrix, u)
    gradient = (matrix.astype("float64") @ u.astype("float64")).astype(dtype)
    assert np.linalg.norm(gradient) > 0
    (rest,) = remainder(factor, [tf.constant(gradient)])
    np.testing.assert_array_equal(rest, np.zeros(30))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_regularizer_is_a_remainder(matrix_factor, dtype):
    generator = np.random.default_rng(0)
    matrix = generator.normal(size=(8, 20)).astype(dtype)
    u = generator.normal(size=20).astype(dtype)
    extra = (0.01 * generator.normal(size=8)).astype(dtype)
    factor = matrix_factor(matrix, u)
    (rest,) = remainder(factor, [factor.product(u)[0] + extra])
    np.testing.assert_allclose(rest, extra, rtol=1e-3)
