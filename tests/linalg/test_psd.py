"""Damped inverses of PSD matrices, and what happens when they fail."""

import numpy as np
import pytest
import tensorflow as tf

from keras_natgrad.linalg import (
    damped_inverse,
    damped_inverse_root,
    damped_solve,
    pseudo_inverse_solve,
)

MODES = ["eager", "graph", "xla"]


def run(mode, matrix, damping):
    """Calls `damped_inverse` in one of the ways it is executed."""
    call = damped_inverse
    if mode != "eager":
        call = tf.function(damped_inverse, jit_compile=mode == "xla")
    result = call(tf.constant(matrix), tf.constant(damping, matrix.dtype))
    return result.inverse.numpy(), int(result.retries), bool(result.succeeded)


def positive_matrix(size, seed=0, dtype=np.float64):
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(size, 2 * size))
    return (root @ root.T / size).astype(dtype)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("damping", [0.0, 1e-3, 10.0])
def test_equals_the_dense_inverse(mode, damping):
    matrix = positive_matrix(5)
    inverse, retries, succeeded = run(mode, matrix, damping)
    expected = np.linalg.inv(matrix + damping * np.eye(5))
    np.testing.assert_allclose(inverse, expected, rtol=1e-11, atol=1e-13)
    np.testing.assert_array_equal(inverse, inverse.T)
    assert (retries, succeeded) == (0, True)


@pytest.mark.parametrize("size", [3, 150])
def test_root_of_the_inverse(size):
    matrix = positive_matrix(size)
    result = damped_inverse_root(
        tf.constant(matrix), tf.constant(0.1, tf.float64)
    )
    root = result.inverse.numpy()
    damped = matrix + 0.1 * np.eye(size)
    np.testing.assert_allclose(root @ damped @ root.T, np.eye(size), atol=1e-11)
    np.testing.assert_array_equal(root, np.tril(root))
    assert (int(result.retries), bool(result.succeeded)) == (0, True)
    # Without damping a zero matrix has no root.
    zero = tf.zeros([size, size], tf.float64)
    result = damped_inverse_root(zero, tf.constant(0.0, tf.float64))
    assert not bool(result.succeeded)


@pytest.mark.variants("1-graph", "129-graph", "300-graph")
@pytest.mark.parametrize("mode", ["graph", "xla"])
@pytest.mark.parametrize("size", [1, 128, 129, 160, 300, 513])
def test_inverse_by_blocks(mode, size):
    """Sizes around the leaf, odd ones, several levels of halves."""
    matrix = positive_matrix(size)
    inverse, retries, succeeded = run(mode, matrix, 1e-3)
    expected = np.linalg.inv(matrix + 1e-3 * np.eye(size))
    error = np.linalg.norm(inverse - expected) / np.linalg.norm(expected)
    assert error < 1e-12
    np.testing.assert_allclose(inverse, inverse.T, rtol=0, atol=1e-12)
    assert (retries, succeeded) == (0, True)


def test_inverse_by_blocks_is_as_accurate_as_one_factorisation():
    """Condition number 10⁵ in float32, against float64: the same order."""
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(400, 400)))[0]
    matrix = (basis * np.logspace(0, -5, 400)) @ basis.T
    inverse, _, succeeded = run("graph", matrix.astype(np.float32), 0.0)
    whole = tf.linalg.cholesky_solve(
        tf.linalg.cholesky(tf.constant(matrix, tf.float32)), tf.eye(400)
    )
    expected = np.linalg.inv(matrix)

    def error(found):
        return np.linalg.norm(found - expected) / np.linalg.norm(expected)

    assert succeeded
    assert error(inverse) < 5 * error(whole.numpy())


@pytest.mark.parametrize("mode", MODES)
def test_late_failure_of_a_block_is_retried(mode):
    """A negative eigenvalue that only the last block meets."""
    matrix = np.eye(200)
    matrix[-1, -1] = -1.0
    inverse, retries, succeeded = run(mode, matrix, 0.02)
    expected = np.linalg.inv(matrix + 2.0 * np.eye(200))
    np.testing.assert_allclose(inverse, expected, rtol=1e-12)
    assert (retries, succeeded) == (2, True)


def test_singular_matrix_with_damping():
    vector = np.array([1.0, 2.0, -1.0])
    matrix = np.outer(vector, vector)
    inverse, retries, succeeded = run("eager", matrix, 1e-4)
    expected = np.linalg.inv(matrix + 1e-4 * np.eye(3))
    np.testing.assert_allclose(inverse, expected, rtol=1e-9)
    assert (retries, succeeded) == (0, True)


@pytest.mark.parametrize("mode", MODES)
def test_indefinite_matrix_is_retried_with_ten_times_the_damping(mode):
    # λ = 0.02 and 0.2 do not reach the eigenvalue −1; λ = 2 does.
    matrix = np.diag([4.0, 3.0, -1.0])
    inverse, retries, succeeded = run(mode, matrix, 0.02)
    expected = np.linalg.inv(matrix + 2.0 * np.eye(3))
    np.testing.assert_allclose(inverse, expected, rtol=1e-12)
    assert (retries, succeeded) == (2, True)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_slightly_indefinite_matrix_without_damping_recovers(mode, dtype):
    matrix = np.diag([1.0, 1.0, -1e-7]).astype(dtype)
    inverse, retries, succeeded = run(mode, matrix, 0.0)
    assert succeeded and retries > 0
    assert np.all(np.isfinite(inverse))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_non_finite_matrix_fails_with_zeros(mode, broken):
    matrix = positive_matrix(3)
    matrix[1, :] = matrix[:, 1] = broken
    inverse, retries, succeeded = run(mode, matrix, 0.1)
    np.testing.assert_array_equal(inverse, np.zeros((3, 3)))
    assert not succeeded
    assert retries == 8


@pytest.mark.parametrize("mode", MODES)
def test_hopeless_matrix_gives_up(mode):
    matrix = np.diag([1.0, -1e12])
    inverse, retries, succeeded = run(mode, matrix, 1e-6)
    np.testing.assert_array_equal(inverse, np.zeros((2, 2)))
    assert (retries, succeeded) == (8, False)


def test_zero_matrix_needs_only_damping():
    inverse, retries, succeeded = run("eager", np.zeros((2, 2)), 0.5)
    np.testing.assert_allclose(inverse, 2.0 * np.eye(2))
    assert (retries, succeeded) == (0, True)


def test_large_condition_number_in_float32():
    matrix = np.diag([1e6, 1.0, 1e-6]).astype(np.float32)
    inverse, _, succeeded = run("graph", matrix, 1e-3)
    expected = 1.0 / (np.diag(matrix) + 1e-3)
    assert succeeded
    np.testing.assert_allclose(np.diag(inverse), expected, rtol=1e-5)


@pytest.mark.parametrize("damping", [0.0, 1e-3, 1.0])
def test_damped_solve(damping):
    matrix = positive_matrix(12)
    right = np.random.default_rng(1).normal(size=(12, 2))
    found = damped_solve(
        tf.constant(matrix),
        tf.constant(right),
        tf.constant(damping, tf.float64),
    )
    expected = np.linalg.solve(matrix + damping * np.eye(12), right)
    np.testing.assert_allclose(found.solution, expected, rtol=1e-8)
    assert int(found.retries) == 0 and bool(found.succeeded)


def test_damped_solve_raises_the_damping_of_a_singular_matrix():
    matrix = np.ones((6, 6))
    matrix[0, 0] = 1 - 1e-9
    found = damped_solve(
        tf.constant(matrix),
        tf.ones([6, 1], tf.float64),
        tf.constant(0.0, tf.float64),
    )
    assert int(found.retries) > 0 and bool(found.succeeded)


def test_damped_solve_of_what_is_not_finite_is_zero():
    matrix = tf.fill([4, 4], tf.constant(np.nan, tf.float64))
    right = tf.ones([4, 1], tf.float64)
    found = damped_solve(matrix, right, tf.constant(1.0, tf.float64))
    assert not bool(found.succeeded)
    np.testing.assert_array_equal(found.solution, np.zeros((4, 1)))


@pytest.mark.parametrize("rank", [2, 5, 9])
def test_pseudo_inverse_solve(rank):
    root = np.random.default_rng(rank).normal(size=(9, rank))
    right = np.random.default_rng(0).normal(size=9)
    found = pseudo_inverse_solve(tf.constant(root @ root.T), tf.constant(right))
    expected = np.linalg.pinv(root @ root.T, rcond=1e-12) @ right
    np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-10)


def test_pseudo_inverse_solve_of_a_batch():
    root = np.random.default_rng(0).normal(size=(2, 5, 3))
    matrix = root @ root.swapaxes(-1, -2)
    matrix[1] *= 1e-20  # Each matrix has a cutoff of its own.
    right = np.random.default_rng(1).normal(size=(2, 5))
    inverse = np.linalg.pinv(matrix, rcond=1e-12, hermitian=True)
    np.testing.assert_allclose(
        pseudo_inverse_solve(tf.constant(matrix), tf.constant(right)),
        np.einsum("bij,bj->bi", inverse, right),
        rtol=1e-9,
    )


def test_pseudo_inverse_cutoff():
    values = np.array([1.0, 1e-2, 1e-5])
    found = pseudo_inverse_solve(
        tf.linalg.diag(tf.constant(values)), tf.ones([3], tf.float64), 1e-3
    )
    np.testing.assert_allclose(found, [1.0, 100.0, 0.0], rtol=1e-12)
