"""Dense layers on inputs of any rank."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_natgrad.capture import linear_maps
from keras_natgrad.capture.dense import merge_middle_axes

from .conftest import check_both

pytestmark = pytest.mark.usefixtures("float64")


def built(layer, shape):
    x = np.random.default_rng(0).normal(size=shape)
    layer(x)
    for variable in layer.weights:
        variable.assign(
            np.random.default_rng(1).normal(size=tuple(variable.shape))
        )
    return x


@pytest.mark.parametrize("middle", [(), (4,), (2, 3), (2, 1, 3)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", [None, "tanh", "relu"])
def test_any_rank(middle, bias, activation):
    layer = keras.layers.Dense(3, activation=activation, use_bias=bias)
    x = built(layer, (5, *middle, 2))
    (record,) = check_both(layer, [layer], x)
    assert record.canonical_inputs("float64", 5).shape == (
        5,
        int(np.prod(middle)),
        2 + bias,
    )


@settings(max_examples=15, deadline=None)
@given(
    shape=st.lists(st.integers(1, 4), min_size=2, max_size=4),
    units=st.integers(1, 4),
    bias=st.booleans(),
)
def test_random_shapes(shape, units, bias):
    layer = keras.layers.Dense(
        units, activation="sigmoid", use_bias=bias, dtype="float64"
    )
    check_both(layer, [layer], built(layer, shape))


def test_homogeneous_coordinate_is_last():
    layer = keras.layers.Dense(3)
    x = built(layer, (5, 2))
    (record,) = check_both(layer, [layer], x)
    inputs = record.canonical_inputs("float64", 5).numpy()
    np.testing.assert_array_equal(inputs[:, 0, :2], x)
    np.testing.assert_array_equal(inputs[:, 0, 2], np.ones(5))


def test_activation_layer_and_softmax():
    for activation in (keras.layers.LeakyReLU(), "softmax"):
        layer = keras.layers.Dense(3, activation=activation)
        check_both(layer, [layer], built(layer, (5, 2)))


def test_unknown_batch_and_length():
    """The canonical form of a traced pass with unknown sizes."""

    @tf.function(input_signature=[tf.TensorSpec([None, None, None, 2])])
    def merge(x):
        return merge_middle_axes(x, 2)

    x = np.arange(48.0, dtype="float32").reshape(2, 3, 4, 2)
    np.testing.assert_array_equal(merge(x), x.reshape(2, 12, 2))


def test_lora_and_subclasses_are_not_captured():
    lora = keras.layers.Dense(3)
    built(lora, (5, 2))
    lora.enable_lora(1)
    assert linear_maps(lora) == ()

    class Scaled(keras.layers.Dense):
        def call(self, inputs, training=None):
            return 2.0 * super().call(inputs, training=training)

    class Named(keras.layers.Dense):
        pass

    scaled, named = Scaled(3), Named(3)
    built(scaled, (5, 2))
    built(named, (5, 2))
    assert linear_maps(scaled) == ()
    assert linear_maps(named) != ()


def test_unbuilt_layer_has_no_map():
    assert linear_maps(keras.layers.Dense(3)) == ()
