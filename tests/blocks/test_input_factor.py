"""The input factor equals its definition, with a bias and without."""

import numpy as np
import pytest
import tensorflow as tf

from keras_natgrad.blocks import BlockShape, PlainGradientBlock
from tests.blocks.conftest import COLUMNS, ROWS
from tests.reference import kfac

DAMPING = 0.3


@pytest.fixture
def homogeneous(data):
    """The last input is the constant of a bias."""
    data.inputs[..., -1] = 1.0
    return data


def second_moment(data, weight_sharing="expand"):
    weights = data.weights / data.weights.sum()
    return kfac.input_factor(data.inputs, weights, weight_sharing)


def covariance(moment):
    return moment[:-1, :-1] - np.outer(moment[-1, :-1], moment[-1, :-1])


def solve(block, data, damping=DAMPING):
    retries, failures = block.refresh(tf.constant(damping, tf.float64))
    assert (int(retries), int(failures)) == (0, 0)
    return block.precondition(tf.constant(data.gradient)).numpy()


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("weight_sharing", ["expand", "reduce"])
def test_operator(biased, weight_sharing, homogeneous, make_block, feed):
    block = make_block(
        "input_factor", biased=biased, weight_sharing=weight_sharing
    )
    feed(block, homogeneous)
    expected = second_moment(homogeneous, weight_sharing)
    np.testing.assert_allclose(
        block.to_dense(), np.kron(expected, np.eye(COLUMNS)), rtol=1e-12
    )


@pytest.mark.parametrize("biased", [False, True])
def test_foof_is_the_damped_second_moment(
    biased, homogeneous, make_block, feed
):
    block = make_block("foof", biased=biased)
    feed(block, homogeneous)
    damped = second_moment(homogeneous) + DAMPING * np.eye(ROWS)
    np.testing.assert_allclose(
        solve(block, homogeneous),
        np.linalg.solve(damped, homogeneous.gradient),
        rtol=1e-11,
    )


@pytest.mark.parametrize("relative", [False, True])
def test_centred_damping(relative, homogeneous, make_block, feed):
    block = make_block(
        "input_factor", biased=True, damp_bias=False, relative_damping=relative
    )
    feed(block, homogeneous)
    damped = second_moment(homogeneous)
    mean = np.trace(covariance(damped)) / (ROWS - 1)
    damping = DAMPING * mean if relative else DAMPING
    damped += damping * np.diag([1.0] * (ROWS - 1) + [0.0])
    np.testing.assert_allclose(
        solve(block, homogeneous),
        np.linalg.solve(damped, homogeneous.gradient),
        rtol=1e-11,
    )


def test_relative_damping_of_foof_counts_in_the_covariance(
    homogeneous, make_block, feed
):
    block = make_block("input_factor", biased=True, relative_damping=True)
    feed(block, homogeneous)
    moment = second_moment(homogeneous)
    mean = np.trace(covariance(moment)) / (ROWS - 1)
    np.testing.assert_allclose(
        solve(block, homogeneous),
        np.linalg.solve(
            moment + DAMPING * mean * np.eye(ROWS), homogeneous.gradient
        ),
        rtol=1e-11,
    )


@pytest.mark.parametrize("damp_bias", [False, True])
def test_diagonal_covariance(damp_bias, homogeneous, make_block, feed):
    block = make_block(
        "input_factor", biased=True, damp_bias=damp_bias, max_factor_size=1
    )
    feed(block, homogeneous)
    mean = second_moment(homogeneous)[-1]
    variances = np.diag(covariance(second_moment(homogeneous)))
    moment = np.diag([*variances, 0.0]) + np.outer(mean, mean)
    np.testing.assert_allclose(
        block.to_dense(), np.kron(moment, np.eye(COLUMNS)), rtol=1e-11
    )
    # The damped matrix has the diagonal Schur complement of the last entry.
    corner = 1.0 + DAMPING * damp_bias
    root = mean[:-1] / np.sqrt(corner)
    second = np.diag(second_moment(homogeneous))[:-1]
    inner = np.diag(second - root**2 + DAMPING) + np.outer(root, root)
    damped = np.block(
        [[inner, mean[:-1, None]], [mean[None, :-1], np.full((1, 1), corner)]]
    )
    np.testing.assert_allclose(
        solve(block, homogeneous),
        np.linalg.solve(damped, homogeneous.gradient),
        rtol=1e-11,
    )
    assert "diag 2" in block.describe()


def test_layer_left_out_of_half_the_batches(homogeneous, make_block, feed):
    """Such a batch counts as zeros, the constant of the bias included."""
    block = make_block("input_factor", biased=True, damp_bias=False)
    feed(block, homogeneous)
    moment = 0.5 * second_moment(homogeneous)
    absent = np.zeros_like(homogeneous.inputs)
    block.accumulate(block.input_statistics(absent, homogeneous.weights), 0.5)
    # Weights ½ and ½ of the two batches.
    damped = moment + DAMPING * np.diag([1.0, 1.0, 0.0])
    np.testing.assert_allclose(
        solve(block, homogeneous),
        np.linalg.solve(damped, homogeneous.gradient),
        rtol=1e-11,
    )


def test_needs_no_cotangents(homogeneous, make_block):
    block = make_block("input_factor", biased=True)
    assert not block.uses_cotangents
    found = block.cotangent_statistics(
        homogeneous.inputs, homogeneous.columns[0]
    )
    assert found == {}


def test_plain_gradient(build_block):
    block = build_block(PlainGradientBlock().bind(BlockShape(4, 1)))
    gradient = tf.constant([[1.0], [2.0], [3.0], [4.0]], tf.float64)
    block.refresh(tf.constant(7.0, tf.float64))
    np.testing.assert_array_equal(block.precondition(gradient), gradient)
    np.testing.assert_array_equal(block.to_dense(), np.eye(4))
    assert float(block.trace()) == 4.0
    assert block.gradient_statistics(gradient) == {}
