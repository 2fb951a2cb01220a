"""A shared eigenbasis against dense algebra."""

import numpy as np
import pytest
import tensorflow as tf

from keras_natgrad.blocks import BlockShape, EigenSharedBlock
from tests.blocks.test_unitwise import (
    COLUMNS,
    RHO,
    ROWS,
    feed_once,
    samples,
    unit_metrics,
)


def make(build_block, **kwargs):
    return build_block(
        EigenSharedBlock(**kwargs).bind(BlockShape(ROWS, COLUMNS))
    )


def number(value):
    return tf.constant(value, tf.float64)


def dense(metrics):
    """The block-diagonal matrix over the units, row-major `[n, m]`."""
    whole = np.zeros((ROWS, COLUMNS, ROWS, COLUMNS))
    for unit, metric in enumerate(metrics):
        whole[:, unit, :, unit] = metric
    return whole.reshape(ROWS * COLUMNS, -1)


def in_basis(metrics, basis):
    """The part of each matrix that is diagonal in a basis."""
    diagonals = np.einsum("ba,jbc,ca->ja", basis, metrics, basis)
    return np.einsum("ba,ja,ca->jbc", basis, diagonals, basis)


@pytest.mark.parametrize("shared", [1, 2])
def test_metric_and_solve(shared, build_block):
    first, second = samples(shared), samples(shared, seed=1)
    block = make(build_block, relative_damping=RHO)
    feed_once(block, *first)
    block.refresh(number(0.1))
    own = unit_metrics(*first)
    values, basis = np.linalg.eigh(own.mean(axis=0))
    turned = in_basis(in_basis(own, np.eye(ROWS)), basis)
    # The mean over the units is the mean metric itself.
    scales = values / np.diag(basis.T @ turned.mean(axis=0) @ basis)
    turned = turned @ basis @ np.diag(scales) @ basis.T
    np.testing.assert_allclose(
        block.to_dense(), dense(turned), rtol=1e-9, atol=1e-12
    )
    np.testing.assert_allclose(
        turned.mean(axis=0), own.mean(axis=0), rtol=1e-9, atol=1e-12
    )
    feed_once(block, *second, decay=0.75)
    # Weights 1 and 1/4 of the two batches, the first after a decay of zero.
    expected = 0.75 * turned + 0.25 * in_basis(unit_metrics(*second), basis)
    np.testing.assert_allclose(
        block.to_dense(), dense(expected), rtol=1e-9, atol=1e-12
    )
    np.testing.assert_allclose(
        block.trace(), np.trace(dense(expected)), rtol=1e-9
    )
    gradient = np.random.default_rng(1).normal(size=(ROWS, COLUMNS))
    solved = np.empty_like(gradient)
    for unit, metric in enumerate(turned):
        damping = 0.1 + RHO * np.trace(metric)
        solved[:, unit] = np.linalg.solve(
            metric + damping * np.eye(ROWS), gradient[:, unit]
        )
    np.testing.assert_allclose(
        block.precondition(tf.constant(gradient)), solved, rtol=1e-9
    )
    stored = sum(int(np.prod(v.shape)) for v in block.created.values())
    assert block.memory == stored - 1


def test_metrics_that_commute_are_exact(build_block):
    """Each example along one of three orthogonal directions."""
    rng = np.random.default_rng(0)
    axes, _ = np.linalg.qr(rng.normal(size=(ROWS, ROWS)))
    inputs = (axes.T[[0, 1, 2, 0, 1, 2, 0]])[:, np.newaxis]
    cotangents = rng.normal(size=(7, 1, COLUMNS))
    block = make(build_block)
    for _ in range(2):  # The second time in the basis of the first.
        feed_once(block, inputs, cotangents)
        block.refresh(number(0.1))
    own = unit_metrics(inputs, cotangents)
    np.testing.assert_allclose(
        block.to_dense(), dense(own), rtol=1e-9, atol=1e-12
    )
    (values,) = block.spectra().values()
    np.testing.assert_allclose(
        np.sort(values, axis=1), np.linalg.eigvalsh(own), rtol=1e-9
    )
    (inverse,) = block.inverse_spectra().values()
    np.testing.assert_allclose(inverse, 1 / (values.numpy() + 0.1), rtol=1e-9)


def test_unit_without_a_metric_stands_still(build_block):
    inputs, cotangents = samples()
    cotangents[..., 2] = 0.0
    block = make(build_block, relative_damping=RHO)
    feed_once(block, inputs, cotangents)
    retries, failures = block.refresh(number(0.0))
    assert (int(retries), int(failures)) == (0, 1)
    solved = block.precondition(tf.constant(np.ones((ROWS, COLUMNS)))).numpy()
    np.testing.assert_array_equal(solved[:, 2], 0.0)
    assert np.all(np.abs(np.delete(solved, 2, axis=1)).sum(axis=0) > 0)


def test_statistics_that_are_not_finite_change_no_inverse(build_block):
    inputs, cotangents = samples()
    block = make(build_block, relative_damping=RHO)
    feed_once(block, inputs, cotangents)
    block.refresh(number(0.1))
    gradient = tf.constant(np.ones((ROWS, COLUMNS)))
    before = block.precondition(gradient)
    feed_once(block, np.full_like(inputs, np.nan), cotangents)
    _, failures = block.refresh(number(0.1))
    assert int(failures) == COLUMNS
    np.testing.assert_array_equal(block.precondition(gradient), before)


def test_identity_start_keeps_its_share(build_block):
    inputs, cotangents = samples()
    block = make(build_block, identity_start=True, relative_damping=RHO)
    gradient = tf.constant(np.ones((ROWS, COLUMNS)))
    block.refresh(number(0.0))
    np.testing.assert_allclose(
        block.precondition(gradient), gradient / (1 + RHO * ROWS), rtol=1e-12
    )
    block.refresh(number(0.0))
    feed_once(block, inputs, cotangents, decay=0.9)
    basis = block.created["basis"].numpy()
    own = in_basis(unit_metrics(inputs, cotangents), basis)
    np.testing.assert_allclose(
        block.to_dense(),
        dense(0.9 * np.eye(ROWS) + 0.1 * own),
        rtol=1e-9,
        atol=1e-12,
    )


def test_compiles_under_xla(build_block):
    inputs, cotangents = samples()
    gradient = tf.constant(np.ones((ROWS, COLUMNS)))
    blocks = [make(build_block, relative_damping=RHO) for _ in range(2)]

    def run(block, gradient):
        feed_once(block, tf.constant(inputs), cotangents)
        block.refresh(number(0.1))
        return block.precondition(gradient)

    eager = run(blocks[0], gradient)
    compiled = tf.function(lambda g: run(blocks[1], g), jit_compile=True)
    np.testing.assert_allclose(compiled(gradient), eager, rtol=1e-9)
