"""Mixtures of normals against quadrature."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from scipy.optimize import brentq
from scipy.special import logsumexp
from scipy.stats import norm

from keras_natgrad import heads

from .densities import STEP

OUTPUTS = np.random.default_rng(0).normal(size=(4, 9))
OUTPUTS[3, 3:6] *= 8  # Components far apart.


def log_density(eta, y):
    """Three components, complex parameters, scales by softplus."""
    logits, loc, raw = np.split(eta, 3)
    scale = np.log(1.0 + np.exp(raw)) + 1e-6
    shares = np.exp(logits) / np.sum(np.exp(logits))
    z = (y[:, None] - loc) / scale
    each = np.exp(-0.5 * z**2) / (scale * np.sqrt(2.0 * np.pi))
    return np.log(np.sum(shares * each, axis=-1))


def quadrature_fisher(eta):
    """`E[s sᵀ]` by the trapezoidal rule, exact for smooth densities."""
    _, loc, raw = np.split(eta, 3)
    scale = np.log(1.0 + np.exp(raw)) + 1e-6
    lowest, highest = np.min(loc - 11 * scale), np.max(loc + 11 * scale)
    y = np.arange(lowest, highest, scale.min() / 30)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        density = np.exp(log_density(eta.astype(complex), y).real)
        steps = 1j * STEP * np.eye(len(eta))
        scores = np.stack(
            [log_density(eta + step, y).imag / STEP for step in steps]
        )
    scores = np.where(density > 1e-100, scores, 0.0)
    mass = density * (y[1] - y[0])
    np.testing.assert_allclose(mass.sum(), 1.0, rtol=1e-12)
    return np.einsum("iy,jy,y->ij", scores, scores, mass)


def complete_fisher(eta):
    """Block by block, the components' blocks from their scores."""
    logits, loc, raw = np.split(eta, 3)
    shares = np.exp(logits) / np.sum(np.exp(logits))
    scale = np.log(1.0 + np.exp(raw)) + 1e-6
    slope = 1.0 / (1.0 + np.exp(-raw))
    zero = np.zeros((3, 3))
    return np.block(
        [
            [np.diag(shares) - np.outer(shares, shares), zero, zero],
            [zero, np.diag(shares / scale**2), zero],
            [zero, zero, np.diag(2 * shares * (slope / scale) ** 2)],
        ]
    )


def test_complete_data_fisher():
    head = heads.NormalMixture(3, fisher="complete_data")
    np.testing.assert_allclose(
        head.fisher(OUTPUTS),
        [complete_fisher(eta) for eta in OUTPUTS],
        rtol=1e-10,
        atol=1e-14,
    )


def test_complete_data_bound_the_fisher_matrix():
    """`F_complete − F` is semidefinite, and small where nothing overlaps."""
    bound = heads.NormalMixture(3, fisher="complete_data").fisher(OUTPUTS)
    for eta, found in zip(OUTPUTS, bound.numpy(), strict=True):
        exact = quadrature_fisher(eta)
        assert np.linalg.eigvalsh(found - exact).min() > -1e-10
        assert np.linalg.eigvalsh(exact).min() > -1e-10
        assert np.trace(found) > np.trace(exact)
    apart = np.array([[0.3, -0.2, 0.1, -200.0, 0.0, 200.0, 0.1, 0.5, -0.4]])
    np.testing.assert_allclose(
        heads.NormalMixture(3, fisher="complete_data").fisher(apart)[0],
        quadrature_fisher(apart[0]),
        atol=1e-9,
    )


def test_monte_carlo_is_unbiased():
    """4000 estimates of 16 draws each; five standard errors."""
    head, eta = heads.NormalMixture(3), OUTPUTS[0]
    # Draws follow from the outputs, and differ between examples.
    estimates = head.fisher(np.tile(eta, (4000, 1))).numpy()
    error = estimates.std(axis=0) / np.sqrt(len(estimates))
    difference = np.abs(estimates.mean(axis=0) - quadrature_fisher(eta))
    assert np.all(difference <= 5 * error)


@pytest.mark.parametrize("fisher", heads.mixture.METHODS)
@pytest.mark.parametrize("scale", ["softplus", 0.7])
def test_factor_products(fisher, scale):
    """`L Lᵀ = F` and the transpose, by the whole batch."""
    head = heads.NormalMixture(3, scale, fisher=fisher, samples=5)
    outputs = OUTPUTS[:, : head.parameter_count]
    head.validate(outputs.shape)
    rank = head.factor_rank(head.parameter_count)
    dense = np.stack(
        [
            head.fisher_factor_product(outputs, np.tile(column, (4, 1)))
            for column in np.eye(rank)
        ],
        axis=-1,
    )
    np.testing.assert_allclose(
        dense @ dense.swapaxes(-1, -2),
        head.fisher(outputs),
        rtol=1e-10,
        atol=1e-12,
    )
    vector = np.random.default_rng(1).normal(size=outputs.shape)
    np.testing.assert_allclose(
        head.fisher_factor_transpose_product(outputs, vector),
        np.einsum("nij,ni->nj", dense, vector),
        rtol=1e-10,
        atol=1e-12,
    )


def test_log_prob_mean_and_stddev():
    head, y = heads.NormalMixture(3), np.array([0.1, -1.0, 2.0, 40.0])
    logits, loc, raw = np.split(OUTPUTS, 3, axis=-1)
    scale = np.log1p(np.exp(raw)) + 1e-6
    log_shares = logits - logsumexp(logits, axis=-1, keepdims=True)
    expected = logsumexp(log_shares + norm(loc, scale).logpdf(y[:, None]), -1)
    for targets in (y, y[:, None]):
        np.testing.assert_allclose(
            head.log_prob(OUTPUTS, targets), expected, rtol=1e-10
        )
    np.testing.assert_allclose(
        head.distribution(OUTPUTS).log_prob(y), expected, rtol=1e-10
    )
    shares = np.exp(log_shares)
    mean = np.sum(shares * loc, axis=-1)
    square = np.sum(shares * (loc**2 + scale**2), axis=-1)
    np.testing.assert_allclose(head.mean(OUTPUTS), mean, rtol=1e-10)
    np.testing.assert_allclose(
        head.stddev(OUTPUTS), np.sqrt(square - mean**2), rtol=1e-10
    )
    head.validate_targets(OUTPUTS, head.sample(OUTPUTS, [0, 1]))


def mixture_of(eta):
    """Shares and SciPy's components."""
    logits, loc, raw = np.split(eta, 3)
    scale = np.log1p(np.exp(raw)) + 1e-6
    return np.exp(logits - logsumexp(logits)), norm(loc, scale)


def test_cdf():
    head, y = heads.NormalMixture(3), np.array([0.1, -1.0, 2.0, -40.0])
    expected = []
    for eta, value in zip(OUTPUTS, y, strict=True):
        shares, components = mixture_of(eta)
        expected.append(shares @ components.cdf(value))
    for targets in (y, y[:, None]):
        np.testing.assert_allclose(
            head.cdf(OUTPUTS, targets), expected, rtol=1e-10
        )


@pytest.mark.parametrize(
    "probability", [1e-12, 1e-3, 0.3, 0.5, 0.9, 1.0 - 1e-9]
)
def test_quantile(probability):
    """A root of SciPy's distribution function, on the smaller tail."""
    head, expected = heads.NormalMixture(3), []
    outputs = np.concatenate([OUTPUTS, OUTPUTS[:2]])
    outputs[-2, 3:6] *= 1e3  # Components with nothing in between.
    outputs[-1, 3:] = 0.5  # Components that are all the same.
    for eta in outputs:
        shares, components = mixture_of(eta)
        ends = components.ppf(probability)

        def excess(value, shares=shares, components=components):
            if probability > 0.5:
                return 1.0 - probability - shares @ components.sf(value)
            return shares @ components.cdf(value) - probability

        width = 1e-6 + 1e-9 * np.ptp(ends)
        expected.append(
            brentq(excess, ends.min() - width, ends.max() + width, xtol=1e-14)
        )
    found = head.quantile(outputs, probability)
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    np.testing.assert_allclose(head.cdf(outputs, found), probability, rtol=1e-9)
    single = head.quantile(outputs.astype(np.float32), probability)
    assert single.dtype == tf.float32
    np.testing.assert_allclose(single, expected, rtol=1e-3)


def test_quantile_compiles():
    head = heads.NormalMixture(3)
    compiled = tf.function(
        lambda x: head.quantile(x, 0.9),
        input_signature=[tf.TensorSpec([None, 9], tf.float64)],
        jit_compile=True,
    )
    np.testing.assert_allclose(
        compiled(tf.constant(OUTPUTS)), head.quantile(OUTPUTS, 0.9), rtol=1e-9
    )


@pytest.mark.slow
@pytest.mark.parametrize("fisher", heads.mixture.METHODS)
def test_every_product_compiles(fisher):
    head = heads.NormalMixture(3, fisher=fisher, samples=5)
    vector = np.random.default_rng(2).normal(size=(4, head.factor_rank(9)))

    @tf.function(
        input_signature=[tf.TensorSpec([None, 9], tf.float64)],
        jit_compile=True,
    )
    def everything(outputs):
        return (
            head.fisher(outputs),
            head.fisher_factor_product(outputs, vector),
            head.fisher_factor_transpose_product(outputs, outputs),
            head.score(outputs, outputs[:, 0]),
        )

    found = everything(tf.constant(OUTPUTS))
    assert all(np.all(np.isfinite(value)) for value in found)
    np.testing.assert_allclose(
        found[3], head.score(OUTPUTS, OUTPUTS[:, 0]), rtol=1e-9
    )
    if fisher == "monte_carlo":  # XLA draws others.
        assert np.linalg.eigvalsh(found[0]).min() > -1e-10
        return
    np.testing.assert_allclose(found[0], head.fisher(OUTPUTS), atol=1e-12)


def test_head_survives_saving():
    for head in (
        heads.NormalMixture(2),
        heads.NormalMixture(3, 0.5, "complete_data", 4),
    ):
        restored = keras.saving.deserialize_keras_object(
            keras.saving.serialize_keras_object(head)
        )
        assert restored == head
        assert repr(restored) == repr(head)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: heads.NormalMixture(1), "integer of at least 2"),
        (lambda: heads.NormalMixture(2, "sigmoid"), "`scale` must be"),
        (lambda: heads.NormalMixture(2, fisher="exact"), "`fisher` must be"),
        (lambda: heads.NormalMixture(2, samples=0), "`samples` must be"),
        (
            lambda: heads.NormalMixture(2).quantile(np.zeros([1, 6]), 1.0),
            "`probability` must be",
        ),
        (
            lambda: heads.NormalMixture(2).validate((None, 4)),
            r"takes 6 outputs \(logits, loc, scale of all",
        ),
        (
            lambda: heads.NormalMixture(2).validate_targets(
                np.zeros([1, 6]), np.array([np.nan])
            ),
            "finite numbers",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
