"""A published Hessian-free recipe whose Fisher products have rank one.

B. Gebotys, "Natural Gradient Descent without the Tears", forms `F v` by a
Jacobian-vector and a vector-Jacobian product of the *scalar* mean loss, which
is `ḡ (ḡᵀ v)`, and not of the network's outputs.
"""

import numpy as np
import pytest
import scipy.sparse.linalg
import tensorflow as tf

from tests.reference import fisher, heads
from tests.reference.heads import Term
from tests.reference.network import Linear, Network

EXACT = dict(rtol=1e-12, atol=1e-14)
EXAMPLES = 8
DAMPING = 1e-3  # of the recipe with sampled labels


@pytest.fixture
def problem():
    """A tanh network, its inputs and its labels, one-hot."""
    rng = np.random.default_rng(0)
    matrices = [rng.normal(size=(4, 5)), rng.normal(size=(5, 3))]
    network = Network(matrices, [False, False], [Linear(0, "tanh"), Linear(1)])
    x = rng.normal(size=(EXAMPLES, 4))
    labels = np.eye(3)[rng.integers(3, size=EXAMPLES)]
    return network, x, labels


def weights(network):
    return np.concatenate([m.ravel() for m in network.matrices])


def terms(labels):
    coefficients = np.full((EXAMPLES, 1), 1 / EXAMPLES)
    return [Term("categorical", coefficients, labels[:, np.newaxis])]


def gradient(network, x, labels):
    trace = network.trace(x)
    parts = [fisher.gradient(trace, terms(labels), i) for i in range(2)]
    return np.concatenate([np.ravel(part) for part in parts])


def mean_cross_entropy(vector, x, labels):
    first, second = tf.split(vector, [20, 15])
    hidden = tf.tanh(x @ tf.reshape(first, [4, 5]))
    logits = hidden @ tf.reshape(second, [5, 3])
    losses = tf.nn.softmax_cross_entropy_with_logits(labels, logits)
    return tf.reduce_mean(losses)


def recipe(network, x, labels):
    """The recipe's operator as a matrix, by automatic differentiation."""
    point = tf.constant(weights(network))
    columns = []
    for direction in np.eye(len(point)):
        with tf.autodiff.ForwardAccumulator(point, direction) as forward:
            loss = mean_cross_entropy(point, x, labels)
        tangent = forward.jvp(loss)
        with tf.GradientTape() as tape:
            tape.watch(point)
            loss = mean_cross_entropy(point, x, labels)
        columns.append(tape.gradient(loss, point, tangent).numpy())
    return np.stack(columns, axis=1)


def sampled(network, x):
    """One label per example, drawn from the network's own distribution."""
    rng = np.random.default_rng(1)
    p = heads.softmax(network(x)[0])[:, 0]
    return np.eye(3)[[rng.choice(3, p=row) for row in p]]


def conjugate_gradients(matrix, right):
    """SciPy's solution after each iteration, at most 10 as in the recipe."""
    iterates = []
    scipy.sparse.linalg.cg(
        matrix,
        right,
        rtol=1e-5,
        maxiter=10,
        callback=lambda x: iterates.append(x.copy()),
    )
    return iterates


def test_operator_is_the_outer_product_of_the_mean_gradient(problem):
    matrix = recipe(*problem)
    g = gradient(*problem)
    np.testing.assert_allclose(matrix, np.outer(g, g), **EXACT)
    assert np.linalg.matrix_rank(matrix) == 1


def test_operator_is_neither_fisher(problem):
    """Ranks: N (K − 1) of the Fisher, N of the empirical Fisher."""
    network, x, labels = problem
    trace = network.trace(x)
    exact = fisher.dense(trace, terms(labels))
    assert np.linalg.matrix_rank(exact) == EXAMPLES * 2
    parts = [fisher.flat_jacobian(trace, i)[:, 0] for i in range(2)]
    score = labels - heads.softmax(trace.outputs[0])[:, 0]
    jacobian = np.concatenate(parts, axis=-1)
    each = np.einsum("nk,nkp->np", score, jacobian)
    empirical = each.T @ each / EXAMPLES
    assert np.linalg.matrix_rank(empirical) == EXAMPLES
    matrix = recipe(*problem)
    for fisher_matrix in (exact, empirical):
        difference = np.linalg.norm(matrix - fisher_matrix)
        assert difference > 0.5 * np.linalg.norm(fisher_matrix)


def test_conjugate_gradients_rescale_the_gradient(problem):
    """They end after one iteration, at `ḡ / ‖ḡ‖²`."""
    g = gradient(*problem)
    iterates = conjugate_gradients(recipe(*problem), g)
    assert len(iterates) == 1
    np.testing.assert_allclose(iterates[0], g / (g @ g), **EXACT)


def test_sampled_labels_deflate_one_direction(problem):
    """`x = (ḡ − ḡ_s (ḡ_sᵀ ḡ) / (λ + ‖ḡ_s‖²)) / λ`."""
    network, x, labels = problem
    g, drawn = gradient(*problem), sampled(network, x)
    g_s = gradient(network, x, drawn)
    system = recipe(network, x, drawn) + DAMPING * np.eye(len(g))
    expected = (g - g_s * (g_s @ g) / (DAMPING + g_s @ g_s)) / DAMPING
    np.testing.assert_allclose(np.linalg.solve(system, g), expected, rtol=1e-9)
    # On the complement of ḡ_s it is the gradient over λ.
    off = np.eye(len(g)) - np.outer(g_s, g_s) / (g_s @ g_s)
    np.testing.assert_allclose(
        off @ expected, off @ g / DAMPING, rtol=1e-9, atol=1e-9
    )
