"""Arithmetic on directions."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_natgrad.step.directions import (
    Ridge,
    dots,
    l2_curvature,
    metric_dots,
    pad,
    ridge_gram,
)


@pytest.fixture
def directions():
    rng = np.random.default_rng(0)
    return [
        [tf.constant(rng.normal(size=s)) for s in [(1, 2, 3), (2, 3, 1)]]
        for _ in range(2)
    ]


def flat(direction):
    return np.concatenate([np.ravel(part) for part in direction])


def layers(direction):
    return [layer for stack in direction for layer in stack.numpy()]


def test_dots(directions):
    left, right = directions
    expected = [
        np.sum(a * b) for a, b in zip(*map(layers, directions), strict=True)
    ]
    np.testing.assert_allclose(dots(left, right), expected)
    norms = [np.sum(np.square(a)) for a in layers(left)]
    np.testing.assert_allclose(dots(left, left), norms)


def test_metric_dots(directions):
    left, right = directions
    rows = np.array([[1.0, 0.5, 0.25], [2.0, 4.0, 1.0]])
    found = metric_dots(left, right, [None, tf.constant(rows)])
    second = np.sum(rows[..., None] * left[1] * right[1], axis=(1, 2))
    np.testing.assert_allclose(found, [np.sum(left[0] * right[0]), *second])


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize(
    "ridge", [Ridge(0.0, 0.0), Ridge(0.5, 0.5), Ridge(0.5, 0.25)]
)
@pytest.mark.parametrize("rows", [None, [1.0, 0.5, 0.25]])
@pytest.mark.parametrize("by_layer", [False, True])
def test_ridge_gram(directions, count, ridge, rows, by_layer):
    """`δᵀ (λ D + R) δ`, R per block and the last row having its own."""
    metric = None if rows is None else tf.constant([rows] * 2, tf.float64)
    found = ridge_gram(
        directions[:count],
        tf.constant(0.3, tf.float64),
        [ridge, Ridge(0.0, 0.0), ridge],
        [None, metric],
        by_layer,
    )
    first = np.repeat([0.3 + ridge.rest, 0.3 + ridge.last], 3)
    second = 0.3 * np.broadcast_to(1.0 if rows is None else rows, 3)
    third = second + [ridge.rest, ridge.rest, ridge.last]
    diagonal = np.concatenate([first, second, third])
    first, *others = map(layers, directions[:count])
    rows = [first]
    if by_layer:
        rows = [
            [part if i == j else 0 * part for j, part in enumerate(first)]
            for i in range(3)
        ]
    stacked = np.zeros((len(rows) + 1, len(diagonal)))
    for row, direction in enumerate([*rows, *others]):
        stacked[row] = flat(direction)
    np.testing.assert_allclose(
        found, (stacked * diagonal) @ stacked.T, rtol=1e-12
    )


def test_padding():
    np.testing.assert_array_equal(pad(tf.constant([1.0]), 2), [1.0, 0.0])
    full = tf.constant([[1.0, 2.0], [2.0, 5.0]])
    np.testing.assert_array_equal(pad(full, 2), full)
    np.testing.assert_array_equal(pad(full[:1, :1], 2), [[1, 0], [0, 0]])


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
