"""Products with the Fisher of the whole network."""

import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_natgrad import heads
from keras_natgrad.curvature import (
    OutputTerm,
    estimated_gram,
    fisher_gram,
)
from keras_natgrad.curvature.products import (
    gram_of_tangents,
    jacobian_vector_products,
    own_tangents,
    proportional_sample,
)
from tests.reference import fisher
from tests.reference.bridge import mlp, network_of
from tests.reference.heads import Term

from .test_estimator import PartlyUsed, inputs, two_heads

MODES = ["eager", "graph", "xla"]


def directions_of(variables, count=2, seed=3):
    rng = np.random.default_rng(seed)
    return [
        [tf.constant(rng.normal(size=tuple(v.shape))) for v in variables]
        for _ in range(count)
    ]


def flat(direction):
    """Kernel and bias of a layer in turn: row-major matrices."""
    return np.concatenate([np.ravel(part) for part in direction])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("head", ["normal", "bernoulli", "categorical"])
def test_gram_is_the_dense_product(mode, head, float64):
    model, x = mlp([3, 4, 2]), tf.constant(inputs(5, 3))
    head_of = {
        "normal": heads.Normal(1.0),
        "bernoulli": heads.Bernoulli(),
        "categorical": heads.Categorical(),
    }[head]
    variables = model.trainable_variables
    directions = directions_of(variables)
    weights = np.linspace(0.1, 1.0, 5)

    def gram(x):
        with tf.GradientTape(persistent=True) as tape:
            outputs = model(x)
        term = OutputTerm(outputs, head_of, tf.constant(weights))
        return fisher_gram(
            tape, [term], [v.value for v in variables], directions
        )

    if mode != "eager":
        gram = tf.function(gram, jit_compile=mode == "xla")
    dense = fisher.dense(
        network_of(model.layers).trace(x.numpy()),
        [Term(head, weights[:, None])],
    )
    stacked = np.stack([flat(d) for d in directions])
    np.testing.assert_allclose(gram(x), stacked @ dense @ stacked.T, rtol=1e-10)


def test_gram_of_two_heads_couples_all_layers(record):
    model, network = two_heads()
    x = inputs(4, 3)
    recorded = record(model, x, ["bernoulli", "categorical"])
    directions = directions_of(recorded.variables, count=3)
    gram = fisher_gram(
        recorded.tape,
        recorded.terms,
        [v.value for v in recorded.variables],
        directions,
    )
    dense = fisher.dense(network.trace(x), recorded.reference_terms)
    stacked = np.stack([flat(d) for d in directions])
    np.testing.assert_allclose(gram, stacked @ dense @ stacked.T, rtol=1e-10)


@pytest.mark.parametrize("pool", [False, True])
def test_jacobian_vector_products(pool, record):
    model, x = mlp([2, 3, 2], positions=3, pool=pool), inputs(4, 3, 2)
    recorded = record(model, x, ["normal"])
    (direction,) = directions_of(recorded.variables, count=1)
    (found,) = jacobian_vector_products(
        recorded.tape,
        recorded.terms,
        [v.value for v in recorded.variables],
        direction,
    )
    trace = network_of(model.layers).trace(x)
    parts = [
        np.concatenate([kernel, bias[None]])
        for kernel, bias in zip(direction[::2], direction[1::2], strict=True)
    ]
    expected = sum(
        np.einsum("npkrm,rm->npk", trace.parameter_jacobian(i), part)
        for i, part in enumerate(parts)
    )
    np.testing.assert_allclose(found, expected.reshape(found.shape), rtol=1e-11)


def test_gram_with_a_variable_without_gradient(record):
    recorded = record(PartlyUsed(), inputs(4, 3), ["normal"])
    directions = directions_of(recorded.variables)
    values = [v.value for v in recorded.variables]
    whole = fisher_gram(recorded.tape, recorded.terms, values, directions)
    part = fisher_gram(
        recorded.tape, recorded.terms, values[2:], [d[2:] for d in directions]
    )
    np.testing.assert_allclose(whole, part, rtol=1e-12)


def matrices_of(recorded, directions):
    return [recorded.curvature.to_matrices(d) for d in directions]


@pytest.mark.variants("None")
@pytest.mark.parametrize("positions", [None, 2])
def test_all_signs_average_to_the_gram(positions, record):
    """The estimated Gram matrix is unbiased: every sign pattern."""
    shape = (3, 2) if positions is None else (2, positions, 2)
    model = mlp([2, 2, 2], positions=positions)
    recorded = record(model, inputs(*shape), ["categorical"])
    directions = directions_of(recorded.variables)
    exact = fisher_gram(
        recorded.tape,
        recorded.terms,
        [v.value for v in recorded.variables],
        directions,
    )
    (term,) = recorded.terms
    shape = tuple(term.outputs.shape)
    patterns = list(itertools.product([-1.0, 1.0], repeat=np.prod(shape)))
    total = 0.0
    for signs in patterns:
        values = tf.reshape(tf.constant(signs, tf.float64), shape)
        backward = recorded.captured.backward([term.cotangent(values)])
        gram = estimated_gram(
            recorded.captured,
            backward,
            matrices_of(recorded, directions),
            examples=100,
        )
        total += gram.numpy() / len(patterns)
    np.testing.assert_allclose(total, exact, rtol=1e-11)


@pytest.mark.parametrize("count", [1, 2])
def test_parts_of_the_first_direction(count, record):
    """A row per layer: that of a direction with all other layers zero."""
    recorded = record(mlp([3, 4, 3, 2]), inputs(5, 3), ["normal"])
    first, *others = matrices_of(
        recorded, directions_of(recorded.variables)[:count]
    )
    (term,) = recorded.terms
    backward = recorded.captured.backward(
        [term.cotangent(tf.ones([5, 2], tf.float64))]
    )
    layers = recorded.curvature.split(first)
    alone = [
        recorded.curvature.join(
            [d if i == j else tf.zeros_like(d) for j, d in enumerate(layers)]
        )
        for i in range(len(layers))
    ]
    found = estimated_gram(
        recorded.captured, backward, [first, *others], 3, by_layer=True
    )
    expected = estimated_gram(recorded.captured, backward, [*alone, *others], 3)
    assert found.shape == (2 + count, 2 + count)
    np.testing.assert_allclose(found, expected, rtol=1e-11)


@pytest.mark.parametrize("by_layer", [False, True])
def test_tangents_serve_several_backward_passes(by_layer, record):
    """Products with the directions do not depend on the cotangents."""
    recorded = record(mlp([3, 4, 3, 2]), inputs(5, 3), ["normal"])
    directions = matrices_of(recorded, directions_of(recorded.variables))
    own = own_tangents(recorded.captured.inputs, directions)
    (term,) = recorded.terms
    rng = np.random.default_rng(0)
    for _ in range(3):
        columns = tf.constant(rng.normal(size=(5, 2)))
        backward = recorded.captured.backward([term.cotangent(columns)])
        expected = estimated_gram(
            recorded.captured, backward, directions, 5, by_layer
        )
        found = gram_of_tangents(own, backward.cotangents, by_layer)
        np.testing.assert_allclose(found, expected, rtol=1e-12)


@pytest.mark.parametrize("batch", [7, 8, 9, 15, 16])
def test_estimate_from_a_part_of_the_batch_is_scaled(batch, record):
    """Of identical examples and signs, a part tells as much as all."""
    x = np.repeat(inputs(1, 3), batch, axis=0)
    recorded = record(mlp([3, 4, 2]), x, ["normal"])
    directions = matrices_of(recorded, directions_of(recorded.variables))
    term = OutputTerm(
        recorded.terms[0].outputs,
        recorded.terms[0].head,
        tf.fill([batch], tf.constant(1.0 / batch, tf.float64)),
    )
    backward = recorded.captured.backward(
        [term.cotangent(tf.ones([batch, 2], tf.float64))]
    )
    part, whole = (
        estimated_gram(recorded.captured, backward, directions, examples)
        for examples in (4, 1000)
    )
    np.testing.assert_allclose(part, whole, rtol=1e-11)


def test_estimate_does_not_miss_the_few_examples_that_matter(record):
    """Nearly all of the Fisher is in three examples of 64, and is found."""
    recorded = record(mlp([3, 4, 2]), inputs(64, 3), ["normal"])
    directions = matrices_of(recorded, directions_of(recorded.variables))
    coefficients = np.full(64, 1e-6)
    coefficients[[5, 40, 63]] = [1.0, 2.0, 0.5]
    term = OutputTerm(
        recorded.terms[0].outputs,
        recorded.terms[0].head,
        tf.constant(coefficients),
    )
    backward = recorded.captured.backward(
        [term.cotangent(tf.ones([64, 2], tf.float64))]
    )
    part, whole = (
        estimated_gram(recorded.captured, backward, directions, examples)
        for examples in (16, 64)
    )
    error = np.linalg.norm(part - whole) / np.linalg.norm(whole)
    assert error < 0.15


@given(
    sizes=st.lists(st.floats(0, 100, width=32), min_size=1, max_size=30),
    count=st.integers(1, 40),
)
@settings(deadline=None, max_examples=50)
def test_proportional_sample(sizes, count):
    """Rows are drawn by their sizes; sums of multiples of them are exact."""
    sizes = np.array(sizes)
    rows, weights = proportional_sample(tf.constant(sizes), count)
    drawn = np.bincount(rows, minlength=len(sizes))
    assert drawn.sum() == count
    total = sizes.sum()
    np.testing.assert_allclose(
        np.sum(weights * sizes[rows.numpy()]), total, rtol=1e-9, atol=1e-300
    )
    if total > 1e-9:
        assert np.all(np.abs(drawn - count * sizes / total) <= 1 + 1e-6)


@pytest.mark.parametrize("rows", [256, 384, 512, 768, 1024])
def test_proportional_sample_of_equal_sizes_ignores_rounding(rows):
    """No point falls between two rows, where rounding would draw one."""
    rng = np.random.default_rng(0)
    sizes = np.ones(rows, np.float32)
    expected, _ = proportional_sample(tf.constant(sizes), 256)
    for _ in range(20):
        noisy = sizes * (1 + 1e-7 * rng.normal(size=rows)).astype(np.float32)
        drawn, _ = proportional_sample(tf.constant(noisy), 256)
        np.testing.assert_array_equal(drawn, expected)


def test_estimate_with_an_unused_layer(record):
    """A layer that took no part in the pass contributes nothing."""
    recorded = record(PartlyUsed(), inputs(4, 3), ["normal"])
    directions = directions_of(recorded.variables)
    (term,) = recorded.terms

    def last_layer(direction):
        return recorded.curvature.split(direction)[1]

    backward = recorded.captured.backward(
        [term.cotangent(tf.ones([4, 2], tf.float64))]
    )
    gram = estimated_gram(
        recorded.captured, backward, matrices_of(recorded, directions), 100
    )
    tangents = [
        np.einsum("nr,rm->nm", recorded.captured.inputs[1][:, 0], d)
        for d in map(last_layer, matrices_of(recorded, directions))
    ]
    slopes = np.stack(
        [np.sum(t * backward.cotangents[1][:, 0], axis=1) for t in tangents]
    )
    np.testing.assert_allclose(gram, slopes @ slopes.T, rtol=1e-11)


def test_unit_directions_give_the_diagonal(record):
    model, x = mlp([2, 2, 2]), inputs(3, 2)
    recorded = record(model, x, ["bernoulli"])
    dense = fisher.dense(
        network_of(model.layers).trace(x), recorded.reference_terms
    )
    shapes = [tuple(v.shape) for v in recorded.variables]
    sizes = [int(np.prod(shape)) for shape in shapes]
    units = [
        [
            tf.constant(part.reshape(shape))
            for part, shape in zip(
                np.split(row, np.cumsum(sizes)[:-1]), shapes, strict=True
            )
        ]
        for row in np.eye(sum(sizes))
    ]
    gram = fisher_gram(
        recorded.tape,
        recorded.terms,
        [v.value for v in recorded.variables],
        units,
    )
    np.testing.assert_allclose(gram, dense, rtol=1e-10, atol=1e-14)


def test_gram_in_half_precision_is_computed_in_float32():
    keras.config.set_dtype_policy("mixed_bfloat16")
    model = mlp([3, 4, 2])
    x = tf.constant(inputs(5, 3), tf.float32)
    with tf.GradientTape(persistent=True) as tape:
        outputs = model(x)
    term = OutputTerm(outputs, heads.Categorical(), tf.fill([5], 0.2))
    directions = [
        [tf.ones(v.shape) for v in model.trainable_variables] for _ in range(2)
    ]
    gram = fisher_gram(
        tape,
        [term],
        [v.value for v in model.trainable_variables],
        directions,
    )
    assert gram.dtype == tf.float32
    assert np.all(np.isfinite(gram)) and gram[0, 0] >= 0
