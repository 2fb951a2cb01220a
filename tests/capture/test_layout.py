"""Kernel and bias as one matrix, and back."""

import numpy as np
import pytest
import tensorflow as tf

from keras_natgrad.capture import ParameterLayout

LAYOUTS = [
    ParameterLayout.of_matrix(3, 2, bias=True),
    ParameterLayout.of_matrix(3, 2, bias=False),
    ParameterLayout((2, 3, 4), (1, 2, 0), 12, 2, (2,)),
    ParameterLayout((2, 3, 4), (2, 0, 1), 4, 6, (2, 1, 3)),
    ParameterLayout((2, 3, 4), (0, 2, 1), 2, 12, (4, 3)),
]


def tensors_of(layout):
    rng = np.random.default_rng(0)
    shapes = [layout.kernel_shape]
    if layout.bias_shape is not None:
        shapes.append(layout.bias_shape)
    return [tf.constant(rng.normal(size=shape)) for shape in shapes]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_round_trip(layout):
    tensors = tensors_of(layout)
    matrix = layout.to_matrix(tensors)
    assert matrix.shape == (layout.rows, layout.columns)
    back = layout.from_matrix(matrix)
    for tensor, expected in zip(back, tensors, strict=True):
        np.testing.assert_array_equal(tensor, expected)


def test_order_is_row_major_with_the_bias_last():
    kernel, bias = np.arange(6.0).reshape(3, 2), np.array([6.0, 7.0])
    layout = ParameterLayout.of_matrix(3, 2, bias=True)
    matrix = layout.to_matrix([tf.constant(kernel), tf.constant(bias)])
    np.testing.assert_array_equal(np.ravel(matrix), np.arange(8.0))


def test_permuted_kernel():
    layout = LAYOUTS[2]
    kernel, bias = tensors_of(layout)
    expected = np.transpose(kernel, (1, 2, 0)).reshape(12, 2)
    np.testing.assert_array_equal(
        layout.to_matrix([kernel, bias])[:-1], expected
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_config_round_trip(layout):
    config = layout.get_config()
    as_json = {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in config.items()
    }
    assert ParameterLayout.from_config(as_json) == layout
