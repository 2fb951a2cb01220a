"""Absolute errors, whose loss leaves the scale of the distribution open."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_natgrad as kng
from keras_natgrad.training.loss_heads import choose
from tests.training.networks import assert_close, compiled, weights


def problem(size=256):
    """A smooth function of two features, and a network that can fit it."""
    rng = np.random.default_rng(0)
    x = rng.uniform(-1, 1, size=(size, 2)).astype(keras.config.floatx())
    y = np.sin(3 * x[:, :1]) * np.cos(2 * x[:, 1:])
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((2,)),
            keras.layers.Dense(16, activation="tanh"),
            keras.layers.Dense(1),
        ]
    )
    return x, y, model


@pytest.mark.parametrize("reduction", ["sum", "sum_over_batch_size"])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_term_is_the_loss_at_the_scale_of_the_errors(
    reduction, weighted, float64
):
    """Gradient: that of Keras. Fisher: `c / s`, s the mean absolute error."""
    rng = np.random.default_rng(0)
    outputs, targets = tf.constant(rng.normal(size=(2, 6, 3)))
    sample_weight = rng.uniform(0.5, 2, size=6) if weighted else None
    if weighted:
        sample_weight[2] = 0.0
    loss = keras.losses.MeanAbsoluteError(reduction=reduction)
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(outputs)
        value = loss(targets, outputs, sample_weight)
        term = choose(loss, "y", None, (None, 3)).term(
            outputs, targets, sample_weight, None
        )
        negative = -tf.reduce_sum(
            term.coefficients * term.head.log_prob(term.outputs, term.targets)
        )
    np.testing.assert_allclose(
        tape.gradient(negative, outputs), tape.gradient(value, outputs), 1e-12
    )
    # The Fisher in the outputs themselves: that of the term, twice scaled.
    scale = tape.gradient(term.outputs, outputs)[0, 0]
    fisher = term.coefficients[:, None] * tf.linalg.diag_part(
        term.head.fisher(term.outputs)
    )
    c = np.ones(6) if sample_weight is None else sample_weight
    c = c / (3 * (1 if reduction == "sum" else len(c)))
    errors = np.abs(targets - outputs).mean(axis=1)
    s = (c * errors).sum() / c.sum()
    np.testing.assert_allclose(
        fisher * scale**2, np.repeat(c[:, None] / s, 3, axis=1), 1e-12
    )


def test_a_masked_error_that_is_not_finite_does_not_count(float64):
    outputs, targets = np.zeros((4, 1)), np.ones((4, 1))
    targets[1] = np.nan
    choice = choose(keras.losses.MeanAbsoluteError(), "y", None, (None, 1))
    term = choice.term(
        tf.constant(outputs),
        tf.constant(targets),
        None,
        tf.constant([True, False, True, True]),
    )
    assert np.all(np.isfinite(term.coefficients))


def test_exact_fits_are_finite():
    x, y, model = problem()
    model.compile(kng.KFAC().attach(model), "mae", run_eagerly=True)
    perfect = model.predict(x, verbose=0)
    for _ in range(3):
        model.train_on_batch(x, perfect)
    assert all(np.all(np.isfinite(each)) for each in weights(model))


def test_training_converges():
    """With a scale of one the loss bounced: steps did not get shorter."""
    x, y, model = problem()
    compiled(model, loss="mae", run_eagerly=False)
    losses = [model.train_on_batch(x, y) for _ in range(150)]
    model.reset_metrics()
    last = [float(model.evaluate(x, y, verbose=0))]
    for _ in range(3):
        model.train_on_batch(x, y)
        last.append(float(model.evaluate(x, y, verbose=0)))
    assert max(last) < 0.08 * float(losses[0])


def test_the_unit_of_the_targets_does_not_matter(float64):
    """Outputs and targets in a thousandth of the unit: the same steps."""
    x, y, _ = problem()
    found = []
    for unit in (1.0, 1000.0):
        _, _, model = problem()
        scaled = keras.Sequential(
            [model, keras.layers.Rescaling(unit, dtype="float64")]
        )
        compiled(scaled, kng.KFAC(block="kronecker"), "mae")
        for _ in range(5):
            scaled.train_on_batch(x, unit * y)
        found.append(weights(scaled))
    assert_close(*found, 1e-6, 1e-9)
