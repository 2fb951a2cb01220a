import numpy as np
import pytest
import tensorflow as tf

from keras_natgrad import heads
from keras_natgrad.heads import tensors


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        ("float16", "float32"),
        ("bfloat16", "float32"),
        ("float32", "float32"),
        ("float64", "float64"),
    ],
)
def test_parameters_have_at_least_single_precision(dtype, expected):
    parameters = tensors.as_parameters(tf.ones([2, 3], dtype))
    assert parameters.dtype.name == expected
    assert tensors.cast_like([1, 2], parameters).dtype.name == expected


def test_targets_of_unknown_sizes_are_accepted():
    @tf.function(
        input_signature=[
            tf.TensorSpec([None, 3]),
            tf.TensorSpec([None, None]),
        ]
    )
    def match(parameters, targets):
        return tensors.match_targets(parameters, targets)

    np.testing.assert_array_equal(match(tf.zeros([2, 3]), tf.ones([2, 3])), 1.0)


@pytest.mark.parametrize("shape", [(4,), (3,), (4, 2), (4, 3, 3), ()])
def test_other_shapes_are_an_error(shape):
    with pytest.raises(ValueError, match="Reshape or repeat the targets"):
        tensors.match_targets(tf.zeros([4, 3]), tf.zeros(shape))


def test_integer_outputs_get_the_float_type_of_keras(float64):
    found = heads.Normal().fisher([[1, 2]])
    assert found.dtype == tf.float64
    np.testing.assert_array_equal(found, [np.eye(2)])


@pytest.mark.parametrize("outputs", [[["a"]], [[True]], [[1j]]])
def test_outputs_that_are_no_real_numbers_are_an_error(outputs):
    with pytest.raises(ValueError, match="must be real numbers; cast them"):
        heads.Normal().fisher(outputs)
