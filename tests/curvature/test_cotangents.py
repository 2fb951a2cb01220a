"""Cotangents at the outputs."""

import itertools

import numpy as np
import pytest
import tensorflow as tf

from keras_natgrad import heads
from keras_natgrad.curvature import OutputTerm, random_cotangents
from keras_natgrad.curvature.cotangents import (
    column_cotangents,
    example_weights,
)

HEADS = [heads.Normal(0.7), heads.Bernoulli(), heads.Categorical()]


def make_term(head, shape=(2, 2, 3), seed=0, targets=None):
    rng = np.random.default_rng(seed)
    return OutputTerm(
        tf.constant(rng.normal(size=shape)),
        head,
        tf.constant(rng.uniform(0.2, 1.0, size=shape[:-1])),
        targets,
    )


def fisher_of(term):
    """`c F` of every position."""
    return term.coefficients[..., None, None] * term.head.fisher(term.outputs)


@pytest.mark.parametrize("head", HEADS)
def test_columns_sum_to_the_weighted_fisher(head):
    term = make_term(head)
    assert int(term.column_count()) == 2 * 3
    total = 0.0
    for column in range(6):
        (u,) = column_cotangents(
            [term], 0, tf.constant(column), tf.constant([0, column])
        )
        total += tf.einsum("npk,nqj->npqkj", u, u).numpy()
    for p, q in itertools.product(range(2), repeat=2):
        expected = fisher_of(term)[:, p] if p == q else 0.0
        np.testing.assert_allclose(total[:, p, q], expected, atol=1e-14)


@pytest.mark.parametrize("head", HEADS)
def test_signs_average_to_the_weighted_fisher(head):
    """The mean over all sign patterns of a propagated cotangent."""
    term = make_term(head, (1, 2, 2))
    total = 0.0
    patterns = list(itertools.product([-1.0, 1.0], repeat=4))
    for signs in patterns:
        u = term.cotangent(
            tf.reshape(tf.constant(signs, tf.float64), [1, 2, 2])
        )
        total += tf.einsum("npk,nqj->npqkj", u, u).numpy() / len(patterns)
    for p, q in itertools.product(range(2), repeat=2):
        expected = fisher_of(term)[:, p] if p == q else 0.0
        np.testing.assert_allclose(total[:, p, q], expected, atol=1e-14)


@pytest.mark.parametrize("head", HEADS)
def test_propagated_cotangent_is_a_sign_combination_of_columns(head):
    term = make_term(head, (3, 2))
    (u,) = random_cotangents([term], "propagated", tf.constant([1, 2]))
    patterns = [
        term.cotangent(tf.constant([signs] * 3, tf.float64)).numpy()
        for signs in itertools.product([-1.0, 1.0], repeat=2)
    ]
    for n in range(3):
        assert any(np.allclose(u[n], p[n], rtol=1e-14) for p in patterns)


@pytest.mark.parametrize("kind", ["propagated", "sampled"])
@pytest.mark.parametrize("head", HEADS)
def test_mean_outer_product_is_the_fisher(kind, head):
    """20 000 draws; five standard errors are below 6 % of the largest."""
    count = 20_000
    row = make_term(head, (1, 3)).outputs
    outputs = tf.repeat(row, count, axis=0)
    term = OutputTerm(outputs, head, tf.ones([count], tf.float64))
    (u,) = random_cotangents([term], kind, tf.constant([3, 4]))
    mean = tf.matmul(u, u, transpose_a=True).numpy() / count
    expected = head.fisher(row)[0].numpy()
    assert np.abs(mean - expected).max() < 0.06 * np.abs(expected).max()


def test_empirical_is_the_signed_score():
    head = heads.Categorical()
    labels = tf.constant([[0, 2], [1, 1]])
    term = make_term(head, targets=labels)
    (u,) = random_cotangents([term], "empirical", tf.constant([0, 0]))
    score = tf.sqrt(term.coefficients)[..., None] * head.score(
        term.outputs, labels
    )
    ratio = u / score
    np.testing.assert_allclose(np.abs(ratio), 1.0, rtol=1e-12)
    np.testing.assert_allclose(ratio, ratio[..., :1] + 0 * ratio)


def test_terms_have_independent_signs():
    terms = [make_term(heads.Normal(1.0), (64, 4)) for _ in range(2)]
    first, second = random_cotangents(terms, "propagated", tf.constant([0, 0]))
    product = np.sign(first) * np.sign(second)
    assert abs(product.mean()) < 0.3  # 256 signs, five standard errors


def test_no_gradient_flows_through_a_cotangent():
    term = make_term(heads.Categorical())
    with tf.GradientTape() as tape:
        tape.watch(term.outputs)
        (u,) = random_cotangents([term], "propagated", tf.constant([0, 0]))
        total = tf.reduce_sum(u)
    assert tape.gradient(total, term.outputs) is None


def test_factor_transpose():
    term = make_term(heads.Categorical())
    tangents = tf.constant(np.random.default_rng(1).normal(size=(2, 2, 3)))
    product = term.factor_transpose(tangents)
    squares = tf.reduce_sum(product**2, axis=-1)
    expected = tf.einsum(
        "npk,npkj,npj->np", tangents, fisher_of(term), tangents
    )
    np.testing.assert_allclose(squares, expected, rtol=1e-12)


def test_example_weights_sum_over_terms_and_positions():
    one, two = make_term(heads.Normal(), (2, 3)), make_term(heads.Normal())
    expected = one.coefficients + tf.reduce_sum(two.coefficients, axis=1)
    np.testing.assert_allclose(example_weights([one, two]), expected)


def test_cotangents_of_half_precision_outputs():
    outputs = tf.zeros([4, 2], tf.bfloat16)
    term = OutputTerm(outputs, heads.Normal(), tf.ones([4]))
    seed = tf.constant([1, 2])
    (propagated,) = random_cotangents([term], "propagated", seed)
    column = column_cotangents([term], 0, tf.constant(0), seed)[0]
    assert propagated.dtype == column.dtype == tf.bfloat16
    assert set(np.unique(tf.cast(propagated, tf.float32))) == {-1.0, 1.0}
    np.testing.assert_array_equal(
        tf.abs(tf.cast(column, tf.float32)), [[1.0, 0.0]] * 4
    )
