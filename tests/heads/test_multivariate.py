"""Heads of one multivariate distribution."""

import itertools
import math
from fractions import Fraction

import keras
import numpy as np
import pytest
import tensorflow as tf
import tensorflow_probability as tfp
from scipy import stats
from scipy.special import polygamma

from keras_natgrad import heads

from .test_families import factor

RNG = np.random.default_rng(0)
HEADS = {
    "mvn_1": (heads.MultivariateNormalTriL(), RNG.normal(size=(3, 2))),
    "mvn_3": (heads.MultivariateNormalTriL(), RNG.normal(size=(3, 9))),
    "mvn_exp": (heads.MultivariateNormalTriL("exp"), RNG.normal(size=(3, 5))),
    "dirichlet": (heads.Dirichlet(), RNG.normal(size=(3, 4))),
    "dirichlet_exp": (heads.Dirichlet("exp"), 3 * RNG.normal(size=(3, 4))),
    "multinomial": (heads.Multinomial(5), RNG.normal(size=(3, 4))),
    "dirichlet_multinomial": (
        heads.DirichletMultinomial(5),
        RNG.normal(size=(3, 4)),
    ),
    "beta_binomial": (
        heads.DirichletMultinomial(9, "exp"),
        RNG.normal(size=(3, 2)),
    ),
}
# TensorFlow Probability knows no divergence of these.
COUNTS = ("multinomial", "dirichlet_multinomial", "beta_binomial")
each = pytest.mark.parametrize("name", HEADS)


def divergence_hessian(head, eta):
    """Hessian of `KL(p ‖ p(η))` in float64, by TFP's divergence."""
    fixed, eta = head.distribution(tf.constant(eta)), tf.constant(eta)
    with tf.GradientTape(persistent=True) as outer:
        outer.watch(eta)
        with tf.GradientTape() as inner:
            inner.watch(eta)
            divergence = fixed.kl_divergence(head.distribution(eta))
        gradient = inner.gradient(divergence, eta)
    return outer.jacobian(gradient, eta, experimental_use_pfor=False)


@pytest.mark.parametrize("name", [n for n in HEADS if n not in COUNTS])
def test_fisher_is_the_hessian_of_the_divergence(name):
    head, outputs = HEADS[name]
    fisher = head.fisher(outputs)
    for found, eta in zip(fisher, outputs, strict=True):
        np.testing.assert_allclose(
            found, divergence_hessian(head, eta), rtol=1e-8, atol=1e-9
        )


def test_multinomial_is_as_many_categorical_draws():
    head, outputs = HEADS["multinomial"]
    one = heads.Categorical().fisher(outputs)
    np.testing.assert_allclose(head.fisher(outputs), 5 * one, rtol=1e-12)


@each
def test_factor_products(name):
    head, outputs = HEADS[name]
    dense = factor(head, outputs)
    fisher = head.fisher(outputs).numpy()
    np.testing.assert_allclose(
        dense @ dense.swapaxes(-1, -2), fisher, rtol=1e-10, atol=1e-12
    )
    vector = np.random.default_rng(1).normal(size=outputs.shape)
    np.testing.assert_allclose(
        head.fisher_factor_transpose_product(outputs, vector),
        np.einsum("nij,ni->nj", dense, vector),
        rtol=1e-10,
        atol=1e-12,
    )


@each
def test_log_prob_samples_and_scores(name):
    head, outputs = HEADS[name]
    many = np.tile(outputs[0], (20_000, 1))
    draws = head.sample(many, [1, 2])
    head.validate_targets(many, draws)
    np.testing.assert_allclose(
        head.log_prob(many, draws),
        head.distribution(tf.constant(many)).log_prob(draws),
        rtol=1e-9,
    )
    scores = head.score(many, draws).numpy()
    products = scores[:, :, None] * scores[:, None, :]
    for values, expected in (
        (scores, 0.0),
        (products, head.fisher(outputs[:1])[0]),
    ):
        error = values.std(axis=0) / np.sqrt(len(values))
        difference = np.abs(values.mean(axis=0) - expected)
        assert np.all(difference <= 5 * error + 1e-9)


@pytest.mark.variants("mvn_1")
@each
def test_every_product_compiles(name):
    head, outputs = HEADS[name][0], tf.constant(HEADS[name][1], tf.float32)

    def everything(outputs):
        return (
            head.fisher(outputs),
            head.fisher_factor_product(outputs, outputs),
            head.fisher_factor_transpose_product(outputs, outputs),
        )

    compiled = tf.function(everything, jit_compile=True)(outputs)
    for actual, expected in zip(compiled, everything(outputs), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=2e-4, atol=2e-5)


def test_dirichlet_of_extreme_concentrations():
    """Float32 entries from 1e-6 to 1e6: finite, semidefinite, accurate."""
    rng = np.random.default_rng(0)
    raw = rng.uniform(-13.8, 13.8, size=(10_000, 5)).astype(np.float32)
    head = heads.Dirichlet("exp")
    dense = factor(head, raw)
    assert np.all(np.isfinite(dense))
    fisher = dense @ dense.swapaxes(-1, -2)
    alpha = np.exp(raw.astype(float))
    total = alpha.sum(-1, keepdims=True)
    exact = -polygamma(1, total)[..., None] * (
        alpha[:, :, None] * alpha[:, None, :]
    )
    exact += np.eye(5) * (alpha**2 * polygamma(1, alpha))[:, :, None]
    error = np.abs(fisher - exact) / np.abs(exact).max((1, 2), keepdims=True)
    assert error.max() < 1e-5


def exact_fisher(alpha, count):
    """Fisher matrix of counts in log α, in rational numbers.

    The score `α_j (Σ_{i<y_j} 1/(α_j + i) − Σ_{i<n} 1/(α₀ + i))` and the
    probability are rational in α; so is the sum over all counts.
    """
    alpha = [Fraction(float(value)) for value in alpha]

    def rising(value, m):
        return math.prod((value + i for i in range(m)), start=Fraction(1))

    def harmonic(value, m):
        return sum((1 / (value + i) for i in range(m)), Fraction(0))

    total, fisher = sum(alpha), np.zeros((len(alpha), len(alpha)), object)
    for counts in itertools.product(range(count + 1), repeat=len(alpha)):
        if sum(counts) != count:
            continue
        pairs = list(zip(alpha, counts, strict=True))
        mass = math.factorial(count) / rising(total, count)
        for value, y in pairs:
            mass *= rising(value, y) / math.factorial(y)
        common = harmonic(total, count)
        score = [value * (harmonic(value, y) - common) for value, y in pairs]
        fisher += mass * np.outer(score, score)
    return fisher


@pytest.mark.variants("1")
@pytest.mark.parametrize("count", [1, 2, 6])
def test_dirichlet_multinomial_from_all_counts(count):
    """Concentrations from 1e-6 to 1e6, in units of the diagonal."""
    head = heads.DirichletMultinomial(count, "exp")
    for logs in itertools.product((-13.8, -4.0, 0.0, 13.8), repeat=3):
        outputs = np.array(logs)
        exact = exact_fisher(np.exp(outputs), count)
        scale = np.sqrt(np.diag(exact).astype(float))
        error = head.fisher(outputs).numpy() - exact.astype(float)
        assert np.abs(error / np.outer(scale, scale)).max() < 1e-8
        if count == 1:
            continue
        # What the counts say of α₀, down to 1e-12 of the largest entry.
        along = head.fisher_factor_transpose_product(outputs, np.ones(3))
        np.testing.assert_allclose(
            np.sum(along**2), float(exact.sum()), rtol=1e-3
        )


def test_one_draw_is_categorical():
    outputs = RNG.normal(size=(5, 4))
    np.testing.assert_allclose(
        heads.DirichletMultinomial(1, "exp").fisher(outputs),
        heads.Categorical().fisher(outputs),
        rtol=1e-10,
        atol=1e-14,
    )


def test_large_concentrations_are_multinomial():
    """To n / α₀, as a share of the matrix."""
    outputs = RNG.normal(size=(5, 4))
    np.testing.assert_allclose(
        heads.DirichletMultinomial(30, "exp").fisher(outputs + 20.0),
        heads.Multinomial(30).fisher(outputs),
        rtol=1e-6,
    )


def test_dirichlet_multinomial_log_prob():
    """SciPy's, and in float32 where log Γ loses all digits of the counts."""
    head = heads.DirichletMultinomial(6, "exp")
    y = np.array([1.0, 0.0, 5.0])
    outputs = np.array([0.3, -1.0, 0.5])
    np.testing.assert_allclose(
        head.log_prob(outputs, y),
        stats.dirichlet_multinomial(np.exp(outputs), 6).logpmf(y),
        rtol=1e-10,
    )
    raw = np.log([1e6, 2e6, 3e6]).astype(np.float32)
    alpha = np.exp(raw.astype(float))
    counts = [np.arange(m).astype(float) for m in (1, 0, 5, 6)]
    rate = [np.sum(a / (a + i)) for a, i in zip(alpha, counts, strict=False)]
    common = np.sum(1.0 / (alpha.sum() + counts[3]))
    np.testing.assert_allclose(
        head.score(raw, y.astype(np.float32)),
        rate - alpha * common,
        rtol=1e-5,
        atol=1e-8,
    )


@each
def test_head_survives_saving(name):
    head = HEADS[name][0]
    restored = keras.saving.deserialize_keras_object(
        keras.saving.serialize_keras_object(head)
    )
    assert restored == head


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: heads.MultivariateNormalTriL().validate((None, 6)),
            r"one of \[2, 5, 9, 14, 20\]",
        ),
        (lambda: heads.Dirichlet().validate((None, 1)), "at least two"),
        (lambda: heads.Dirichlet("sigmoid"), "`concentration` must be"),
        (
            lambda: heads.Multinomial(0),
            "`total_count` must be an integer of at least 1",
        ),
        (
            lambda: heads.DirichletMultinomial(0),
            "`total_count` must be an integer of at least 1",
        ),
        (lambda: heads.DirichletMultinomial(2.5), "`total_count` must be an"),
        (
            lambda: heads.DirichletMultinomial(3).validate((None, 1)),
            "A DirichletMultinomial head needs one output per share",
        ),
        (
            lambda: heads.DirichletMultinomial(2).validate_targets(
                np.zeros([1, 2]), np.array([[1.0, 2.0]])
            ),
            "counts per class that sum to 2",
        ),
        (
            lambda: heads.Multinomial(2).validate_targets(
                np.zeros([1, 2]), np.array([[1.0, 2.0]])
            ),
            "counts per class that sum to 2",
        ),
        (
            lambda: heads.Dirichlet().validate_targets(
                np.zeros([1, 2]), np.array([[0.0, 1.0]])
            ),
            "positive shares that sum to 1",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_triangle_is_filled_as_tfp_does():
    outputs = tf.constant([[0.0, 0.0, 1.0, 2.0, 3.0]])
    head = heads.MultivariateNormalTriL("exp")
    scale = head.distribution(outputs).scale.to_dense()[0].numpy()
    raw = tfp.math.fill_triangular(tf.constant([1.0, 2.0, 3.0])).numpy()
    np.testing.assert_allclose(scale[1, 0], raw[1, 0])
    np.testing.assert_allclose(np.diag(scale), np.exp(np.diag(raw)), rtol=1e-6)
