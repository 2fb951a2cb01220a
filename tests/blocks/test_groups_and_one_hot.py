"""Blocks of layers with groups, and of layers with one-hot inputs."""

import numpy as np
import pytest
import scipy.linalg
import tensorflow as tf

from keras_natgrad.blocks import BlockShape, create
from keras_natgrad.linalg import OneHot
from tests.blocks.conftest import summed

BATCH, SHARED, GROUPS, ROWS, COLUMNS, DEPTH = 4, 3, 2, 2, 2, 5

KINDS = [
    ("kronecker", {}),
    ("kronecker", {"weight_sharing": "reduce"}),
    ("kronecker", {"max_factor_size": 1}),
    ("ekfac", {}),
    ("ekfac", {"max_factor_size": 1}),
    ("diagonal", {}),
    ("full", {}),
]
IDS = ["_".join([kind, *map(str, o.values())]) for kind, o in KINDS]


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def step(block, inputs, cotangents, weights, damping=0.3):
    """Two batches of statistics, the second of two columns; one refresh."""
    for decay, columns in ((0.0, cotangents[:1]), (0.7, cotangents)):
        first = block.input_statistics(inputs, weights)
        second = [block.cotangent_statistics(inputs, g) for g in columns]
        block.accumulate(first | summed(second), decay)
    retries, failures = block.refresh(tf.constant(damping, tf.float64))
    assert int(retries) == int(failures) == 0
    return block


@pytest.mark.parametrize(("kind", "options"), KINDS, ids=IDS)
@pytest.mark.parametrize("shared", [1, SHARED])
def test_groups_are_blocks_of_their_own(kind, options, shared, build_block):
    inputs = random(GROUPS, BATCH, shared, ROWS)
    cotangents = random(2, GROUPS, BATCH, shared, COLUMNS, seed=1)
    weights = np.random.default_rng(2).uniform(0.5, 2.0, size=BATCH)
    gradient = random(GROUPS, ROWS, COLUMNS, seed=3)
    shape = BlockShape(ROWS, COLUMNS, GROUPS)
    block = build_block(create(kind, shape, **options))
    step(block, tf.constant(inputs), cotangents, weights)
    solved = block.precondition(tf.constant(gradient))
    assert solved.shape == (GROUPS, ROWS, COLUMNS)
    parts, traces, elements = [], 0.0, 0
    for group in range(GROUPS):
        single = build_block(create(kind, BlockShape(ROWS, COLUMNS), **options))
        step(single, tf.constant(inputs[group]), cotangents[:, group], weights)
        parts.append(single.to_dense().numpy())
        traces += float(single.trace())
        elements += single.memory
        np.testing.assert_allclose(
            solved[group],
            single.precondition(tf.constant(gradient[group])),
            rtol=1e-9,
        )
    np.testing.assert_allclose(
        block.to_dense(), scipy.linalg.block_diag(*parts), atol=1e-12
    )
    np.testing.assert_allclose(block.trace(), traces, rtol=1e-12)
    assert block.memory == elements
    assert block.memory == sum(
        v.shape.num_elements()
        for name, v in block.created.items()
        if name != "weight"
    )


def test_full_block_of_groups_is_exact(build_block):
    inputs = random(GROUPS, BATCH, SHARED, ROWS)
    (cotangents,) = random(1, GROUPS, BATCH, SHARED, COLUMNS, seed=1)
    block = build_block(create("full", BlockShape(ROWS, COLUMNS, GROUPS)))
    statistics = block.cotangent_statistics(tf.constant(inputs), cotangents)
    block.accumulate(statistics, 0.0)
    per_example = np.einsum("kbsn,kbsm->kbnm", inputs, cotangents)
    flat = per_example.reshape(GROUPS, BATCH, -1)
    expected = np.einsum("kbi,kbj->kij", flat, flat)
    np.testing.assert_allclose(
        block.to_dense(), scipy.linalg.block_diag(*expected), rtol=1e-12
    )


@pytest.mark.parametrize(("kind", "options"), KINDS, ids=IDS)
@pytest.mark.parametrize("shared", [1, SHARED])
def test_one_hot_equals_the_dense_tensor(kind, options, shared, build_block):
    rng = np.random.default_rng(0)
    indices = rng.integers(-1, DEPTH + 1, size=(BATCH, shared))
    values = rng.normal(size=(BATCH, shared))
    rows = OneHot(tf.constant(indices), tf.constant(values), DEPTH)
    dense = rows.to_dense()
    weights = rng.uniform(0.5, 2.0, size=BATCH)
    cotangents = random(2, BATCH, shared, COLUMNS, seed=1)
    gradient = tf.constant(random(DEPTH, COLUMNS, seed=3))
    shape = BlockShape(DEPTH, COLUMNS, one_hot=True)
    sparse = build_block(create(kind, shape, **options))
    if sparse.kind == "kronecker":
        assert sparse.average("input_factor").shape == (DEPTH,)
    step(sparse, rows, cotangents, weights)
    full = build_block(create(kind, BlockShape(DEPTH, COLUMNS), **options))
    step(full, dense, cotangents, weights)
    expected = full.to_dense().numpy()
    if sparse.kind == "kronecker" and options.get("weight_sharing"):
        # The mean over positions has several nonzeros: of its second moment
        # the diagonal is kept.
        left = np.diag(np.diag(full.average("input_factor").numpy()))
        expected = np.kron(left, full.average("output_factor").numpy())
    np.testing.assert_allclose(sparse.to_dense(), expected, atol=1e-12)
    if sparse.kind != "kronecker" or not options.get("weight_sharing"):
        np.testing.assert_allclose(
            sparse.precondition(gradient),
            full.precondition(gradient),
            rtol=1e-9,
        )
    assert sparse.memory <= full.memory


def test_methods_of_one_hot():
    rng = np.random.default_rng(0)
    indices = rng.integers(-1, DEPTH + 1, size=(BATCH, SHARED))
    values = rng.normal(size=(BATCH, SHARED))
    rows = OneHot(tf.constant(indices), tf.constant(values), DEPTH)
    dense = np.zeros((BATCH, SHARED, DEPTH))
    for b in range(BATCH):
        for s in range(SHARED):
            if 0 <= indices[b, s] < DEPTH:
                dense[b, s, indices[b, s]] = values[b, s]
    np.testing.assert_array_equal(rows.to_dense(), dense)
    assert rows.dtype == tf.float64
    np.testing.assert_allclose(
        tf.linalg.diag(rows.squares()),
        np.einsum("bsi,bsj->ij", dense, dense),
        atol=1e-14,
    )
    matrix = rng.normal(size=(DEPTH, 2))
    np.testing.assert_allclose(
        rows.matmul(tf.constant(matrix)), dense @ matrix, atol=1e-14
    )
    examples = np.array([3, 0, 0])
    np.testing.assert_array_equal(
        rows.take(tf.constant(examples)).to_dense(), dense[examples]
    )
