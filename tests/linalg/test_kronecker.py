"""Kronecker products in the row-major convention."""

import numpy as np
import pytest
import tensorflow as tf

from keras_natgrad.linalg import (
    flatten_matrix,
    kronecker_operator,
    trace_norm_ratio,
)


def operators(seed=0):
    rng = np.random.default_rng(seed)
    left, right = rng.normal(size=(3, 5)), rng.normal(size=(2, 4))
    left, right = left @ left.T, right @ right.T
    operator = kronecker_operator(
        tf.linalg.LinearOperatorFullMatrix(left, is_self_adjoint=True),
        tf.linalg.LinearOperatorFullMatrix(right, is_self_adjoint=True),
    )
    return left, right, operator


def test_flatten_is_row_major():
    matrix = np.arange(6.0).reshape(2, 3)
    np.testing.assert_array_equal(
        flatten_matrix(tf.constant(matrix)), np.arange(6.0)
    )


def test_operator_equals_the_dense_product():
    left, right, operator = operators()
    np.testing.assert_allclose(operator.to_dense(), np.kron(left, right))


def test_operator_acts_on_flattened_kernels():
    left, right, operator = operators()
    kernel = np.random.default_rng(1).normal(size=(3, 2))
    product = operator.matvec(flatten_matrix(tf.constant(kernel)))
    expected = (left @ kernel @ right.T).ravel()
    np.testing.assert_allclose(product, expected, rtol=1e-12)


def test_algebra_of_the_operator():
    left, right, operator = operators()
    dense = np.kron(left, right)
    np.testing.assert_allclose(operator.trace(), np.trace(dense))
    np.testing.assert_allclose(operator.diag_part(), np.diag(dense))
    np.testing.assert_allclose(
        operator.determinant(), np.linalg.det(dense), rtol=1e-9
    )
    np.testing.assert_allclose(
        operator.inverse().to_dense(), np.linalg.inv(dense), rtol=1e-8
    )


@pytest.mark.parametrize(
    ("left", "right", "expected"),
    [(4.0, 1.0, 2.0), (1.0, 4.0, 0.5), (1e-12, 1e-20, 1e4)],
)
def test_trace_norm_ratio(left, right, expected):
    ratio = trace_norm_ratio(
        tf.constant(left, tf.float64), tf.constant(right, tf.float64)
    )
    np.testing.assert_allclose(ratio, expected)


@pytest.mark.parametrize(
    ("left", "right"), [(0.0, 1.0), (1.0, 0.0), (0.0, 0.0)]
)
def test_trace_norm_ratio_of_a_zero_factor_is_one(left, right):
    assert trace_norm_ratio(tf.constant(left), tf.constant(right)) == 1.0


def test_ratio_damps_both_factors_equally_relative_to_their_scale():
    left, right = tf.constant(9.0), tf.constant(0.25)
    ratio = trace_norm_ratio(left, right)
    np.testing.assert_allclose(ratio / left, (1.0 / ratio) / right)
