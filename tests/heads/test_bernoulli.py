import keras
import numpy as np
import pytest

from keras_natgrad.heads import Bernoulli


def sigmoid(x):
    return 1.0 / (1.0 + np.exp(-x))


@pytest.mark.parametrize("from_logits", [True, False])
def test_soft_targets_mean_the_expected_log_probability(from_logits):
    logits = np.array([[0.3, -1.2], [2.0, 0.1]])
    p = sigmoid(logits)
    soft = np.array([[0.2, 1.0], [0.5, 0.9]])
    head = Bernoulli(from_logits=from_logits)
    outputs = logits if from_logits else p
    expected = np.sum(soft * np.log(p) + (1 - soft) * np.log(1 - p), axis=-1)
    np.testing.assert_allclose(head.log_prob(outputs, soft), expected)
    head.validate_targets(outputs, soft)
    slope = 1.0 if from_logits else 1.0 / (p * (1.0 - p))
    np.testing.assert_allclose(head.score(outputs, soft), (soft - p) * slope)


def test_small_fisher_of_large_logits_is_accurate():
    # 1 - σ(40) is zero in float32 if computed by subtraction.
    outputs = np.array([[40.0, -40.0]], np.float32)
    diagonal = np.diagonal(Bernoulli().fisher(outputs), axis1=-2, axis2=-1)
    np.testing.assert_allclose(diagonal, np.exp([[-40.0, -40.0]]), rtol=1e-5)


def test_probabilities_are_clipped_as_in_keras():
    epsilon = keras.config.epsilon()
    outputs, targets = np.array([[0.0, 1.0]]), np.array([[1.0, 0.0]])
    head = Bernoulli(from_logits=False)
    expected = -keras.losses.binary_crossentropy(targets, outputs) * 2.0
    np.testing.assert_allclose(head.log_prob(outputs, targets), expected)
    diagonal = np.diagonal(head.fisher(outputs), axis1=-2, axis2=-1)
    expected = 1.0 / (epsilon * (1.0 - epsilon))
    np.testing.assert_allclose(diagonal, np.full((1, 2), expected), rtol=1e-8)


@pytest.mark.parametrize("value", [-0.1, 1.1, np.nan])
def test_targets_must_be_probabilities(value):
    outputs, targets = np.zeros((1, 2)), np.array([[1.0, value]])
    assert not bool(Bernoulli().targets_in_support(outputs, targets))
    message = r"numbers in \[0, 1\]; map classes to 0 and 1. Received.*minimum"
    with pytest.raises(ValueError, match=message):
        Bernoulli().validate_targets(outputs, targets)


def test_labels_of_one_unit_may_be_flat_integers():
    outputs = np.zeros((3, 1))
    log_prob = Bernoulli().log_prob(outputs, np.array([0, 1, 1]))
    np.testing.assert_allclose(log_prob, np.full(3, np.log(0.5)))
