import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_natgrad import heads
from keras_natgrad.heads import LossWeight, from_loss
from keras_natgrad.losses import NegativeLogLikelihood

REDUCTIONS = [
    None,
    "none",
    "sum",
    "mean",
    "sum_over_batch_size",
    "mean_with_sample_weight",
]
SHAPES = {2: (4, 3), 3: (4, 5, 3)}
RNG = np.random.default_rng(0)


def softmax(x):
    return np.exp(x) / np.sum(np.exp(x), axis=-1, keepdims=True)


def sigmoid(x):
    return 1.0 / (1.0 + np.exp(-x))


def data(loss, shape, from_logits):
    """Outputs and targets for a loss of the name `loss`."""
    outputs = RNG.normal(size=shape)
    if loss == "MeanSquaredError":
        return outputs, RNG.normal(size=shape)
    if loss == "BinaryCrossentropy":
        outputs = outputs if from_logits else sigmoid(outputs)
        return outputs, RNG.uniform(size=shape).round()
    outputs = outputs if from_logits else softmax(outputs)
    labels = RNG.integers(0, shape[-1], size=shape[:-1])
    if loss == "CategoricalCrossentropy":
        return outputs, np.eye(shape[-1])[labels]
    return outputs, labels


LOSSES = [
    ("MeanSquaredError", {}),
    ("BinaryCrossentropy", {"from_logits": True}),
    ("BinaryCrossentropy", {"from_logits": False}),
    ("CategoricalCrossentropy", {"from_logits": True}),
    ("CategoricalCrossentropy", {"from_logits": False}),
    ("SparseCategoricalCrossentropy", {"from_logits": True}),
    ("SparseCategoricalCrossentropy", {"from_logits": False}),
]
SAMPLE_WEIGHTS = {
    (2, "none"): None,
    (2, "examples"): RNG.uniform(0.5, 2.0, size=(4,)),
    (2, "column"): RNG.uniform(0.5, 2.0, size=(4, 1)),
    (3, "none"): None,
    (3, "examples"): RNG.uniform(0.5, 2.0, size=(4, 1)),
    (3, "positions"): RNG.uniform(0.5, 2.0, size=(4, 5)),
}

all_losses = pytest.mark.parametrize(
    ("name", "options"),
    LOSSES,
    ids=[
        f"{name}-{options.get('from_logits', '')}" for name, options in LOSSES
    ],
)


def weighted_sum(loss, outputs, targets, sample_weight=None, mask=None):
    """The loss from its head and weight."""
    head, weight = from_loss(loss, outputs.shape)
    log_prob = head.log_prob(outputs, targets)
    if isinstance(head, heads.Normal):
        # The constant: without it, -log_prob is the squared error.
        log_prob += 0.5 * outputs.shape[-1] * np.log(np.pi)
    coefficients = weight.coefficients(outputs, sample_weight, mask)
    assert coefficients.shape == outputs.shape[:-1]
    return np.sum(coefficients * -log_prob)


@all_losses
@pytest.mark.parametrize(
    "weights", SAMPLE_WEIGHTS, ids=lambda w: f"{w[0]}d-{w[1]}"
)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_loss_is_the_weighted_sum_of_log_probabilities(
    name, options, weights, reduction
):
    loss = getattr(keras.losses, name)(
        **options, reduction=reduction, dtype="float64"
    )
    outputs, targets = data(
        name, SHAPES[weights[0]], options.get("from_logits")
    )
    sample_weight = SAMPLE_WEIGHTS[weights]
    expected = np.sum(loss(targets, outputs, sample_weight))
    actual = weighted_sum(loss, outputs, targets, sample_weight)
    np.testing.assert_allclose(actual, expected, rtol=1e-12)


@all_losses
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_loss_of_masked_outputs(name, options, reduction):
    loss = getattr(keras.losses, name)(
        **options, reduction=reduction, dtype="float64"
    )
    outputs, targets = data(name, SHAPES[3], options.get("from_logits"))
    mask = RNG.uniform(size=(4, 5)) < 0.6
    sample_weight = SAMPLE_WEIGHTS[3, "positions"]
    masked = keras.ops.convert_to_tensor(outputs)
    masked._keras_mask = keras.ops.convert_to_tensor(mask)
    expected = np.sum(loss(targets, masked, sample_weight))
    actual = weighted_sum(loss, outputs, targets, sample_weight, mask)
    np.testing.assert_allclose(actual, expected, rtol=1e-12)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_loss_that_ignores_a_class(reduction):
    loss = keras.losses.SparseCategoricalCrossentropy(
        from_logits=True, ignore_class=-1, reduction=reduction, dtype="float64"
    )
    outputs, labels = data("SparseCategoricalCrossentropy", SHAPES[3], True)
    labels[1, 2:] = -1
    mask = from_loss(loss)[1].target_mask(outputs, labels)
    np.testing.assert_array_equal(mask, labels >= 0)
    possible = np.maximum(labels, 0)
    actual = weighted_sum(loss, outputs, possible, mask=mask)
    expected = np.sum(loss(labels, outputs))
    np.testing.assert_allclose(actual, expected, rtol=1e-12)


@pytest.mark.parametrize(
    "name", ["BinaryCrossentropy", "CategoricalCrossentropy"]
)
def test_label_smoothing_changes_the_targets_only(name):
    loss = getattr(keras.losses, name)(
        from_logits=True, label_smoothing=0.1, dtype="float64"
    )
    plain = getattr(keras.losses, name)(from_logits=True)
    assert from_loss(loss) == from_loss(plain)
    outputs, targets = data(name, SHAPES[2], True)
    classes = 2 if name == "BinaryCrossentropy" else 3
    smooth = 0.9 * targets + 0.1 / classes
    np.testing.assert_allclose(
        weighted_sum(loss, outputs, smooth), loss(targets, outputs), rtol=1e-12
    )


@all_losses
@pytest.mark.parametrize("reduction", ["none", "sum", "sum_over_batch_size"])
def test_a_gradient_step_of_fit(name, options, reduction, float64):
    # With reduction "none", fit() differentiates the sum of the losses.
    loss = getattr(keras.losses, name)(**options, reduction=reduction)
    outputs, targets = data(name, SHAPES[2], options.get("from_logits"))
    sample_weight = SAMPLE_WEIGHTS[2, "examples"]
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    model.layers[0].set_weights([outputs, np.zeros(3)])
    model.compile(keras.optimizers.SGD(1.0), loss=loss, run_eagerly=True)
    # The inputs are unit vectors: the kernel rows are the outputs.
    model.train_on_batch(np.eye(4), targets, sample_weight)
    head, weight = from_loss(loss, outputs.shape)
    coefficients = weight.coefficients(outputs, sample_weight)
    ascent = coefficients[:, None] * head.score(outputs, targets)
    actual = model.layers[0].get_weights()[0] - outputs
    np.testing.assert_allclose(actual, ascent, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_negative_log_likelihood(reduction):
    head = heads.Normal(scale=0.2)
    loss = NegativeLogLikelihood(head, reduction, dtype="float64")
    found, weight = from_loss(loss, (None, 3))
    assert found is head
    assert weight == LossWeight(reduction, units="sum")
    outputs, targets = data("MeanSquaredError", SHAPES[3], None)
    coefficients = weight.coefficients(outputs)
    actual = np.sum(coefficients * -head.log_prob(outputs, targets))
    expected = np.sum(loss(targets, outputs))
    np.testing.assert_allclose(actual, expected, rtol=1e-12)


@pytest.mark.parametrize("name", ["mae", "poisson", "kl_divergence"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradient_is_the_weighted_score(name, reduction):
    """Losses that are log-densities up to a constant of the targets."""
    rng = np.random.default_rng(1)
    outputs = rng.uniform(0.1, 1.0, size=(6, 4))
    targets = rng.integers(0, 5, size=(6, 4)).astype(float)
    if name == "kl_divergence":
        outputs /= outputs.sum(axis=1, keepdims=True)
        targets = rng.dirichlet(np.ones(4), size=6)
    loss = {
        "mae": keras.losses.MeanAbsoluteError,
        "poisson": keras.losses.Poisson,
        "kl_divergence": keras.losses.KLDivergence,
    }[name](reduction=reduction, dtype="float64")
    head, weight = from_loss(loss, outputs.shape)
    with tf.GradientTape() as tape:
        variable = tf.constant(outputs)
        tape.watch(variable)
        value = loss(targets, variable)
    gradient = tape.gradient(value, variable).numpy()
    score = head.score(outputs, targets).numpy()
    if name == "kl_divergence":
        # The head normalises: its score has no part that scales the outputs.
        gradient -= np.sum(gradient * outputs, axis=1, keepdims=True)
        score -= np.sum(score * outputs, axis=1, keepdims=True)
    coefficients = weight.coefficients(outputs).numpy()
    np.testing.assert_allclose(
        gradient, -coefficients[:, None] * score, rtol=1e-5, atol=1e-9
    )
