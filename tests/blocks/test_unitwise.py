"""Metrics per unit, per group and for coupled units against dense algebra."""

import numpy as np
import pytest
import tensorflow as tf

from keras_natgrad.blocks import BlockShape, CoupledBlock, UnitwiseBlock

BATCH, ROWS, COLUMNS = 7, 3, 5
RHO = 0.01


def samples(shared=1, seed=0):
    rng = np.random.default_rng(seed)
    inputs = rng.normal(size=(BATCH, shared, ROWS))
    return inputs, rng.normal(size=(BATCH, shared, COLUMNS))


def unit_metrics(inputs, cotangents):
    gradients = np.einsum("nsa,nsj->nja", inputs, cotangents)
    return np.einsum("nja,njb->jab", gradients, gradients)


def make(build_block, groups=None, **kwargs):
    shape = BlockShape(ROWS, COLUMNS)
    return build_block(UnitwiseBlock(groups, **kwargs).bind(shape))


def feed_once(block, inputs, cotangents, decay=0.0):
    statistics = block.cotangent_statistics(inputs, tf.constant(cotangents))
    block.accumulate(statistics, decay)


# Units 0-1, 2-3 and 4 share a metric where there are three groups.
GROUPS = {
    None: [0, 1, 2, 3, 4],
    3: [0, 0, 1, 1, 2],
    2: [0, 0, 0, 1, 1],
    1: [0, 0, 0, 0, 0],
}


@pytest.mark.parametrize("shared", [1, 2])
@pytest.mark.parametrize("groups", GROUPS)
def test_metric_and_solve(groups, shared, build_block):
    inputs, cotangents = samples(shared)
    block = make(build_block, groups, relative_damping=RHO)
    feed_once(block, inputs, cotangents)
    own, group = unit_metrics(inputs, cotangents), np.array(GROUPS[groups])
    means = [own[group == k].mean(axis=0) for k in group]
    dense = np.zeros((ROWS, COLUMNS, ROWS, COLUMNS))
    gradient = np.random.default_rng(1).normal(size=(ROWS, COLUMNS))
    solved = np.empty_like(gradient)
    block.refresh(tf.constant(0.1, tf.float64))
    for unit, metric in enumerate(means):
        dense[:, unit, :, unit] = metric
        damping = 0.1 + RHO * np.trace(metric)
        solved[:, unit] = np.linalg.solve(
            metric + damping * np.eye(ROWS), gradient[:, unit]
        )
    dense = dense.reshape(ROWS * COLUMNS, -1)
    np.testing.assert_allclose(block.to_dense(), dense, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(block.trace(), np.trace(dense), rtol=1e-12)
    np.testing.assert_allclose(
        block.precondition(tf.constant(gradient)), solved, rtol=1e-10
    )
    stored = sum(int(np.prod(v.shape)) for v in block.created.values())
    assert block.memory == stored - 1


@pytest.mark.parametrize(
    ("groups", "text"),
    [
        (None, "3² per unit"),
        (3, "3² per group of 2 units"),
        (1, "3² for all units"),
    ],
)
def test_description(groups, text, build_block):
    assert make(build_block, groups).describe() == text
    block = make(build_block, groups, response="relu")
    assert block.describe() == f"relu, {text}"


@pytest.mark.parametrize("groups", [0, 6])
def test_bad_metric_count(groups):
    with pytest.raises(ValueError, match=f"`metric_count`.*count={groups}"):
        UnitwiseBlock(groups).bind(BlockShape(ROWS, COLUMNS))


@pytest.mark.parametrize(("rows", "columns"), [(3, 5), (7, 2)])
def test_coupled_sums_columns_before_the_inputs(rows, columns, build_block):
    """Both orders of the product, `n ≤ m²` and `n > m²`."""
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(BATCH, rows))
    several = rng.normal(size=(4, BATCH, columns))
    block = build_block(CoupledBlock().bind(BlockShape(rows, columns)))
    moment = tf.add_n([block.moment(tf.constant(g)) for g in several])
    block.accumulate(block.metrics_of(inputs, moment), 0.0)
    gradients = np.einsum("na,enj->enaj", inputs, several)
    flat = gradients.reshape(-1, rows * columns)
    np.testing.assert_allclose(block.to_dense(), flat.T @ flat, rtol=1e-12)


def test_identity_start_keeps_its_share(build_block):
    inputs, cotangents = samples()
    block = make(build_block, identity_start=True, relative_damping=RHO)
    gradient = tf.constant(np.ones((ROWS, COLUMNS)))
    block.refresh(tf.constant(0.0, tf.float64))
    np.testing.assert_allclose(
        block.precondition(gradient), gradient / (1 + RHO * ROWS), rtol=1e-14
    )
    expected = np.broadcast_to(np.eye(ROWS), (COLUMNS, ROWS, ROWS))
    for _ in range(3):
        feed_once(block, inputs, cotangents, decay=0.9)
        own = unit_metrics(inputs, cotangents)
        expected = 0.9 * expected + 0.1 * own
    np.testing.assert_allclose(block.average("metric"), expected, rtol=1e-12)


def test_unit_without_a_metric_stands_still(build_block):
    inputs, cotangents = samples()
    cotangents[..., 2] = 0.0
    block = make(build_block, relative_damping=RHO)
    feed_once(block, inputs, cotangents)
    retries, failures = block.refresh(tf.constant(0.0, tf.float64))
    assert (int(retries), int(failures)) == (0, 1)
    solved = block.precondition(tf.constant(np.ones((ROWS, COLUMNS)))).numpy()
    np.testing.assert_array_equal(solved[:, 2], 0.0)
    assert np.all(np.abs(np.delete(solved, 2, axis=1)).sum(axis=0) > 0)
