"""The references themselves: derivatives, factors, known identities."""

import itertools

import numpy as np
import pytest

from tests.reference import fisher, heads, kfac
from tests.reference.heads import Term
from tests.reference.network import Linear, MeanPool, Network


def make_network(rng, activation="tanh"):
    """Sequences, a tied layer with bias, a pool, and two outputs."""
    return Network(
        [
            rng.normal(size=(4, 3)),
            rng.normal(size=(3, 3)),
            rng.normal(size=(4, 2)),
            rng.normal(size=(3, 3)),
        ],
        [True, False, True, False],
        [
            Linear(0, activation),
            Linear(1, "sigmoid"),
            Linear(1, activation),
            MeanPool(),
            Linear(2),
            Linear(3, source=3),
        ],
        outputs=(5, 6),
    )


@pytest.mark.parametrize("activation", ["tanh", "sigmoid", "relu", "linear"])
def test_jacobians_are_derivatives(rng, activation):
    network = make_network(rng, activation)
    x = rng.normal(size=(2, 3, 3))
    trace = network.trace(x)
    step = 1e-6
    for parameter, matrix in enumerate(network.matrices):
        for index in np.ndindex(*matrix.shape):
            ahead = [m.copy() for m in network.matrices]
            behind = [m.copy() for m in network.matrices]
            ahead[parameter][index] += step
            behind[parameter][index] -= step
            plus = network.with_matrices(ahead)(x)
            minus = network.with_matrices(behind)(x)
            for output in range(2):
                numeric = (plus[output] - minus[output]) / (2 * step)
                exact = trace.parameter_jacobian(parameter, output)
                np.testing.assert_allclose(
                    exact[(..., *index)], numeric, rtol=1e-6, atol=1e-8
                )


@pytest.mark.parametrize("head", ["normal", "bernoulli", "categorical"])
def test_factor_times_its_transpose_is_the_fisher(rng, head):
    eta = rng.normal(size=(2, 3, 4))
    term = Term(head, np.ones((2, 3)), scale=0.6)
    factor = heads.factor(term, eta)
    product = factor @ np.swapaxes(factor, -1, -2)
    np.testing.assert_allclose(product, heads.fisher(term, eta), atol=1e-15)


@pytest.mark.parametrize("head", ["bernoulli", "categorical"])
def test_fisher_is_the_expected_outer_product_of_scores(rng, head):
    eta = rng.normal(size=3)
    term = Term(head, np.ones((1, 1)))
    if head == "categorical":
        support = list(np.eye(3))
        probabilities = heads.softmax(eta)
    else:
        p = 1.0 / (1.0 + np.exp(-eta))
        support = [np.array(y) for y in itertools.product([0, 1], repeat=3)]
        probabilities = [np.prod(np.where(y, p, 1 - p)) for y in support]
    expected = sum(
        probability * np.outer(s, s)
        for y, probability in zip(support, probabilities, strict=True)
        for s in [heads.score(term, eta, y)]
    )
    np.testing.assert_allclose(
        heads.fisher(term, eta), expected, rtol=1e-12, atol=1e-15
    )


def test_gradient_is_the_derivative_of_the_loss(rng):
    network = make_network(rng)
    x = rng.normal(size=(2, 3, 3))
    terms = [
        Term(
            "bernoulli", rng.uniform(size=(2, 1)), rng.uniform(size=(2, 1, 2))
        ),
        Term("normal", rng.uniform(size=(2, 3)), rng.normal(size=(2, 3, 3))),
    ]
    trace = network.trace(x)
    for parameter, matrix in enumerate(network.matrices):
        gradient = fisher.gradient(trace, terms, parameter)
        direction = rng.normal(size=matrix.shape)

        def along(t, parameter=parameter, direction=direction):
            moved = [m.copy() for m in network.matrices]
            moved[parameter] += t * direction
            return fisher.loss(network.with_matrices(moved).trace(x), terms)

        numeric = (along(1e-6) - along(-1e-6)) / 2e-6
        np.testing.assert_allclose(
            np.sum(gradient * direction), numeric, rtol=1e-7
        )


def test_columns_sum_to_the_exact_block(rng):
    network = make_network(rng)
    trace = network.trace(rng.normal(size=(2, 3, 3)))
    terms = [
        Term("categorical", rng.uniform(size=(2, 1))),
        Term("normal", rng.uniform(size=(2, 3))),
    ]
    for parameter in range(4):
        total = 0.0
        for values in kfac.unit_columns(trace):
            g = kfac.cotangents(trace, terms, parameter, values)
            v = np.einsum("nsr,nsm->nrm", trace.inputs[parameter], g)
            v = v.reshape(len(v), -1)
            total += v.T @ v
        np.testing.assert_allclose(
            total, fisher.block(trace, terms, parameter), atol=1e-13
        )


def test_average_is_the_debiased_recursion(rng):
    average, biased, weight = kfac.Average(0.9), 0.0, 0.0
    for value in rng.normal(size=(5, 2, 2)):
        average.add(value)
        biased = 0.9 * biased + 0.1 * value
        weight = 0.9 * weight + 0.1
        np.testing.assert_allclose(average.mean(), biased / weight, rtol=1e-12)
