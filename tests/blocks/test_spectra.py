"""Eigenvalues of blocks and of their inverses, against dense matrices."""

import functools

import numpy as np
import pytest
import tensorflow as tf

from keras_natgrad.blocks import (
    BlockShape,
    FullBlock,
    GradientDiagonalBlock,
    GradientKroneckerBlock,
    GradientScalarBlock,
    IdentityBlock,
    KroneckerBlock,
    PlainGradientBlock,
)
from tests.blocks.conftest import BATCH, COLUMNS, ROWS, SHARED
from tests.blocks.test_contract import DAMPING, KINDS, block, damping

# The fixture `block` is that of the contract's tests.
__all__ = ["block"]

# Groups of a layer, and of units that share a metric.
GROUPS = 2
OTHERS = {
    "feature_scaled": ("feature_scaled", {}),
    "feature_scaled_diagonal": ("feature_scaled", {"max_factor_size": 1}),
    "unitwise_shared": ("unitwise", {"groups": 1}),
}


def eigenvalues(parts):
    """All products of one entry of each part, in ascending order."""
    outer = functools.reduce(
        lambda a, b: (a[..., :, None] * b[..., None, :]).reshape(
            *a.shape[:-1], -1
        ),
        [np.asarray(values) for values in parts.values()],
    )
    return np.sort(outer.ravel())


def preconditioner(block):
    """What `precondition` applies, as a matrix, in NumPy."""
    basis = np.eye(block.shape.size)
    images = [
        np.ravel(block.precondition(tf.constant(e.reshape(block.shape.matrix))))
        for e in basis
    ]
    return np.stack(images, axis=1)


def check(block):
    """Both spectra are those of the dense matrices."""
    np.testing.assert_allclose(
        eigenvalues(block.spectra()),
        np.linalg.eigvalsh(block.to_dense()),
        rtol=1e-9,
        atol=1e-11,
    )
    np.testing.assert_allclose(
        eigenvalues(block.inverse_spectra()),
        np.linalg.eigvalsh(preconditioner(block)),
        rtol=1e-9,
    )


def test_of_every_kind(block, data, feed):
    feed(block, data)
    block.refresh(damping())
    check(block)


@pytest.mark.parametrize("name", OTHERS)
def test_of_blocks_with_settings(name, make_block, data, feed):
    kind, options = OTHERS[name]
    block = make_block(kind, **options)
    feed(block, data)
    block.refresh(damping())
    check(block)


@pytest.mark.parametrize("kind", [FullBlock, KroneckerBlock])
def test_groups_stay_apart(kind, build_block):
    rng = np.random.default_rng(3)
    block = build_block(kind().bind(BlockShape(ROWS, COLUMNS, groups=GROUPS)))
    inputs = rng.normal(size=(GROUPS, BATCH, SHARED, ROWS))
    cotangents = rng.normal(size=(GROUPS, BATCH, SHARED, COLUMNS))
    statistics = block.input_statistics(inputs, np.ones(BATCH))
    statistics |= block.cotangent_statistics(inputs, cotangents)
    block.accumulate(statistics, 0.0)
    block.refresh(damping())
    for values in block.spectra().values():
        assert values.shape[0] == GROUPS
    check(block)


@pytest.mark.parametrize("bound", [4096, 2, 1])
def test_kronecker_of_a_variable(bound, build_block):
    block = build_block(
        GradientKroneckerBlock(bound).bind(BlockShape(ROWS, COLUMNS))
    )
    gradient = np.random.default_rng(4).normal(size=(ROWS, COLUMNS))
    block.accumulate(block.gradient_statistics(tf.constant(gradient)), 0.0)
    block.refresh(damping())
    assert block.spectrum_side == (ROWS if bound > ROWS else bound)
    check(block)


@pytest.mark.parametrize(
    "kind", [GradientDiagonalBlock, GradientScalarBlock, PlainGradientBlock]
)
def test_fallbacks(kind, build_block):
    block = build_block(kind().bind(BlockShape(ROWS, COLUMNS)))
    gradient = np.random.default_rng(5).normal(size=(ROWS, COLUMNS))
    block.accumulate(block.gradient_statistics(tf.constant(gradient)), 0.0)
    block.refresh(damping())
    check(block)


def test_identity(build_block):
    block = build_block(IdentityBlock().bind(BlockShape(ROWS, COLUMNS)))
    block.refresh(damping())
    check(block)
    np.testing.assert_allclose(
        block.inverse_spectra()["fisher"], np.full(6, 1 / DAMPING)
    )


def test_a_block_of_ones_own_has_the_default(build_block, data, feed):
    class Own(FullBlock):
        spectra = FullBlock.__mro__[1].spectra
        inverse_spectra = FullBlock.__mro__[1].inverse_spectra

    block = build_block(Own().bind(BlockShape(ROWS, COLUMNS)))
    feed(block, data)
    np.testing.assert_allclose(
        block.spectra()["fisher"],
        np.linalg.eigvalsh(data.full()),
        rtol=1e-9,
        atol=1e-11,
    )
    assert block.inverse_spectra() is None


def test_largest_matrix(make_block):
    """What a spectrum costs; diagonal factors cost nothing."""
    expected = {"full": 6, "diagonal": 1, "expand": ROWS, "diagonal_both": 1}
    for name, side in expected.items():
        kind, options = KINDS[name]
        assert make_block(kind, **options).spectrum_side == side, name


def test_compiles(make_block, data, feed):
    block = make_block("kronecker")
    feed(block, data)
    compiled = tf.function(block.spectra, jit_compile=True)()
    for name, values in block.spectra().items():
        np.testing.assert_allclose(compiled[name], values, rtol=1e-12)
