"""Arithmetic on directions."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_natgrad.step.directions import (
    dot,
    l2_curvature,
    pad_gram,
    pad_pair,
    ridge_gram,
)


@pytest.fixture
def directions():
    rng = np.random.default_rng(0)
    return [
        [tf.constant(rng.normal(size=shape)) for shape in [(2, 3), (3,)]]
        for _ in range(2)
    ]


def flat(direction):
    return np.concatenate([np.ravel(part) for part in direction])


def test_dot(directions):
    left, right = directions
    np.testing.assert_allclose(dot(left, right), flat(left) @ flat(right))


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("ridge", ["none", "floats", "columns"])
def test_ridge_gram(directions, count, ridge):
    """`δᵀ (λ + R) δ` with R per block, or per row of a block."""
    values = {
        "none": [0.0, 0.0],
        "floats": [0.5, 0.0],
        "columns": [np.array([[0.5], [0.25]]), 0.0],
    }[ridge]
    directions = [[part[0], part[1][:, None]] for part in directions]
    found = ridge_gram(directions[:count], tf.constant(0.3, tf.float64), values)
    diagonal = np.concatenate(
        [
            np.ravel(0.3 + np.broadcast_to(value, part.shape))
            for value, part in zip(values, directions[0], strict=True)
        ]
    )
    stacked = np.zeros((2, len(diagonal)))
    for row, direction in enumerate(directions[:count]):
        stacked[row] = flat(direction)
    np.testing.assert_allclose(
        found, (stacked * diagonal) @ stacked.T, rtol=1e-12
    )


def test_padding():
    one, two = tf.constant(1.0), tf.constant(2.0)
    np.testing.assert_array_equal(pad_pair([one]), [1.0, 0.0])
    np.testing.assert_array_equal(pad_pair([one, two]), [1.0, 2.0])
    full = tf.constant([[1.0, 2.0], [2.0, 5.0]])
    np.testing.assert_array_equal(pad_gram(full), full)
    np.testing.assert_array_equal(
        pad_gram(full[:1, :1]), [[1.0, 0.0], [0.0, 0.0]]
    )


@pytest.mark.parametrize(
    ("regularizer", "expected"),
    [
        (None, 0.0),
        (keras.regularizers.L2(0.25), 0.5),
        (keras.regularizers.L1L2(l1=3.0, l2=0.25), 0.5),
        (keras.regularizers.L1(3.0), 0.0),
        (lambda w: w, 0.0),
    ],
)
def test_l2_curvature(regularizer, expected):
    assert l2_curvature(regularizer) == expected


def test_l2_curvature_is_the_second_derivative():
    regularizer = keras.regularizers.L2(0.3)
    w = tf.constant(2.0)
    with tf.GradientTape() as outer:
        outer.watch(w)
        with tf.GradientTape() as inner:
            inner.watch(w)
            penalty = regularizer(w)
        slope = inner.gradient(penalty, w)
    np.testing.assert_allclose(
        outer.gradient(slope, w), l2_curvature(regularizer), rtol=1e-6
    )
