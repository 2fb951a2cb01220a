"""A of a network against brute-force Jacobians in NumPy."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_natgrad.curvature.network_root import NetworkRoot
from keras_natgrad.curvature.root_columns import Columns
from tests.reference import fisher
from tests.reference.bridge import dense_layers, mlp, network_of, randomize
from tests.reference.unknown import Unknown

SEED = tf.constant([0, 0])


def two_outputs():
    inputs = keras.Input((3,))
    hidden = keras.layers.Dense(4, "tanh")(inputs)
    return keras.Model(
        inputs, [keras.layers.Dense(3)(hidden), keras.layers.Dense(2)(hidden)]
    )


def shared():
    """One layer used twice: two positions of the same weights."""
    layer = keras.layers.Dense(3, "tanh")
    inputs = keras.Input((3,))
    return keras.Model(inputs, keras.layers.Dense(3)(layer(layer(inputs)))), [
        layer,
        layer,
    ]


def case(name):
    """Model, layers in order, nodes that are outputs, input, heads."""
    generator = np.random.default_rng(5)
    x = generator.normal(size=(6, 3))
    if name == "two outputs":
        model = two_outputs()
        layers = dense_layers(model)
        network = (layers, {2: 1}, (2, 3))
        return model, network, x, ["categorical", "normal"]
    if name == "shared":
        model, layers = shared()
        return model, ([*layers, model.layers[-1]], None, (-1,)), x, ["normal"]
    if name == "sequence":
        model = mlp([3, 4, 3], positions=2)
        x = generator.normal(size=(5, 2, 3))
        return model, (dense_layers(model), None, (-1,)), x, ["categorical"]
    if name == "pooled":
        model = mlp([3, 4, 3], positions=2, pool=True)
        layers = model.layers
        x = generator.normal(size=(5, 2, 3))
        return model, (layers, None, (-1,)), x, ["bernoulli"]
    model = mlp([3, 4, 3])
    return model, (dense_layers(model), None, (-1,)), x, [name]


CASES = (
    *("normal", "bernoulli", "categorical"),
    *("two outputs", "shared", "sequence", "pooled"),
)


def build(record, name, kind="exact", max_elements=2**20):
    """The factor, and the reference's dense Fisher."""
    model, network, x, heads = case(name)
    randomize(model)
    targets = None
    if kind == "empirical":
        targets = [np.random.default_rng(1).normal(size=(6, 3))]
    recorded = record(model, tf.constant(x), heads, targets)
    with recorded.tape:
        loss = tf.add_n(
            [
                tf.reduce_sum(
                    term.coefficients * tf.reduce_sum(tf.sin(term.outputs), -1)
                )
                for term in recorded.terms
            ]
        )
    columns = Columns(recorded.terms, kind, SEED)
    factor = NetworkRoot(recorded.captured, columns, loss, max_elements)
    layers, sources, outputs = network
    trace = network_of(layers, sources, outputs).trace(x)
    return recorded, factor, trace, loss


def assert_close(found, expected, tolerance=1e-10):
    np.testing.assert_allclose(
        found, expected, 0, tolerance * np.abs(expected).max()
    )


@pytest.mark.parametrize("name", CASES)
def test_matrix(record, name):
    recorded, factor, trace, _ = build(record, name)
    matrix = factor.matrix().numpy()
    assert_close(
        matrix @ matrix.T, fisher.dense(trace, recorded.reference_terms)
    )
    assert matrix.shape == (factor.size, factor.column_count)


@pytest.mark.parametrize("name", CASES)
def test_kernel(record, name):
    _, factor, _, _ = build(record, name)
    matrix = factor.matrix().numpy()
    assert_close(factor.gram(), matrix.T @ matrix)


@pytest.mark.parametrize("name", ["sequence", "shared"])
def test_kernel_in_chunks(record, name):
    """A small bound on the temporaries makes one chunk per row."""
    _, factor, _, _ = build(record, name, max_elements=1)
    matrix = factor.matrix().numpy()
    assert_close(factor.gram(), matrix.T @ matrix)


@pytest.mark.parametrize("name", CASES)
def test_products(record, name):
    _, factor, _, _ = build(record, name)
    matrix = factor.matrix().numpy()
    generator = np.random.default_rng(2)
    vector = generator.normal(size=factor.column_count)
    product = factor.product(tf.constant(vector))
    assert_close(factor.flatten(product), matrix @ vector)
    direction = generator.normal(size=factor.size)
    found = factor.transpose_product(factor.unflatten(tf.constant(direction)))
    assert_close(found, matrix.T @ direction)
    tensors = factor.to_tensors(factor.unflatten(tf.constant(direction)))
    assert_close(factor.flatten(factor.from_tensors(tensors)), direction)


@pytest.mark.parametrize("name", CASES)
def test_residual_explains_the_gradient(record, name):
    """Where F_η has full rank, `A u` is the gradient of any loss."""
    recorded, factor, _, loss = build(record, name)
    gradients = recorded.tape.gradient(loss, recorded.captured.variables)
    expected = factor.flatten(factor.from_tensors(gradients))
    found = factor.flatten(factor.product(factor.residual()))
    if name in ("categorical", "two outputs", "sequence"):
        # The gradient of this loss leaves the range of the softmax Fisher.
        assert np.linalg.norm(found - expected) > 1e-3
        return
    assert_close(found, expected)


def test_categorical_residual(record):
    """For the cross-entropy, `u = (p − y)/√p` up to the rotation of L."""
    recorded, _, _, _ = build(record, "categorical")
    (term,) = recorded.terms
    labels = tf.constant([0, 1, 2, 0, 1, 2])
    with recorded.tape:
        loss = -tf.reduce_sum(
            term.coefficients * term.head.log_prob(term.outputs, labels)
        )
    columns = Columns(recorded.terms, "exact", SEED)
    factor = NetworkRoot(recorded.captured, columns, loss, 2**20)
    gradients = recorded.tape.gradient(loss, recorded.captured.variables)
    expected = factor.flatten(factor.from_tensors(gradients))
    assert_close(factor.flatten(factor.product(factor.residual())), expected)
    p = tf.nn.softmax(term.outputs).numpy()
    whitened = (p - np.eye(3)[labels]) / np.sqrt(p)
    norm = np.sum(term.coefficients.numpy() * np.sum(whitened**2, axis=-1))
    np.testing.assert_allclose(np.sum(factor.residual() ** 2), norm, 1e-10)


def test_empirical(record):
    recorded, factor, trace, _ = build(record, "normal", "empirical")
    matrix = factor.matrix().numpy()
    found = matrix @ matrix.T
    start = 0
    for parameter, entry in enumerate(recorded.curvature.entries):
        stop = start + entry.block.shape.size
        expected = fisher.empirical(trace, recorded.reference_terms, parameter)
        assert_close(found[start:stop, start:stop], expected)
        start = stop
    # One column per example, and more than one: no product of mean gradients.
    assert np.linalg.matrix_rank(found) == 6


def test_sampled_has_the_exact_one_as_mean(record):
    recorded, exact, _, _ = build(record, "categorical")
    target = exact.matrix().numpy()
    target = target @ target.T
    draws = []
    for seed in range(400):
        columns = Columns(recorded.terms, "sampled", tf.constant([seed, 1]))
        factor = NetworkRoot(
            recorded.captured, columns, recorded.terms[0].outputs, 2**20
        )
        matrix = factor.matrix().numpy()
        draws.append(matrix @ matrix.T)
    error = np.mean(draws, axis=0) - target
    deviation = np.std(draws, axis=0) / np.sqrt(len(draws))
    assert np.all(np.abs(error) <= 5 * deviation + 1e-12)


def test_fallback_variables(record):
    """A layer that is not captured goes through the tape's Jacobian."""
    model = keras.Sequential(
        [
            keras.Input((3,)),
            keras.layers.Dense(4, "tanh"),
            Unknown(),
            keras.layers.Dense(2),
        ]
    )
    randomize(model)
    x = tf.constant(np.random.default_rng(0).normal(size=(5, 3)))
    recorded = record(model, x, ["normal"])
    columns = Columns(recorded.terms, "exact", SEED)
    factor = NetworkRoot(
        recorded.captured, columns, recorded.terms[0].outputs, 2**20
    )
    matrix = factor.matrix().numpy()
    identity = np.eye(factor.column_count)
    columns = [
        factor.flatten(factor.product(tf.constant(unit))) for unit in identity
    ]
    assert_close(matrix, np.stack(columns, axis=1))
    assert_close(factor.gram(), matrix.T @ matrix)
    assert len(recorded.captured.fallbacks) == 2


@pytest.mark.parametrize("name", ["categorical", "sequence"])
def test_trace_estimate(record, name):
    """One draw of signs: right on average over many, in scale for one."""
    _, factor, _, _ = build(record, name)
    exact = np.trace(factor.gram().numpy())
    assert 0.2 < float(factor.trace_estimate()) / exact < 5
