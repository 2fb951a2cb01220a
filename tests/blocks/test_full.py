"""The full block equals its definition."""

import numpy as np
import pytest
import tensorflow as tf


@pytest.mark.parametrize("shared", [1, 3])
def test_definition(shared, make_data, make_block, feed):
    data, block = make_data(shared), make_block("full")
    feed(block, data)
    np.testing.assert_allclose(block.to_dense(), data.full(), rtol=1e-12)


@pytest.mark.parametrize("damping", [0.0, 0.3])
def test_precondition_is_the_dense_solve(damping, data, make_block, feed):
    block = make_block("full")
    feed(block, data)
    block.refresh(tf.constant(damping, tf.float64))
    solved = block.precondition(tf.constant(data.gradient))
    expected = np.linalg.solve(
        data.full() + damping * np.eye(6), data.gradient.ravel()
    )
    np.testing.assert_allclose(np.ravel(solved), expected, rtol=1e-9)
