"""Sums of operators against sums of matrices."""

import numpy as np
import pytest
import tensorflow as tf

from keras_natgrad.linalg import OperatorSum, kronecker_operator


def symmetric(size, seed):
    root = np.random.default_rng(seed).normal(size=(size, size))
    return root @ root.T


@pytest.mark.parametrize("jit_compile", [None, False, True])
def test_equals_the_sum_of_the_matrices(jit_compile):
    left, right = symmetric(2, 0), symmetric(3, 1)
    diagonal = np.array([0.5, 2.0])
    x = np.random.default_rng(2).normal(size=(6, 4))

    def run(x):
        full = tf.linalg.LinearOperatorFullMatrix
        operator = OperatorSum(
            [
                kronecker_operator(full(tf.constant(left)), full(right)),
                kronecker_operator(
                    tf.linalg.LinearOperatorDiag(tf.constant(diagonal)),
                    full(right),
                ),
            ]
        )
        assert operator.shape == (6, 6) and operator.is_self_adjoint
        return (
            operator.to_dense(),
            operator.matmul(x),
            operator.matmul(x, adjoint=True),
            operator.matvec(x[:, 0]),
            operator.trace(),
            operator.diag_part(),
            operator.matmul(tf.transpose(x), adjoint_arg=True),
        )

    if jit_compile is not None:
        run = tf.function(run, jit_compile=jit_compile)
    dense = np.kron(left, right) + np.kron(np.diag(diagonal), right)
    expected = (
        dense,
        dense @ x,
        dense @ x,
        dense @ x[:, 0],
        np.trace(dense),
        np.diag(dense),
        dense @ x,
    )
    for found, value in zip(run(tf.constant(x)), expected, strict=True):
        np.testing.assert_allclose(found, value, rtol=1e-11, atol=1e-12)
