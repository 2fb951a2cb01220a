"""What every block has to do."""

import numpy as np
import pytest
import tensorflow as tf

from keras_natgrad.blocks import (
    BlockShape,
    CoupledBlock,
    DiagonalBlock,
    FullBlock,
    GradientDiagonalBlock,
    GradientScalarBlock,
    InputFactorBlock,
    KroneckerBlock,
    PlainGradientBlock,
    UnitwiseBlock,
)

KINDS = {
    "full": ("full", {}),
    "diagonal": ("diagonal", {}),
    "expand": ("kronecker", {}),
    "reduce": ("kronecker", {"weight_sharing": "reduce"}),
    "diagonal_input": ("kronecker", {"max_factor_size": 2}),
    "diagonal_both": ("kronecker", {"max_factor_size": 1}),
    "input_factor": ("input_factor", {}),
    "input_factor_reduce": ("foof", {"weight_sharing": "reduce"}),
    "input_factor_biased": ("input_factor", {"biased": True}),
    "input_factor_diagonal": (
        "input_factor",
        {"biased": True, "max_factor_size": 1},
    ),
    "unitwise": ("unitwise", {}),
    "coupled": ("coupled", {}),
}
DAMPING = 0.3


@pytest.fixture(params=KINDS)
def block(request, make_block):
    kind, options = KINDS[request.param]
    return make_block(kind, **options)


def damping():
    return tf.constant(DAMPING, tf.float64)


def test_operator_matches_its_dense_matrix(block, data, feed):
    feed(block, data)
    dense = block.to_dense().numpy()
    assert dense.shape == (6, 6)
    np.testing.assert_allclose(dense, dense.T, atol=1e-12)
    assert np.linalg.eigvalsh(dense).min() > -1e-10
    vector = data.gradient.ravel()
    product = block.operator().matvec(tf.constant(vector))
    np.testing.assert_allclose(product, dense @ vector, rtol=1e-11)


def test_trace(block, data, feed):
    feed(block, data)
    np.testing.assert_allclose(
        block.trace(), np.trace(block.to_dense()), rtol=1e-12
    )


def test_two_consecutive_preconditions_are_identical(block, data, feed):
    feed(block, data)
    block.refresh(damping())
    gradient = tf.constant(data.gradient)
    first = block.precondition(gradient).numpy()
    second = block.precondition(gradient).numpy()
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(gradient, data.gradient)
    block.refresh(damping())
    np.testing.assert_array_equal(block.precondition(gradient), first)


def test_refresh_does_not_damp_the_averages(block, data, feed):
    feed(block, data)
    before = block.to_dense().numpy()
    block.refresh(damping())
    block.refresh(damping())
    np.testing.assert_array_equal(block.to_dense(), before)


def test_running_average_is_the_weighted_mean(block, make_data, feed):
    decay, blocks = 0.9, [make_data(seed=seed) for seed in range(4)]
    seen = []
    for data in blocks:
        feed(block, data, decay)
        inputs = block.input_statistics(data.inputs, data.weights)
        first, second = (
            block.cotangent_statistics(data.inputs, g) for g in data.columns
        )
        summed = {name: first[name] + second[name] for name in first}
        seen.append({**inputs, **summed})
        weights = decay ** np.arange(len(seen))[::-1]
        weights /= weights.sum()
        for name, average in block.averages().items():
            expected = sum(
                weight * np.asarray(values[name])
                for weight, values in zip(weights, seen, strict=True)
            )
            np.testing.assert_allclose(average, expected, rtol=1e-12)


def test_first_average_is_the_first_batch(block, data, feed):
    feed(block, data, 0.99)
    first = {name: value.numpy() for name, value in block.averages().items()}
    feed(block, data, 0.0)
    for name, value in block.averages().items():
        np.testing.assert_allclose(value, first[name], rtol=1e-12)


def test_empty_block_is_zero(block):
    np.testing.assert_array_equal(block.to_dense(), np.zeros((6, 6)))
    assert float(block.trace()) == 0.0


def test_failed_refresh_keeps_the_last_good_inverse(block, data, feed):
    feed(block, data)
    block.refresh(damping())
    gradient = tf.constant(data.gradient)
    good = block.precondition(gradient).numpy()
    data.inputs[0] = np.nan
    feed(block, data)
    _, failures = block.refresh(damping())
    assert int(failures) > 0
    np.testing.assert_array_equal(block.precondition(gradient), good)


def test_good_refresh_counts_nothing(block, data, feed):
    feed(block, data)
    retries, failures = block.refresh(damping())
    assert (int(retries), int(failures)) == (0, 0)


def test_memory_counts_what_is_stored(block):
    stored = sum(
        int(np.prod(variable.shape))
        for name, variable in block.created.items()
        if name != "weight"
    )
    assert block.memory == stored


@pytest.mark.variants(1)
def test_compiles_under_xla(block, data, feed):
    feed(block, data)
    gradient = tf.constant(data.gradient)
    block.refresh(damping())
    eager = block.precondition(gradient).numpy()

    @tf.function(jit_compile=True)
    def run(gradient):
        counts = block.refresh(damping())
        return block.precondition(gradient), counts

    compiled, counts = run(gradient)
    np.testing.assert_allclose(compiled, eager, rtol=1e-11)
    assert [int(count) for count in counts] == [0, 0]


@pytest.mark.parametrize(
    ("block_class", "expected"),
    [
        (KroneckerBlock, 2 * (9 + 4)),
        (DiagonalBlock, 2 * 6),
        (FullBlock, 2 * 36),
        (GradientDiagonalBlock, 2 * 6),
        (GradientScalarBlock, 2),
        (InputFactorBlock, 2 * 9),
        (PlainGradientBlock, 0),
    ],
)
def test_stated_memory(block_class, expected):
    assert block_class().bind(BlockShape(3, 2)).memory == expected
    assert block_class().bind(BlockShape(3, 2), 4).memory == 4 * expected


def test_stated_memory_of_metrics():
    assert CoupledBlock().bind(BlockShape(3, 2)).memory == 2 * 36
    assert UnitwiseBlock().bind(BlockShape(3, 2)).memory == 2 * 2 * 9


def test_shape_has_a_size():
    assert BlockShape(rows=3, columns=2).size == 6
