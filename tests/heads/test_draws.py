"""Draws and their scores, from which `fisher="sampled"` is made."""

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_probability as tfp

from keras_natgrad import heads

tfd, tfb = tfp.distributions, tfp.bijectors
COUNT = 20_000


def shifted(outputs):
    base = tfd.Normal(tf.zeros_like(outputs), tf.ones_like(outputs))
    return tfd.Independent(tfb.Shift(outputs)(base), 1)


def low_rank(outputs):
    diagonal = tf.constant([0.5, 2.0], outputs.dtype)
    return tfd.MultivariateNormalDiagPlusLowRank(
        outputs, diagonal, tf.ones([2, 1], outputs.dtype)
    )


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize(
    ("make", "size"), [(shifted, 1), (low_rank, 2)], ids=["shift", "low_rank"]
)
def test_scores_of_draws_forget_how_they_were_made(make, size, compiled):
    """Covariance F by 20 000 draws: six standard errors of the moments."""
    head = heads.Distribution(make)
    outputs = np.tile(0.3 * np.arange(1.0, size + 1), (COUNT, 1))
    outputs = tf.constant(outputs)

    def scores(outputs):
        by_head = head.score(outputs, head.sample(outputs, [1, 2]))
        drawn = head.distribution(outputs).sample(seed=[3, 4])
        return by_head, head.score(outputs, drawn)

    if compiled:
        scores = tf.function(scores)
    expected = heads.Distribution(make, samples=100_000).fisher(outputs[:1])[0]
    for found in scores(outputs):
        products = found.numpy()[:, :, None] * found.numpy()[:, None, :]
        error = products.std(axis=0) / np.sqrt(COUNT)
        difference = np.abs(products.mean(axis=0) - expected)
        assert np.all(difference <= 6 * error + 1e-9)


def test_draws_keep_the_pathwise_gradient():
    outputs = tf.constant([[0.3, -0.2]])
    with tf.GradientTape() as tape:
        tape.watch(outputs)
        draw = heads.Normal().sample(outputs, [0, 1])
    np.testing.assert_allclose(tape.gradient(draw, outputs), [[1.0, 1.0]])


BOUNDED = {
    "beta": (heads.Beta("exp", "exp"), 2),
    "dirichlet": (heads.Dirichlet("exp"), 3),
    "gamma": (heads.Gamma("exp", "exp"), 2),
    "inverse_gamma": (heads.InverseGamma("exp", "exp"), 2),
    "weibull": (heads.Weibull("exp", "exp"), 2),
}


@pytest.mark.parametrize(
    "jit_compile", [False, pytest.param(True, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("concentration", [0.3, 0.05, 0.005])
@pytest.mark.parametrize("name", BOUNDED)
def test_draws_of_small_concentrations(name, concentration, jit_compile):
    head, size = BOUNDED[name]
    outputs = tf.fill([COUNT, size], np.float32(np.log(concentration)))

    @tf.function(jit_compile=jit_compile)
    def draw(outputs):
        targets = head.sample(outputs, [1, 2])
        return (
            targets,
            head.log_prob(outputs, targets),
            head.score(outputs, targets),
        )

    targets, log_prob, score = draw(outputs)
    for value in (targets, log_prob, score):
        assert np.all(np.isfinite(value))
    if name != "dirichlet":
        assert bool(head.targets_in_support(outputs, targets))


@pytest.mark.parametrize(
    ("head", "loc"),
    [
        (heads.LogNormal("exp"), 0.0),
        (heads.LogitNormal("exp"), 0.0),
        (heads.Log1pNormal("exp"), 1.0),
    ],
)
def test_draws_of_large_scales(head, loc):
    outputs = np.tile(np.float32([loc, 5.0]), (COUNT, 1))
    targets = head.sample(outputs, [1, 2])
    assert bool(head.targets_in_support(outputs, targets))
    assert np.all(np.isfinite(head.score(outputs, targets)))


def test_clipping_leaves_other_draws_alone():
    outputs = np.tile(np.float32([0.5, 0.5]), (COUNT, 1))
    head = heads.Beta()
    plain = head.distribution(outputs).sample(seed=[1, 2])
    np.testing.assert_array_equal(head.sample(outputs, [1, 2]), plain)
