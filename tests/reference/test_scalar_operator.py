"""A published Hessian-free recipe whose Fisher products have rank one.

B. Gebotys, "Natural Gradient Descent without the Tears", forms `F v` by a
Jacobian-vector and a vector-Jacobian product of the *scalar* mean loss, which
is `ḡ (ḡᵀ v)`, and not of the network's outputs.
"""

import keras
import numpy as np
import pytest
import scipy.sparse.linalg
import tensorflow as tf

from keras_natgrad.solvers import Dense, Kernel
from keras_natgrad.solvers.registry import check_memory
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


def recipe(network, x, labels, sign=1.0):
    """The recipe's operator as a matrix, by automatic differentiation."""
    point = tf.constant(weights(network))
    columns = []
    for direction in np.eye(len(point)):
        with tf.autodiff.ForwardAccumulator(point, direction) as forward:
            loss = sign * mean_cross_entropy(point, x, labels)
        tangent = forward.jvp(loss)
        with tf.GradientTape() as tape:
            tape.watch(point)
            loss = sign * mean_cross_entropy(point, x, labels)
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


def test_sign_of_the_likelihood_does_not_matter(problem):
    """The exercise: the log-likelihood gives the product of its negative.

    The operator is quadratic in the gradient.
    """
    negative = recipe(*problem, sign=-1.0)
    np.testing.assert_allclose(negative, recipe(*problem), **EXACT)


# -- What the text says about the pieces ---------------------------------


def test_modes_of_the_two_products():
    """`J v` is forward mode and `vᵀ J` reverse mode; the text swaps them.

    v has the size of the input for the first, of the output for the second;
    the text has these the other way round as well.
    """
    matrix = np.random.default_rng(0).normal(size=(3, 5))
    point, into, out = tf.ones([5], tf.float64), np.arange(5.0), np.arange(3.0)
    with tf.autodiff.ForwardAccumulator(point, tf.constant(into)) as forward:
        result = tf.linalg.matvec(matrix, point)
    np.testing.assert_allclose(forward.jvp(result), matrix @ into, **EXACT)
    with tf.GradientTape() as tape:
        tape.watch(point)
        result = tf.linalg.matvec(matrix, point)
    found = tape.gradient(result, point, output_gradients=tf.constant(out))
    np.testing.assert_allclose(found, out @ matrix, **EXACT)
    wrong = tf.constant(out)
    with pytest.raises(ValueError, match="3 elements"):
        with tf.autodiff.ForwardAccumulator(point, wrong):
            tf.linalg.matvec(matrix, point)


def test_what_conjugate_gradients_minimise(problem):
    """Not "argmin A x = b" but `½ xᵀAx − bᵀx`, of a definite matrix.

    The solution is reached by products alone. A direction of the null space
    in b is never reached: the residual keeps its norm.
    """
    network, x, labels = problem
    exact = fisher.dense(network.trace(x), terms(labels))
    matrix = exact + 0.1 * np.eye(len(exact))
    b = gradient(network, x, labels)
    operator = scipy.sparse.linalg.LinearOperator(
        matrix.shape, matvec=lambda v: matrix @ v, dtype=np.float64
    )
    iterates = []
    found, _ = scipy.sparse.linalg.cg(
        operator,
        b,
        rtol=1e-12,
        callback=lambda v: iterates.append(v.copy()),
    )
    np.testing.assert_allclose(
        found, np.linalg.solve(matrix, b), rtol=1e-9, atol=1e-11
    )
    values = [0.5 * v @ matrix @ v - b @ v for v in iterates[:8]]
    assert np.all(np.diff(values) < 0)
    _, vectors = np.linalg.eigh(exact)
    null = vectors[:, 0]
    np.testing.assert_allclose(exact @ null, 0, atol=1e-14)
    solution = np.linalg.pinv(exact, rcond=1e-10) @ (b + null)
    missing = b + null - exact @ solution
    np.testing.assert_allclose(missing, null, rtol=0, atol=1e-12)


def test_sizes_of_the_mnist_example():
    """784-128-10 has 101 632 weights, not 97 000: 784, not 754, inputs.

    Its Fisher has 1.03e10 values, "over 9 billion" by either count, and is
    refused; the kernel of a batch of 128 has 1280 columns and fits.
    """
    model = keras.Sequential(
        [
            keras.Input((784,)),
            keras.layers.Dense(128, "relu", use_bias=False),
            keras.layers.Dense(10, use_bias=False),
        ]
    )
    size, columns = model.count_params(), 1280
    assert size == 101_632
    assert 754 * 128 + 128 * 10 == 97_792
    assert 9e9 < 97_000**2 < size**2 < 1.04e10
    with pytest.raises(ValueError, match="more than max_elements"):
        check_memory(Dense(), size, columns, 2**28)
    check_memory(Kernel(), size, columns, 2**28)
