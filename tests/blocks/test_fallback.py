"""Fallback blocks, which see gradients only."""

import numpy as np
import pytest
import tensorflow as tf

from keras_natgrad.blocks import (
    BlockShape,
    GradientDiagonalBlock,
    GradientScalarBlock,
)
from tests.blocks.conftest import summed

GRADIENT = np.array([[1.0], [-2.0], [3.0]])


@pytest.fixture(params=[GradientDiagonalBlock, GradientScalarBlock])
def block(request, build_block):
    return build_block(request.param().bind(BlockShape(3, 1)))


def expected_diagonal(block, *gradients):
    squares = sum(g**2 for g in gradients)
    if isinstance(block, GradientScalarBlock):
        return np.full_like(squares, squares.mean())
    return squares


def feed(block, *gradients, decay=0.0):
    statistics = [block.gradient_statistics(tf.constant(g)) for g in gradients]
    block.accumulate(summed(statistics), decay)


def test_definition(block):
    feed(block, GRADIENT, 0.5 * GRADIENT)
    diagonal = expected_diagonal(block, GRADIENT, 0.5 * GRADIENT)
    np.testing.assert_allclose(block.to_dense(), np.diag(diagonal[:, 0]))
    np.testing.assert_allclose(block.trace(), diagonal.sum())


def test_precondition(block):
    feed(block, GRADIENT)
    retries, failures = block.refresh(tf.constant(0.5, tf.float64))
    solved = block.precondition(tf.constant(GRADIENT))
    np.testing.assert_allclose(
        solved, GRADIENT / (expected_diagonal(block, GRADIENT) + 0.5)
    )
    assert (int(retries), int(failures)) == (0, 0)


def test_average_is_debiased(block):
    feed(block, GRADIENT, decay=0.9)
    diagonal = expected_diagonal(block, GRADIENT)
    np.testing.assert_allclose(block.to_dense(), np.diag(diagonal[:, 0]))


def test_failed_refresh_keeps_the_last_good_inverse(block):
    feed(block, GRADIENT)
    block.refresh(tf.constant(0.5, tf.float64))
    good = block.precondition(tf.constant(GRADIENT)).numpy()
    feed(block, np.nan * GRADIENT)
    _, failures = block.refresh(tf.constant(0.5, tf.float64))
    assert int(failures) == 1
    np.testing.assert_array_equal(block.precondition(GRADIENT), good)


def test_signs_average_to_the_diagonal(build_block):
    """Cross terms of examples cancel over all sign patterns."""
    rng = np.random.default_rng(0)
    gradients = rng.normal(size=(4, 3, 1))
    block = build_block(GradientDiagonalBlock().bind(BlockShape(3, 1)))
    patterns = np.array(np.meshgrid(*[[-1.0, 1.0]] * 4, indexing="ij")).reshape(
        4, -1
    )
    mean = np.mean(
        [
            block.gradient_statistics(np.tensordot(signs, gradients, 1))[
                "diagonal"
            ]
            for signs in patterns.T
        ],
        axis=0,
    )
    np.testing.assert_allclose(mean, np.sum(gradients**2, axis=0))


def test_cotangents_are_refused(block):
    with pytest.raises(TypeError, match="gradient_statistics"):
        block.cotangent_statistics(None, None)
