"""Families of distributions against independent densities and quadrature."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_natgrad import heads
from keras_natgrad.heads.links import SUPPORTS, get_link

from .densities import DENSITIES

each = pytest.mark.parametrize(
    "density", DENSITIES, ids=[density.name for density in DENSITIES]
)


def factor(head, outputs):
    """The dense factor, one product per column."""
    size = outputs.shape[-1]
    columns = [
        head.fisher_factor_product(
            outputs, np.broadcast_to(column, outputs.shape)
        )
        for column in np.eye(size, dtype=outputs.dtype)
    ]
    return np.stack(columns, axis=-1)


@each
def test_fisher_is_the_expectation_of_the_scores(density):
    """Against quadrature or summation of complex-step scores."""
    fisher = density.head.fisher(density.outputs).numpy()
    for found, eta in zip(fisher, density.outputs, strict=True):
        expected = density.fisher(eta)
        scale = np.abs(expected).max()
        np.testing.assert_allclose(
            found, expected, rtol=1e-8, atol=1e-8 * scale
        )


@each
def test_factor_products(density):
    """`L Lᵀ = F`, `Lᵀ` is the transpose, `F⁺ F = 1`."""
    head, outputs = density.head, density.outputs
    dense, fisher = factor(head, outputs), head.fisher(outputs).numpy()
    np.testing.assert_allclose(
        dense @ dense.swapaxes(-1, -2), fisher, rtol=1e-10, atol=1e-13
    )
    vector = np.random.default_rng(1).normal(size=outputs.shape)
    np.testing.assert_allclose(
        head.fisher_factor_transpose_product(outputs, vector),
        np.einsum("nij,ni->nj", dense, vector),
        rtol=1e-10,
    )
    gradient = np.einsum("nij,nj->ni", fisher, vector)
    np.testing.assert_allclose(
        head.natural_gradient(outputs, gradient), vector, rtol=1e-6
    )


@pytest.mark.variants(12)
@each
def test_log_prob_and_score(density):
    head, outputs = density.head, density.outputs
    targets = head.sample(outputs, [1, 2])
    assert bool(head.targets_in_support(outputs, targets))
    for n, eta in enumerate(outputs):
        y = targets.numpy()[n]
        np.testing.assert_allclose(
            head.log_prob(outputs, targets)[n],
            density.log_prob(eta.astype(complex), y)[0].real,
            rtol=1e-9,
        )
        np.testing.assert_allclose(
            head.score(outputs, targets)[n],
            density.scores(eta, y)[:, 0],
            rtol=1e-7,
            atol=1e-9,
        )


@pytest.mark.variants(12)
@each
def test_samples_have_scores_of_mean_zero_and_covariance_fisher(density):
    """20 000 draws; five standard errors of the measured moments."""
    head, eta = density.head, density.outputs[0]
    outputs = np.tile(eta, (20_000, 1))
    scores = head.score(outputs, head.sample(outputs, [3, 4])).numpy()
    products = scores[:, :, None] * scores[:, None, :]
    for values, expected in (
        (scores, 0.0),
        (products, head.fisher(eta[None])[0]),
    ):
        error = values.std(axis=0) / np.sqrt(len(values))
        assert np.all(
            np.abs(values.mean(axis=0) - expected) <= 5 * error + 1e-9
        )


@pytest.mark.variants(12)
@each
def test_units_are_independent(density):
    """D units: all first parameters, then all second ones."""
    head, one = density.head, density.outputs
    both = np.concatenate(np.split(one.T, one.shape[1]), axis=1)  # [1, 2 K]
    fisher = head.fisher(both)[0].numpy()
    blocks = head.fisher(one).numpy()
    count = one.shape[1]
    for n in range(2):
        own = [2 * i + n for i in range(count)]
        np.testing.assert_allclose(fisher[np.ix_(own, own)], blocks[n])
        fisher[np.ix_(own, own)] = 0
    np.testing.assert_array_equal(fisher, 0)
    targets = head.sample(both, [0, 1])
    assert targets.shape == (1, 2)
    split = head.log_prob(one, tf.transpose(targets))
    np.testing.assert_allclose(
        head.log_prob(both, targets)[0], tf.reduce_sum(split), rtol=1e-9
    )
    head.validate(both.shape)


@pytest.mark.variants("normal_softplus")
@each
def test_every_product_compiles(density):
    head, outputs = density.head, tf.constant(density.outputs, tf.float32)
    targets = head.sample(outputs, [5, 6])

    def everything(outputs, targets):
        return (
            head.fisher(outputs),
            head.fisher_factor_product(outputs, outputs),
            head.fisher_factor_transpose_product(outputs, outputs),
            head.natural_gradient(outputs, outputs),
            head.score(outputs, targets),
        )

    compiled = tf.function(everything, jit_compile=True)(outputs, targets)
    for actual, expected in zip(
        compiled, everything(outputs, targets), strict=True
    ):
        np.testing.assert_allclose(actual, expected, rtol=2e-4, atol=2e-5)


@each
def test_extreme_outputs_in_float32(density):
    """10 000 draws over the whole range: finite and semidefinite."""
    rng = np.random.default_rng(0)
    shape = (10_000, density.outputs.shape[1])
    raw = rng.uniform(-13.8, 13.8, size=shape)  # exp: 1e-6 … 1e6
    if "log_variance" in density.links:
        raw[:, 1] *= 2
    big = rng.uniform(size=shape) < 0.3
    soft = np.array([link == "softplus" for link in density.links])
    raw = np.where(big & soft, np.exp(np.abs(raw)), raw)
    outputs = tf.constant(raw, tf.float32)
    fisher = density.head.fisher(outputs).numpy()
    assert np.all(np.isfinite(fisher))
    # In units of its own diagonal: the matrix must not be indefinite.
    root = np.sqrt(np.einsum("nii->ni", fisher))
    scale = np.where(root > 0, 1 / np.where(root > 0, root, 1), 0)
    normed = fisher * scale[:, :, None] * scale[:, None, :]
    assert np.linalg.eigvalsh(normed).min() > -1e-5
    vector = tf.ones_like(outputs)
    for product in (
        density.head.fisher_factor_product(outputs, vector),
        density.head.fisher_factor_transpose_product(outputs, vector),
    ):
        assert np.all(np.isfinite(product))


@each
def test_head_survives_saving(density):
    restored = keras.saving.deserialize_keras_object(
        keras.saving.serialize_keras_object(density.head)
    )
    assert restored == density.head
    assert repr(restored) == repr(density.head)


@pytest.mark.parametrize("support", SUPPORTS)
@pytest.mark.parametrize(
    "name", ["identity", "exp", "softplus", "log_variance", "sigmoid"]
)
def test_slope_is_the_derivative_of_the_coordinate(name, support):
    """Of the parameter, its logarithm or its logit."""
    kind = heads.links._NAMES[name]
    if support not in kind.supports:
        with pytest.raises(ValueError, match="`p` must be a fixed number, or"):
            get_link(name, "p", support)
        return
    link = get_link(name, "p", support)
    raw = tf.constant(np.linspace(0.05, 0.95, 9))
    with tf.GradientTape() as tape:
        tape.watch(raw)
        value = link.value(raw)
        coordinate = tf.math.log(value) if support == "positive" else value
    np.testing.assert_allclose(
        link.slope(raw), tape.gradient(coordinate, raw), rtol=1e-12
    )


def test_softplus_without_a_floor_does_not_underflow():
    link = heads.links.Softplus(floor=0.0)
    raw = tf.constant([-200.0, -20.0, 0.0, 20.0])
    expected = [1.0, 1.0, 0.5 / np.log(2), 1 / 20.0]
    np.testing.assert_allclose(link.slope(raw), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: heads.Normal(scale="sigmoid"), r"one of \['identity', 'exp'"),
        (lambda: heads.Normal(scale="sofplus"), "scale='sofplus'"),
        (lambda: heads.Gamma(-1.0), "`rate` must be a positive, finite number"),
        (lambda: heads.Geometric(1.5), "`probs` must be a number between 0"),
        (lambda: heads.Exponential(2.0), "no parameter left to predict"),
        (lambda: heads.Binomial(0), "integer of at least 1"),
        (lambda: heads.links.Softplus(-1.0), "`floor` must be a non-negative"),
        (lambda: heads.links.Softplus(np.inf), "Received: floor=inf"),
        (lambda: heads.Binomial(2.5), "Received: total_count=2.5"),
        (lambda: heads.Binomial("5"), "Received: total_count='5'"),
        (lambda: heads.Multinomial(2.5), "Received: total_count=2.5"),
        (lambda: heads.Multinomial(np.inf), "Received: total_count=inf"),
        (lambda: heads.NormalMixture(2.7), "Received: components=2.7"),
        (
            lambda: heads.NormalMixture(2, samples=2.5),
            "Received: samples=2.5",
        ),
        (
            lambda: heads.Distribution(print, samples=2.5),
            "Received: samples=2.5",
        ),
        (
            lambda: heads.Distribution(print, parameter_count=0),
            "Received: parameter_count=0",
        ),
        (
            lambda: heads.Normal().quantile([[0.0]], 1.5),
            "between 0 and 1. Received: probability=1.5",
        ),
        (lambda: heads.get(heads.Family), "one of the names"),
        (lambda: heads.get(heads.Head), "one of the names"),
        (lambda: heads.Gamma().validate((None, 3)), "a multiple of 2 units"),
        (lambda: heads.get("binomial"), "one of the names"),
        (lambda: heads.get(heads.Binomial), "needs arguments"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("head", "target", "message"),
    [
        (heads.Normal("softplus"), np.nan, "finite numbers"),
        (heads.LogNormal(), 0.0, "positive finite numbers"),
        (heads.Gamma(), -1.0, "positive finite numbers"),
        (heads.Exponential(), -1.0, "non-negative finite numbers"),
        (heads.Beta(), 1.0, "strictly between 0 and 1"),
        (heads.Poisson(), 1.5, "non-negative integers"),
        (heads.NegativeBinomial(), -1.0, "non-negative integers"),
        (heads.Binomial(3), 4.0, "integers from 0 to 3"),
    ],
)
def test_targets_outside_the_support(head, target, message):
    outputs = np.zeros([1, len(head.parameter_names)])
    with pytest.raises(ValueError, match=message):
        head.validate_targets(outputs, np.array([[target]]))


def test_predictions_become_means_deviations_and_quantiles():
    head, outputs = heads.Normal("exp"), np.array([[1.0, np.log(2.0)]])
    np.testing.assert_allclose(head.mean(outputs), [[1.0]])
    np.testing.assert_allclose(head.stddev(outputs), [[2.0]])
    np.testing.assert_allclose(
        head.quantile(outputs, 0.975), [[1.0 + 2.0 * 1.959964]], rtol=1e-6
    )


@keras.saving.register_keras_serializable(package="test_heads")
class Doubled(heads.links.Link):
    supports = ("real",)

    def value(self, raw):
        return 2.0 * raw

    def slope(self, raw):
        return 2.0 * tf.ones_like(raw)


@keras.saving.register_keras_serializable(package="test_heads")
class LinkedNormal(heads.Normal):
    """Normal targets with a link of the mean."""

    def __init__(self, loc="identity", scale=1.0):
        heads.Family.__init__(self, loc=loc, scale=scale)


def test_a_custom_link_of_a_real_parameter_is_saved():
    head = LinkedNormal(Doubled())
    restored = keras.saving.deserialize_keras_object(
        keras.saving.serialize_keras_object(head)
    )
    assert restored == head != LinkedNormal()
    np.testing.assert_allclose(restored.fisher([[0.5]]), [[[4.0]]])
    assert LinkedNormal().get_config() == {"scale": 1.0}
