import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_natgrad.heads import Categorical

LOGITS = np.random.default_rng(0).normal(size=(2, 3, 4))
LABELS = np.array([[0, 3, 1], [2, 2, 0]])


def log_softmax(x):
    return x - np.log(np.sum(np.exp(x), axis=-1, keepdims=True))


@pytest.mark.parametrize("dtype", ["int32", "uint8", "float32"])
@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("form", ["labels", "trailing axis", "one-hot"])
def test_forms_of_targets(form, sparse, dtype):
    head = Categorical(sparse=sparse)
    one_hot = np.eye(4)[LABELS]
    targets = {
        "labels": LABELS,
        "trailing axis": LABELS[..., None],
        "one-hot": one_hot,
    }[form].astype(dtype)
    expected = np.sum(one_hot * log_softmax(LOGITS), axis=-1)
    np.testing.assert_allclose(head.log_prob(LOGITS, targets), expected)
    expected = one_hot - np.exp(log_softmax(LOGITS))
    np.testing.assert_allclose(head.score(LOGITS, targets), expected)
    head.validate_targets(LOGITS, targets)


@pytest.mark.parametrize("total", [1.0, 0.7])
def test_soft_targets_mean_the_expected_log_probability(total):
    soft = np.random.default_rng(1).uniform(size=(2, 3, 4))
    soft = total * soft / np.sum(soft, axis=-1, keepdims=True)
    head = Categorical()
    expected = np.sum(soft * log_softmax(LOGITS), axis=-1)
    np.testing.assert_allclose(head.log_prob(LOGITS, soft), expected)
    by_autodiff = super(Categorical, head).score(LOGITS, soft)
    np.testing.assert_allclose(head.score(LOGITS, soft), by_autodiff)
    assert bool(head.targets_in_support(LOGITS, soft)) == (total == 1.0)


def test_sample_has_the_form_that_sparse_says():
    labels = Categorical().sample(LOGITS, [0, 0])
    assert labels.shape == (2, 3)
    assert labels.dtype.is_integer
    rows = Categorical(sparse=False).sample(LOGITS, [0, 0])
    assert rows.shape == (2, 3, 4)
    np.testing.assert_array_equal(np.sort(rows, -1)[..., -1], np.ones((2, 3)))
    np.testing.assert_array_equal(np.sum(rows, -1), np.ones((2, 3)))


@pytest.mark.parametrize("from_logits", [True, False])
def test_null_direction_is_mapped_to_zero(from_logits):
    head = Categorical(from_logits=from_logits)
    outputs = LOGITS if from_logits else np.exp(LOGITS)
    null = np.ones_like(LOGITS) if from_logits else outputs
    product = head.fisher_vector_product(outputs, null)
    np.testing.assert_allclose(product, np.zeros_like(LOGITS), atol=1e-14)
    step = head.natural_gradient(outputs, null)
    np.testing.assert_allclose(step, np.zeros_like(LOGITS), atol=1e-12)


def test_fisher_on_the_simplex_is_the_inverse_of_the_probabilities():
    p = np.exp(log_softmax(LOGITS))
    tangent = np.random.default_rng(2).normal(size=p.shape)
    tangent -= np.mean(tangent, axis=-1, keepdims=True)
    product = Categorical(from_logits=False).fisher_vector_product(p, tangent)
    form = np.sum(tangent * product, axis=-1)
    np.testing.assert_allclose(form, np.sum(tangent**2 / p, axis=-1))


def test_probability_head_after_a_softmax_is_the_logits_head():
    # Jᵀ F_p J = F_logits with the Jacobian J = diag(p) - p pᵀ of the softmax.
    p = np.exp(log_softmax(LOGITS))
    jacobian = np.eye(4) * p[..., None, :] - p[..., :, None] * p[..., None, :]
    fisher = Categorical(from_logits=False).fisher(p).numpy()
    np.testing.assert_allclose(
        jacobian @ fisher @ jacobian, Categorical().fisher(LOGITS), atol=1e-14
    )


def test_impossible_probabilities_are_clipped_as_in_keras():
    outputs, label = np.array([[1.0, 0.0, 0.0]]), np.array([1])
    log_prob = Categorical(from_logits=False).log_prob(outputs, label)
    loss = keras.losses.sparse_categorical_crossentropy(label, outputs)
    np.testing.assert_allclose(log_prob, -loss, rtol=1e-6)
    np.testing.assert_allclose(log_prob, [np.log(1e-7)], rtol=1e-6)


@pytest.mark.parametrize("label", [-1, 4])
def test_label_outside_of_the_classes(label):
    head, labels = Categorical(), np.array([[0, 1, 2], [3, label, 0]])
    log_prob = head.log_prob(LOGITS, labels).numpy()
    assert log_prob[1, 1] == -np.inf
    assert np.sum(np.isfinite(log_prob)) == 5
    assert np.all(np.isfinite(head.score(LOGITS, labels)))
    assert not bool(head.targets_in_support(LOGITS, labels))
    low, high = min(label, 0), max(label, 3)
    message = (
        r"integer labels in \[0, 4\), or one-hot.*Received: targets of shape "
        rf"\(2, 3\) and dtype int64 with minimum {low} and maximum {high}"
    )
    with pytest.raises(ValueError, match=message):
        head.validate_targets(LOGITS, labels)


@pytest.mark.parametrize(
    "targets",
    [
        LABELS + 0.5,
        np.full((2, 3), np.nan),
        np.full((2, 3, 4), 0.5),
        np.tile([2.0, -1.0, 0.0, 0.0], (2, 3, 1)),
    ],
    ids=["fraction", "nan", "sum is not one", "negative"],
)
def test_impossible_targets(targets):
    assert not bool(Categorical().targets_in_support(LOGITS, targets))
    with pytest.raises(ValueError, match="nonnegative numbers that sum to 1"):
        Categorical().validate_targets(LOGITS, targets)


def test_targets_of_another_shape_are_an_error():
    message = r"one-hot rows of shape \(2, 3, 4\). Received: targets.shape"
    for method in (Categorical().log_prob, Categorical().score):
        with pytest.raises(ValueError, match=message):
            method(LOGITS, np.zeros((2, 3, 5)))


def test_one_class_is_an_error():
    with pytest.raises(ValueError, match=r"at least two.*Bernoulli.*\(None, 1"):
        Categorical().validate((None, 1))
    assert Categorical().validate(tf.TensorShape([None, 2])) is None
    assert Categorical().validate((None, None)) is None
