"""Which Fisher matrix a head of any distribution takes, and of which `make`."""

import keras
import numpy as np
import pytest
import tensorflow as tf
import tensorflow_probability as tfp

import keras_natgrad
from keras_natgrad import heads

tfd, tfb = tfp.distributions, tfp.bijectors


def laplace(outputs):
    return tfd.Laplace(outputs[..., 0], tf.exp(outputs[..., 1]))


def laplaces(outputs):
    loc, raw = tf.split(outputs, 2, axis=-1)
    return tfd.Independent(tfd.Laplace(loc, tf.exp(raw)), 1)


def laplace_beside_normal(outputs):
    return tfd.Blockwise(
        [laplace(outputs), tfd.Normal(outputs[..., 0], tf.exp(outputs[..., 1]))]
    )


def uniform(outputs):
    return tfd.Uniform(outputs[..., 0], outputs[..., 0] + 1.0)


def shifted(outputs):
    zero = tf.zeros_like(outputs[..., 0])
    bijector = tfb.Chain(
        [tfb.Shift(outputs[..., 0]), tfb.Scale(tf.exp(outputs[..., 1]))]
    )
    return bijector(tfd.Normal(zero, tf.ones_like(zero)))


def johnson(outputs):
    one = tf.ones_like(outputs[..., 0])
    return tfd.JohnsonSU(
        0.3 * one, one, outputs[..., 0], tf.exp(outputs[..., 1])
    )


def kumaraswamy(outputs):
    return tfd.Kumaraswamy(*(tf.exp(o) for o in tf.unstack(outputs, axis=-1)))


def log_normal_by_bijector(outputs):
    base = tfd.Normal(outputs[..., 0], tf.exp(outputs[..., 1]))
    two = tf.constant(2.0, outputs.dtype)
    return tfb.Chain([tfb.Exp(), tfb.Scale(two)])(base)


ETA = np.array([0.3, -0.4])


@pytest.mark.parametrize("make", [laplace, laplaces])
def test_laplace_has_its_fisher_matrix_by_scores(make):
    """diag(1/scale², 1), by 20 000 draws: five standard errors."""
    head = heads.Distribution(make, samples=20_000)
    assert head.fisher_method(2) == "monte_carlo"
    scale = np.exp(ETA[1])
    expected = np.diag([scale**-2, 1.0])
    # The score's square in log scale, (|z| − 1)², has the variance 8.
    error = np.array([[1e-9, scale**-1], [scale**-1, np.sqrt(8.0)]])
    found = head.fisher(ETA[None])[0].numpy()
    assert np.all(np.abs(found - expected) <= 5 * error / np.sqrt(20_000))


@pytest.mark.parametrize(
    "make",
    [laplace_beside_normal, uniform, shifted, johnson, kumaraswamy],
)
def test_divergences_that_are_no_fisher_matrix_are_not_taken(make):
    head = heads.Distribution(make)
    assert head.fisher_method(2) == "monte_carlo"
    with pytest.raises(ValueError, match=r"allows the methods \['monte_carlo'"):
        heads.Distribution(make, method="kl_divergence").fisher(ETA[None])


def test_a_fixed_bijector_keeps_the_divergence_of_the_base():
    head = heads.Distribution(log_normal_by_bijector)
    assert head.fisher_method(2) == "kl_divergence"
    known = heads.Normal("exp").fisher(ETA[None])
    np.testing.assert_allclose(head.fisher(ETA[None]), known, rtol=1e-10)


def test_transformed_outputs_have_a_fisher_matrix_by_scores():
    """diag(1/scale², 2), by 20 000 draws: five standard errors."""
    head = heads.Distribution(shifted, samples=20_000)
    scale = np.exp(ETA[1])
    # Variances of the squares of z, of z (z² − 1) and of (z² − 1)².
    error = np.array(
        [
            [np.sqrt(2.0) / scale**2, np.sqrt(10.0) / scale],
            [np.sqrt(10.0) / scale, np.sqrt(56.0)],
        ]
    )
    found = head.fisher(ETA[None])[0].numpy()
    expected = np.diag([scale**-2, 2.0])
    assert np.all(np.abs(found - expected) <= 5 * error / np.sqrt(20_000))


@pytest.mark.variants("laplace")
@pytest.mark.parametrize("make", [laplace, shifted])
def test_they_train(make):
    x = np.random.default_rng(0).normal(size=(128, 3)).astype("float32")
    y = (x[:, 0] + np.random.default_rng(1).normal(size=128)).astype("float32")
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    loss = keras_natgrad.losses.NegativeLogLikelihood(heads.Distribution(make))
    optimizer = keras_natgrad.KFAC().attach(model)
    model.compile(optimizer, loss, run_eagerly=True)
    history = model.fit(x, y, batch_size=64, epochs=5, verbose=0)
    values = history.history["loss"]
    assert np.all(np.isfinite(values)) and values[-1] < values[0]


CONSTANT, VARIABLE = tf.constant(0.5), tf.Variable(0.5, name="outside")
WIDE = tf.constant(0.5, tf.float64)


@pytest.mark.parametrize(
    "scale", [CONSTANT, VARIABLE], ids=["constant", "variable"]
)
def test_make_may_close_over_tensors(scale):
    head = heads.Distribution(lambda o: tfd.Normal(o[..., 0], scale))
    head.validate((None, 1))
    outputs = tf.zeros([3, 1])
    np.testing.assert_allclose(head.fisher(outputs), np.full([3, 1, 1], 4.0))
    compiled = tf.function(head.fisher)
    np.testing.assert_allclose(compiled(outputs), np.full([3, 1, 1], 4.0))


def test_make_may_hold_float64_constants():
    head = heads.Distribution(lambda o: tfd.Normal(o[..., 0], WIDE))
    head.validate((None, 1))
    fisher = head.fisher(np.zeros([3, 1]))
    np.testing.assert_allclose(fisher, np.full([3, 1, 1], 4.0), rtol=1e-12)


def test_joint_head_of_float64_constants():
    wide = heads.Distribution(lambda o: tfd.Normal(o[..., 0], WIDE))
    head = heads.Joint([wide, "normal"], [1, 1])
    found = head.log_prob(np.zeros([2, 2]), np.zeros([2, 2]))
    np.testing.assert_allclose(found, -np.log(2 * np.pi) + np.log(2.0))


def test_a_mistake_in_make_is_shown_as_it_is():
    def make(outputs):
        raise TypeError("my mistake")

    with pytest.raises(TypeError, match="my mistake"):
        heads.Distribution(make).validate((None, 1))


@pytest.mark.parametrize(
    "make",
    [
        lambda o: tfd.JointDistributionSequential(
            [tfd.Normal(o[..., 0], 1.0), tfd.Normal(o[..., 1], 1.0)]
        ),
        lambda o: tfd.JointDistributionNamed({"a": tfd.Normal(o[..., 0], 1.0)}),
    ],
    ids=["sequential", "named"],
)
def test_distributions_of_several_tensors_are_refused(make):
    with pytest.raises(ValueError, match="of one tensor, not of several"):
        heads.Distribution(make).validate((None, 2))
    with pytest.raises(ValueError, match="of one tensor, not of several"):
        heads.Joint([heads.Distribution(make)], [2])


def test_make_is_inspected_once_for_each_size():
    calls = []

    def make(outputs):
        calls.append(outputs.shape)
        return tfd.Independent(tfd.Normal(outputs, 1.0), 1)

    head = heads.Distribution(make)
    for _ in range(5):
        head.validate((None, 2))
        assert head.factor_rank(2) == 2
        assert head.fisher_method(2) == "kl_divergence"
    assert len(calls) == 2  # Two distributions of different outputs.
    assert head.fisher_method(3) == "kl_divergence"
    assert len(calls) == 4
