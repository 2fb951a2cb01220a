"""The diagonal block equals its definition."""

import numpy as np
import pytest
import tensorflow as tf


@pytest.mark.parametrize("shared", [1, 3])
def test_definition(shared, make_data, make_block, feed):
    data, block = make_data(shared), make_block("diagonal")
    feed(block, data)
    np.testing.assert_allclose(
        block.to_dense(), np.diag(np.diag(data.full())), rtol=1e-12
    )


def test_precondition_is_the_dense_solve(data, make_block, feed):
    block = make_block("diagonal")
    feed(block, data)
    block.refresh(tf.constant(0.3, tf.float64))
    solved = block.precondition(tf.constant(data.gradient))
    expected = data.gradient.ravel() / (np.diag(data.full()) + 0.3)
    np.testing.assert_allclose(np.ravel(solved), expected, rtol=1e-12)


def test_unknown_number_of_positions_in_a_graph(make_data, make_block):
    """The path for one position is chosen by static shape only."""
    block = make_block("diagonal")
    spec = tf.TensorSpec([None, None, None], tf.float64)
    traced = tf.function(
        block.cotangent_statistics, input_signature=[spec, spec]
    )
    for shared in (1, 3):
        data = make_data(shared)
        value = traced(data.inputs, data.columns[0])["diagonal"]
        expected = block.cotangent_statistics(data.inputs, data.columns[0])
        expected = expected["diagonal"]
        np.testing.assert_allclose(value, expected, rtol=1e-12)
