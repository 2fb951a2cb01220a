"""Closed forms of the relative Fisher information against its definition."""

import numpy as np
import pytest
import tensorflow as tf

from keras_natgrad.blocks import relative
from tests.reference import relative as reference

POINTS = np.array([-6.0, -2.3, -0.7, -1e-3, 0.0, 0.4, 1.9, 5.0])

CASES = {
    "tanh": (relative.tanh_information, reference.INFORMATION["tanh"]),
    "sigmoid": (relative.sigmoid_information, reference.INFORMATION["sigmoid"]),
    "linear": (relative.linear_information, reference.INFORMATION["linear"]),
    "linear, noise 2": (
        lambda t: relative.linear_information(t, 2.0),
        reference.gaussian(lambda t: t, 2.0),
    ),
    "relu": (relative.relu_information, reference.INFORMATION["relu"]),
    "relu, leak, soft, noise": (
        lambda t: relative.relu_information(t, 0.2, 0.5, 3.0),
        reference.gaussian(lambda t: reference.soft_relu(t, 0.2, 0.5), 3.0),
    ),
    "elu": (relative.elu_information, reference.INFORMATION["elu"]),
    "elu, alpha, noise": (
        lambda t: relative.elu_information(t, 1.7, 0.6),
        reference.gaussian(lambda t: reference.elu(t, 1.7), 0.6),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_information_is_its_definition(name):
    found, expected = CASES[name]
    np.testing.assert_allclose(
        found(tf.constant(POINTS)), expected(POINTS), rtol=1e-8, atol=1e-14
    )


def test_tanh_keeps_its_digits_in_saturation():
    t = np.array([25.0, -30.0])
    np.testing.assert_allclose(
        relative.tanh_information(tf.constant(t)),
        1 / np.cosh(t) ** 2,
        rtol=1e-12,
    )


def test_a_hard_rectifier_is_the_limit():
    t = tf.constant([-2.0, 3.0], tf.float64)
    hard = relative.relu_information(t, slope=0.1, softness=1e-3)
    np.testing.assert_allclose(hard, [0.01, 1.0], rtol=1e-12)


def test_slopes_may_differ_between_units():
    t = tf.constant([[-1.0, 2.0]], tf.float64)
    slopes = tf.constant([0.3, 0.1], tf.float64)
    expected = [
        [
            reference.gaussian(lambda t: reference.soft_relu(t, 0.3))(-1.0),
            reference.gaussian(lambda t: reference.soft_relu(t, 0.1))(2.0),
        ]
    ]
    np.testing.assert_allclose(
        relative.relu_information(t, slopes), expected, rtol=1e-8
    )


def test_softmax():
    z = np.random.default_rng(0).normal(size=(3, 4))
    expected = [reference.information_matrix("softmax", row) for row in z]
    np.testing.assert_allclose(
        relative.softmax_information(tf.constant(z)), expected, rtol=1e-9
    )


TOPS = ["tanh", "sigmoid", "relu", "elu", "softmax"]


@pytest.mark.parametrize("hidden", ["tanh", "sigmoid", "elu"])
@pytest.mark.parametrize("top", TOPS)
def test_two_layers(top, hidden):
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(4, 3)), rng.normal(size=(4, 2))
    x = rng.normal(size=3)
    z = reference.extended(x) @ first
    t = reference.extended(reference.FUNCTIONS[hidden](z)) @ second
    found = relative.two_layer_information(
        tf.constant(reference.slope_of(reference.FUNCTIONS[hidden], z)),
        tf.constant(second[:-1]),
        tf.constant(reference.information_matrix(top, t)),
    )
    outer = np.outer(reference.extended(x), reference.extended(x))
    np.testing.assert_allclose(
        np.kron(outer, found),
        reference.metric([first, second], [hidden, top], [x]),
        rtol=1e-9,
        atol=1e-12,
    )
