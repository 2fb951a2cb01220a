"""Two matrices that are diagonalised at once."""

import numpy as np
import pytest
import scipy.linalg
import tensorflow as tf

from keras_natgrad.linalg import pencil

SIZE = 5


def moment(rank=SIZE, scale=1.0, seed=0):
    root = np.random.default_rng(seed).normal(size=(SIZE, rank))
    return scale * root @ root.T


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
@pytest.mark.parametrize("ranks", [(5, 5), (2, 5), (3, 3)])
def test_diagonalises_both(ranks, scale):
    first, second = moment(ranks[0], scale), moment(ranks[1], seed=1)
    basis, weights, retries = pencil(tf.constant(first), tf.constant(second))
    basis, weights = basis.numpy(), weights.numpy()
    assert int(retries) == 0
    for matrix, found in zip((first, second), weights, strict=True):
        expected = np.diag(found)
        size = np.linalg.norm(expected)
        product = basis.T @ matrix @ basis
        np.testing.assert_allclose(product, expected, atol=1e-12 * size)
    if ranks[1] == SIZE:
        # The generalised eigenvalues.
        expected = scipy.linalg.eigh(first, second, eigvals_only=True)
        found = np.sort(weights[0] / weights[1])
        np.testing.assert_allclose(found, expected, atol=1e-11 * found.max())


def test_under_xla():
    """As accurate as without, which the eigenvectors alone are not."""
    first, second = tf.constant(moment()), tf.constant(moment(seed=1))
    call = tf.function(pencil, jit_compile=True)
    basis, weights, _ = (each.numpy() for each in call(first, second))
    for matrix, found in zip((first, second), weights, strict=True):
        expected = np.diag(found)
        np.testing.assert_allclose(
            basis.T @ matrix @ basis,
            expected,
            atol=1e-10 * np.linalg.norm(expected),
        )


def test_a_diagonal_beside_a_matrix():
    values, matrix = np.arange(SIZE) + 0.5, moment()
    for pair, dense in (
        ((values, matrix), (np.diag(values), matrix)),
        ((matrix, values), (matrix, np.diag(values))),
    ):
        found = pencil(*map(tf.constant, pair))
        expected = pencil(*map(tf.constant, dense))
        np.testing.assert_array_equal(found.basis, expected.basis)
        np.testing.assert_array_equal(found.weights, expected.weights)


def test_two_diagonals_keep_the_identity():
    first, second = np.arange(SIZE) + 0.5, np.ones(SIZE)
    basis, weights, retries = pencil(tf.constant(first), tf.constant(second))
    assert basis is None and int(retries) == 0
    np.testing.assert_array_equal(weights, [first, second])


def test_a_zero_matrix_stays_zero():
    zero, matrix = tf.zeros([SIZE, SIZE], tf.float64), tf.constant(moment())
    for pair, index in (((zero, matrix), 0), ((matrix, zero), 1)):
        basis, weights, _ = pencil(*pair)
        np.testing.assert_allclose(weights[index], 0, atol=1e-14)
        product = tf.linalg.matmul(basis, matrix @ basis, transpose_a=True)
        expected = np.diag(weights[1 - index])
        np.testing.assert_allclose(
            product, expected, atol=1e-12 * np.linalg.norm(expected)
        )


def test_no_basis():
    """Of two zero matrices, and of what is not finite."""
    zero = np.zeros([SIZE, SIZE])
    for broken in (0.0, np.nan, np.inf):
        found = pencil(tf.constant(zero + broken), tf.constant(zero))
        assert np.all(np.isnan(found.basis))
