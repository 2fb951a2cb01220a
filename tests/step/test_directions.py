"""Arithmetic on directions."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_natgrad.step.directions import (
    Ridge,
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
@pytest.mark.parametrize(
    "ridge", [Ridge(0.0, 0.0), Ridge(0.5, 0.5), Ridge(0.5, 0.25)]
)
@pytest.mark.parametrize("rows", [None, [1.0, 0.5, 0.25]])
def test_ridge_gram(directions, count, ridge, rows):
    """`δᵀ (λ D + R) δ`, R per block and the last row having its own."""
    directions = [[part[0], part[1][:, None]] for part in directions]
    found = ridge_gram(
        directions[:count],
        tf.constant(0.3, tf.float64),
        [ridge, Ridge(0.0, 0.0)],
        [None, None if rows is None else tf.constant(rows, tf.float64)],
    )
    first = np.repeat([0.3 + ridge.rest, 0.3 + ridge.last], 3)
    second = 0.3 * np.broadcast_to(1.0 if rows is None else rows, 3)
    diagonal = np.concatenate([first, second])
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
