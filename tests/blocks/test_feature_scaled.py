"""Kronecker factors damped in the units of the input features."""

import numpy as np
import pytest
import tensorflow as tf

from keras_natgrad.blocks import BlockShape, FeatureScaledBlock, KroneckerBlock
from tests.reference.kfac import feature_scales

ROWS, COLUMNS, BATCH = 4, 3, 50
DAMPING = 0.3
UNITS = np.array([1.0, 1e-3, 20.0, 1.0])


@pytest.fixture
def inputs():
    """Features in their units, the last one constant."""
    x = np.random.default_rng(0).normal(size=(BATCH, 1, ROWS))
    x[..., -1] = 1.0
    return UNITS * x


@pytest.fixture
def cotangents():
    return np.random.default_rng(1).normal(size=(BATCH, 1, COLUMNS))


@pytest.fixture
def gradient():
    return np.random.default_rng(2).normal(size=(ROWS, COLUMNS))


def feed(block, inputs, cotangents, decay=0.0):
    x, g = tf.constant(inputs), tf.constant(cotangents)
    weights = tf.ones([len(inputs)], x.dtype)
    block.accumulate(
        block.input_statistics(x, weights) | block.cotangent_statistics(x, g),
        decay,
    )
    block.refresh(tf.constant(DAMPING, x.dtype))
    return block


@pytest.fixture
def make(build_block):
    def make(kind=FeatureScaledBlock, rows=ROWS, **options):
        return build_block(kind(**options).bind(BlockShape(rows, COLUMNS)))

    return make


@pytest.mark.parametrize("decay", [0.0, 0.9])
@pytest.mark.parametrize("bound", [100, 3])
def test_definition(bound, decay, make, inputs, cotangents, gradient):
    """`D^-½ (D^-½ A D^-½ + π√λ)⁻¹ D^-½`, a long A being its diagonal."""
    block = feed(make(max_factor_size=bound), inputs, cotangents, decay)
    x, g = inputs[:, 0], cotangents[:, 0]
    a, right = x.T @ x / BATCH, g.T @ g
    if bound < ROWS:
        a = np.diag(np.diag(a))
    scales = feature_scales(a, np.abs(x).mean(0))
    np.testing.assert_allclose(block.damping_rows(), scales, rtol=1e-12)
    root = np.diag(scales**-0.5)
    left = root @ a @ root
    trace = np.trace(left) * np.trace(right)
    np.testing.assert_allclose(block.trace(), trace, rtol=1e-12)
    pi = np.sqrt(np.trace(left) / ROWS / (np.trace(right) / COLUMNS))
    left += pi * np.sqrt(DAMPING) * np.eye(ROWS)
    right = right + np.sqrt(DAMPING) / pi * np.eye(COLUMNS)
    expected = root @ np.linalg.inv(left) @ root @ gradient
    expected = expected @ np.linalg.inv(right)
    np.testing.assert_allclose(
        block.precondition(tf.constant(gradient)), expected, rtol=1e-9
    )
    np.testing.assert_allclose(block.to_dense(), np.kron(a, g.T @ g), rtol=1e-9)


def test_units_change_nothing(make, inputs, cotangents, gradient):
    """`x → U x`, `W → U⁻¹ W`: the same step, up to the scale of λ."""
    standard = inputs / UNITS
    here = feed(make(), inputs, cotangents)
    there = feed(make(), standard, cotangents)
    # The largest unit defines λ: 20² here, 1 there.
    here.refresh(tf.constant(DAMPING * 400.0, tf.float64))
    found = here.precondition(tf.constant(UNITS[:, None] * gradient))
    expected = there.precondition(tf.constant(gradient))
    sizes = np.abs(standard[:, 0]).mean(0)
    assert sizes.argmax() != 2  # Else the two scales would be 400 apart.
    scale = here.damping_rows() * 400.0 / there.damping_rows() / UNITS**2
    np.testing.assert_allclose(scale, scale[0], rtol=1e-9)
    there.refresh(tf.constant(DAMPING * scale[0], tf.float64))
    expected = there.precondition(tf.constant(gradient))
    np.testing.assert_allclose(UNITS[:, None] * found, expected, rtol=1e-8)


def test_features_of_one_size_are_damped_as_ever(make, cotangents, gradient):
    signs = np.random.default_rng(3).choice([-5.0, 5.0], (BATCH, 1, ROWS))
    scaled = feed(make(), signs, cotangents)
    plain = feed(make(KroneckerBlock), signs, cotangents)
    np.testing.assert_allclose(
        scaled.precondition(tf.constant(gradient)),
        plain.precondition(tf.constant(gradient)),
        rtol=1e-12,
    )


def test_a_feature_that_is_rarely_active_keeps_the_damping(make, cotangents):
    """It shows too little: a dark pixel on the rim, once a little grey."""
    x = np.full((BATCH, 1, ROWS), 2.0)
    x[1:, 0, 0] = 0.0
    x[0, 0, 0] = 0.01
    x[:, 0, 1] = 0.0
    x[::2, 0, 2] = 0.0
    block = feed(make(), x, cotangents)
    np.testing.assert_allclose(block.damping_rows(), 1.0)


def test_reduce_takes_the_mean_of_the_positions_first(make, cotangents):
    rng = np.random.default_rng(4)
    x = UNITS * rng.normal(size=(BATCH, 2, ROWS))
    g = np.repeat(cotangents, 2, axis=1)
    block = feed(make(weight_sharing="reduce"), x, g)
    mean = x.mean(1)
    expected = feature_scales(mean.T @ mean / BATCH, np.abs(mean).mean(0))
    np.testing.assert_allclose(block.damping_rows(), expected, rtol=1e-12)


def test_a_failed_refresh_keeps_inverse_and_metric(make, inputs, cotangents):
    block = feed(make(), inputs, cotangents)
    before = block.damping_rows().numpy()
    block.accumulate(
        block.input_statistics(
            tf.constant(inputs[::-1] ** 2), tf.ones([BATCH], tf.float64)
        )
        | {"output_factor": tf.fill([COLUMNS, COLUMNS], np.float64(np.nan))},
        0.0,
    )
    _, failures = block.refresh(tf.constant(DAMPING, tf.float64))
    assert int(failures) == 1
    np.testing.assert_array_equal(block.damping_rows(), before)


@pytest.mark.parametrize(
    "shape", [BlockShape(3, 2, groups=2), BlockShape(3, 2, one_hot=True)]
)
def test_only_for_numbers_and_one_matrix(shape):
    with pytest.raises(ValueError, match="use 'kronecker'. Received: shape="):
        FeatureScaledBlock().bind(shape)


def test_memory(make):
    assert make().memory == 2 * (ROWS**2 + COLUMNS**2) + 2 * ROWS


@pytest.mark.parametrize("decay", [0.0, 0.9])
@pytest.mark.parametrize("bound", [100, 3, 2])
@pytest.mark.parametrize("kind", [FeatureScaledBlock, KroneckerBlock])
def test_traces_are_those_of_the_factors(
    kind, bound, decay, make, inputs, cotangents
):
    """They are taken of the raw averages, which is cheaper."""
    block = feed(make(kind, max_factor_size=bound), inputs, cotangents, decay)
    expected = [
        np.trace(factor) if np.ndim(factor) == 2 else np.sum(factor)
        for factor in map(np.asarray, block.factors())
    ]
    np.testing.assert_allclose(block.factor_traces(), expected, rtol=1e-12)
    np.testing.assert_allclose(block.trace(), np.prod(expected), rtol=1e-12)
    scales = block.factor_scales()
    np.testing.assert_allclose(
        [scales.input_trace, scales.output_trace], expected, rtol=1e-12
    )
