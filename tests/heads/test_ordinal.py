"""Ordered classes; their Fisher matrix is in the contract's tests."""

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_probability as tfp

from keras_natgrad import heads


def test_two_classes_are_a_bernoulli_distribution():
    outputs = np.random.default_rng(0).normal(size=(5, 1))
    ordered, bernoulli = heads.OrderedLogistic(), heads.Bernoulli()
    np.testing.assert_allclose(
        ordered.fisher(outputs), bernoulli.fisher(outputs), rtol=1e-12
    )
    for label in (0, 1):
        np.testing.assert_allclose(
            ordered.log_prob(outputs, np.full([5], label)),
            bernoulli.log_prob(outputs, np.full([5, 1], float(label))),
            rtol=1e-12,
        )


def test_log_prob_is_that_of_tensorflow_probability():
    cutpoints, outputs = [-1.0, 0.5, 3.0], np.linspace(-3, 3, 4)[:, None]
    head, labels = heads.OrderedLogistic(cutpoints), np.arange(4)
    known = tfp.distributions.OrderedLogistic(
        np.array(cutpoints), outputs[:, 0]
    )
    for targets in (labels, labels[:, None], np.eye(4)):
        np.testing.assert_allclose(
            head.log_prob(outputs, targets), known.log_prob(labels), rtol=1e-10
        )


def test_narrow_classes_far_from_the_location_in_float32():
    """Differences of sigmoids would be zero: p = σ(θ) σ(−θ) Δ."""
    cutpoints = [30.0, 30.0 + 1e-4]
    head = heads.OrderedLogistic(cutpoints)
    outputs = tf.constant([[0.0], [60.0]], tf.float32)
    expected = np.log(np.diff(cutpoints)) - 30.0
    np.testing.assert_allclose(
        head.log_prob(outputs, [1, 1]), np.tile(expected, 2), rtol=1e-5
    )
    # The scores of the inner class are ±1, those of the likely one nearly 0.
    np.testing.assert_allclose(
        head.score(outputs, [1, 1]), [[1.0], [-1.0]], rtol=1e-5
    )
    # F = p_0 σ(−θ)² + (1 − p_0) σ(θ)² with p_0 = σ(30), and mirrored.
    np.testing.assert_allclose(
        head.fisher(outputs)[:, 0, 0], np.full(2, np.exp(-30.0)), rtol=1e-4
    )


@pytest.mark.parametrize("increment", ["softplus", "exp"])
def test_predicted_cutpoints_agree_with_given_ones(increment):
    raw = np.array([0.3, -0.5, 1.0])
    link = heads.links.get_link(increment, "increment", "positive")
    steps = link.value(tf.constant(raw[1:])).numpy()
    given = heads.OrderedLogistic([0.0, *np.cumsum(steps)])
    head = heads.OrderedLogistic(increment=increment)
    labels = np.arange(4)
    np.testing.assert_allclose(
        head.log_prob(np.tile(raw, (4, 1)), labels),
        given.log_prob(np.full([4, 1], raw[0]), labels),
        rtol=1e-10,
    )
    np.testing.assert_allclose(
        head.fisher(raw[None])[0, 0, 0],
        given.fisher(raw[None, :1])[0, 0, 0],
        rtol=1e-10,
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: heads.OrderedLogistic([1.0, 1.0]), "increasing numbers"),
        (lambda: heads.OrderedLogistic([]), "increasing numbers"),
        (lambda: heads.OrderedLogistic([0.0, np.nan]), "increasing numbers"),
        (lambda: heads.OrderedLogistic(increment="sigmoid"), "`increment`"),
        (
            lambda: heads.OrderedLogistic([0.0]).validate((None, 2)),
            "one output, the location",
        ),
        (
            lambda: heads.OrderedLogistic().validate_targets(
                np.zeros([1, 3]), np.array([4])
            ),
            r"integer labels in \[0, 4\)",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
