"""Blocks of layers with groups: their definition, group by group."""

import numpy as np
import pytest
import tensorflow as tf
from scipy.linalg import block_diag

from keras_natgrad.blocks import BlockShape, create
from keras_natgrad.linalg import Patches, Window
from tests.reference import kfac

DAMPING = 0.3
GROUPS, BATCH, SHARED, ROWS, COLUMNS = 3, 5, 4, 3, 2


class Data:
    """Canonical tensors with groups in front, in NumPy."""

    def __init__(self):
        rng = np.random.default_rng(0)
        self.inputs = rng.normal(size=(GROUPS, BATCH, SHARED, ROWS))
        self.columns = rng.normal(size=(2, GROUPS, BATCH, SHARED, COLUMNS))
        self.weights = rng.uniform(0.5, 2.0, size=BATCH)
        self.gradient = rng.normal(size=(GROUPS, ROWS, COLUMNS))


def made(kind, data, build, feed, **options):
    shape = BlockShape(ROWS, COLUMNS, GROUPS)
    block = build(create(kind, shape, **options))
    feed(block, data)
    block.refresh(tf.constant(DAMPING, tf.float64))
    return block


def factors(data, weight_sharing):
    weights = data.weights / data.weights.sum()
    return [
        (
            kfac.input_factor(data.inputs[g], weights, weight_sharing),
            kfac.output_factor(data.columns[:, g], weight_sharing),
        )
        for g in range(GROUPS)
    ]


def fishers(data):
    """The Fisher of each group by its definition."""
    for g in range(GROUPS):
        total = 0.0
        for column in data.columns:
            v = np.einsum("nsr,nsm->nrm", data.inputs[g], column[g])
            v = v.reshape(BATCH, -1)
            total += v.T @ v
        yield total


@pytest.mark.parametrize("weight_sharing", ["expand", "reduce"])
def test_kronecker(weight_sharing, build_block, feed):
    data = Data()
    block = made(
        "kronecker", data, build_block, feed, weight_sharing=weight_sharing
    )
    pairs = factors(data, weight_sharing)
    dense = block_diag(*[np.kron(*pair) for pair in pairs])
    np.testing.assert_allclose(block.to_dense(), dense, rtol=1e-12)
    np.testing.assert_allclose(block.trace(), np.trace(dense), rtol=1e-12)
    solved = block.precondition(tf.constant(data.gradient))
    for g, pair in enumerate(pairs):
        left, right = kfac.factored_inverses(*pair, DAMPING)
        np.testing.assert_allclose(
            solved[g], left @ data.gradient[g] @ right, rtol=1e-10
        )
    assert block.memory == 2 * GROUPS * (ROWS**2 + COLUMNS**2)


@pytest.mark.parametrize(
    ("options", "memory"),
    [
        ({"max_factor_size": 1}, ROWS + COLUMNS),
        ({"max_factor_size": 2}, ROWS + COLUMNS**2),
    ],
)
def test_kronecker_with_other_factors(options, memory, build_block, feed):
    data = Data()
    block = made("kronecker", data, build_block, feed, **options)
    assert block.memory == 2 * GROUPS * memory
    solved = block.precondition(tf.constant(data.gradient))
    dense = []
    for g, (left, right) in enumerate(factors(data, "expand")):
        size = options.get("max_factor_size", ROWS)
        left = np.diag(np.diag(left)) if size < ROWS else left
        right = np.diag(np.diag(right)) if size < COLUMNS else right
        dense.append(np.kron(left, right))
        inverses = kfac.factored_inverses(left, right, DAMPING)
        np.testing.assert_allclose(
            solved[g],
            inverses[0] @ data.gradient[g] @ inverses[1],
            rtol=1e-10,
        )
    np.testing.assert_allclose(
        block.to_dense(), block_diag(*dense), rtol=1e-12, atol=1e-14
    )


def test_full(build_block, feed):
    data = Data()
    block = made("full", data, build_block, feed)
    blocks = list(fishers(data))
    np.testing.assert_allclose(block.to_dense(), block_diag(*blocks))
    solved = block.precondition(tf.constant(data.gradient))
    for g, fisher in enumerate(blocks):
        expected = np.linalg.solve(
            fisher + DAMPING * np.eye(len(fisher)), data.gradient[g].ravel()
        )
        np.testing.assert_allclose(np.ravel(solved[g]), expected, rtol=1e-9)


@pytest.mark.parametrize("shared", [1, SHARED])
def test_diagonal(shared, build_block, feed):
    data = Data()
    data.inputs = data.inputs[:, :, :shared]
    data.columns = data.columns[:, :, :, :shared]
    block = made("diagonal", data, build_block, feed)
    expected = np.concatenate([np.diag(f) for f in fishers(data)])
    np.testing.assert_allclose(block.to_dense(), np.diag(expected), rtol=1e-10)
    solved = block.precondition(tf.constant(data.gradient))
    np.testing.assert_allclose(
        np.ravel(solved),
        data.gradient.ravel() / (expected + DAMPING),
        rtol=1e-10,
    )


@pytest.mark.parametrize("groups", [None, 2])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("kronecker", {}),
        ("kronecker", {"weight_sharing": "reduce"}),
        ("kronecker", {"max_factor_size": 3}),
        ("diagonal", {}),
        ("ekfac", {}),
        ("full", {}),
    ],
)
def test_patches_are_as_good_as_the_tensor(
    groups, kind, options, build_block, feed
):
    """Every block sees the same in `Patches` and in their tensor."""
    rng = np.random.default_rng(0)
    lead = [] if groups is None else [groups]
    images = tf.constant(rng.normal(size=(BATCH, 1, 4, 3, *lead, 1)))
    window = Window((2, 2), (1, 1), (1, 1))
    patches = Patches(images, window).homogeneous()
    data = Data()
    data.inputs = patches
    data.columns = rng.normal(size=(2, *lead, BATCH, 6, COLUMNS))
    found = []
    for inputs in (patches, patches.to_dense()):
        data.inputs = inputs
        block = build_block(
            create(kind, BlockShape(5, COLUMNS, groups), **options)
        )
        feed(block, data)
        found.append(block.to_dense())
    assert np.linalg.norm(found[1]) > 1.0
    np.testing.assert_allclose(*found, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize(
    "kind", ["coupled", "unitwise", "input_factor", "foof", "feature_scaled"]
)
def test_blocks_of_one_matrix_refuse_groups(kind):
    """They would add up what belongs to matrices of their own."""
    with pytest.raises(ValueError, match=r"'kronecker'.*Received: shape=.*=3"):
        create(kind, BlockShape(ROWS, COLUMNS, GROUPS))
