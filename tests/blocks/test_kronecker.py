"""Kronecker factors equal their definition."""

import numpy as np
import pytest
import tensorflow as tf

from tests.reference import kfac

DAMPING = 0.3


def definition(data, weight_sharing):
    weights = data.weights / data.weights.sum()
    return (
        kfac.input_factor(data.inputs, weights, weight_sharing),
        kfac.output_factor(data.columns, weight_sharing),
    )


@pytest.mark.parametrize("shared", [1, 3])
@pytest.mark.parametrize("weight_sharing", ["expand", "reduce"])
def test_factors(shared, weight_sharing, make_data, make_block, feed):
    data = make_data(shared)
    block = make_block("kronecker", weight_sharing=weight_sharing)
    feed(block, data)
    left, right = definition(data, weight_sharing)
    for average, expected in zip(
        block.averages().values(), (left, right), strict=True
    ):
        np.testing.assert_allclose(average, expected, rtol=1e-12)
    np.testing.assert_allclose(
        block.to_dense(), np.kron(left, right), rtol=1e-12
    )


def test_expand_and_reduce_agree_on_one_position(make_data, make_block, feed):
    data = make_data(shared=1)
    expand = make_block("kronecker")
    reduce = make_block("kronecker", weight_sharing="reduce")
    feed(expand, data)
    feed(reduce, data)
    np.testing.assert_allclose(expand.to_dense(), reduce.to_dense())


def moment(block, inputs, weights):
    return block.input_statistics(inputs, weights)["input_factor"]


def test_weights_are_relative(data, make_block):
    block = make_block("kronecker")
    once = moment(block, data.inputs, data.weights)
    scaled = moment(block, data.inputs, 7.0 * data.weights)
    np.testing.assert_allclose(once, scaled, rtol=1e-12)


def test_example_without_weight_does_not_count(data, make_block):
    block = make_block("kronecker")
    data.weights[2] = 0.0
    left = moment(block, data.inputs, data.weights)
    kept = [0, 1, 3, 4]
    expected = moment(block, data.inputs[kept], data.weights[kept])
    np.testing.assert_allclose(left, expected, rtol=1e-12)


def test_batch_without_any_weight_is_finite(data, make_block):
    """A batch of padding must not put NaN into the running average."""
    absent = np.zeros_like(data.weights)
    left = moment(make_block("kronecker"), data.inputs, absent)
    assert np.all(np.isfinite(left))


@pytest.mark.parametrize("weight_sharing", ["expand", "reduce"])
def test_precondition_is_the_factored_inverse(
    weight_sharing, data, make_block, feed
):
    block = make_block("kronecker", weight_sharing=weight_sharing)
    feed(block, data)
    block.refresh(tf.constant(DAMPING, tf.float64))
    left, right = kfac.factored_inverses(
        *definition(data, weight_sharing), DAMPING
    )
    solved = block.precondition(tf.constant(data.gradient))
    expected = np.kron(left, right) @ data.gradient.ravel()
    np.testing.assert_allclose(np.ravel(solved), expected, rtol=1e-10)


def test_given_ratio_replaces_the_trace_norm_ratio(data, make_block, feed):
    block = make_block("kronecker")
    feed(block, data)
    left, right = definition(data, "expand")
    root, ratio = np.sqrt(DAMPING), tf.constant(0.25, tf.float64)
    block.refresh(tf.constant(DAMPING, tf.float64), ratio)
    solved = block.precondition(tf.constant(data.gradient))
    expected = (
        np.linalg.inv(left + 0.25 * root * np.eye(3))
        @ data.gradient
        @ np.linalg.inv(right + root / 0.25 * np.eye(2))
    )
    np.testing.assert_allclose(solved, expected, rtol=1e-10)


def test_undamped_precondition_is_the_dense_solve(data, make_block, feed):
    block = make_block("kronecker")
    feed(block, data)
    block.refresh(tf.constant(0.0, tf.float64))
    solved = block.precondition(tf.constant(data.gradient))
    expected = np.linalg.solve(
        np.kron(*definition(data, "expand")), data.gradient.ravel()
    )
    np.testing.assert_allclose(np.ravel(solved), expected, rtol=1e-9)


def test_large_factor_is_kept_as_its_diagonal(data, make_block, feed):
    block = make_block("kronecker", max_factor_size=2)
    feed(block, data)
    left, right = definition(data, "expand")
    diagonal, dense = block.averages().values()
    np.testing.assert_allclose(diagonal, np.diag(left), rtol=1e-12)
    np.testing.assert_allclose(dense, right, rtol=1e-12)
    expected = np.kron(np.diag(np.diag(left)), right)
    np.testing.assert_allclose(block.to_dense(), expected, rtol=1e-12)
    assert block.memory == 2 * (3 + 4)
    assert "diag 3" in block.describe()


def test_factor_of_just_the_maximal_size_is_dense(make_block):
    block = make_block("kronecker", max_factor_size=3)
    assert block.memory == 2 * (9 + 4)


@pytest.mark.parametrize("size", [2, 1])
def test_diagonal_factors_precondition_like_dense_ones(
    size, data, make_block, feed
):
    """As the definition with the off-diagonal entries set to zero."""
    block = make_block("kronecker", max_factor_size=size)
    feed(block, data)
    left, right = definition(data, "expand")
    left = np.diag(np.diag(left))
    right = np.diag(np.diag(right)) if size == 1 else right
    block.refresh(tf.constant(DAMPING, tf.float64))
    inverses = kfac.factored_inverses(left, right, DAMPING)
    solved = block.precondition(tf.constant(data.gradient))
    np.testing.assert_allclose(
        solved, inverses[0] @ data.gradient @ inverses[1], rtol=1e-10
    )


def test_retries_of_a_failed_factorisation_are_counted(data, make_block, feed):
    block = make_block("kronecker")
    feed(block, data)
    left = block.created["input_factor"]
    left.assign(left.value - 1.5 * np.trace(left) / 3 * np.eye(3))
    retries, failures = block.refresh(tf.constant(1e-8, tf.float64))
    assert int(retries) > 0
    assert int(failures) in (0, 1)
    solved = block.precondition(tf.constant(data.gradient))
    assert np.all(np.isfinite(solved))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight_sharing": "both"}, "both"),
    ],
)
def test_wrong_options(options, message, make_block):
    with pytest.raises(ValueError, match=message):
        make_block("kronecker", **options)
