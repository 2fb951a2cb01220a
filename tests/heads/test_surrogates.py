"""Surrogates of losses, against their Fisher written out in NumPy."""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_natgrad import heads
from keras_natgrad.heads import from_loss
from keras_natgrad.heads.surrogates import find_surrogate

N, K = 5, 3
losses = keras.losses
RNG = np.random.default_rng(0)
LOGITS = 1.5 * RNG.normal(size=(N, K))
BINARY = RNG.integers(0, 2, size=(N, K)).astype(float)
ONE_HOT = np.eye(K)[RNG.integers(0, K, size=N)]
REAL = RNG.normal(size=(N, K))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def softmax(x):
    return np.exp(x) / np.exp(x).sum(axis=-1, keepdims=True)


def diagonal(values):
    """Block of every example: `[N, K]` to `[N, K, N, K]`."""
    full = np.zeros((N, K, N, K))
    for n, k in np.ndindex(N, K):
        full[n, k, n, k] = values[n, k]
    return full


def blocks(matrices):
    """`[N, K, K]` to `[N, K, N, K]`."""
    full = np.zeros((N, K, N, K))
    for n in range(N):
        full[n, :, n] = matrices[n]
    return full


def hinge(outputs, power):
    """Bernoulli with the log-odds ℓ(−1) − ℓ(1) of the loss itself."""

    def log_odds(f):
        negative, positive = np.maximum(1 + f, 0), np.maximum(1 - f, 0)
        return negative**power - positive**power

    step = 1e-6
    slope = (log_odds(outputs + step) - log_odds(outputs - step)) / (2 * step)
    p = sigmoid(log_odds(outputs))
    return diagonal(slope**2 * p * (1 - p) / (N * K))


def focal_weight(p, gamma):
    """Weight of the cross-entropy's Fisher, p of the true class.

    The score of the focal loss over that of the cross-entropy, squared, over
    the focal factor; both scores by central differences.
    """
    h = 1e-6 * np.minimum(p, 1 - p)

    def slope(loss):
        return (loss(p + h) - loss(p - h)) / (2 * h)

    focal = slope(lambda p: -((1 - p) ** gamma) * np.log(p))
    return (focal / slope(lambda p: -np.log(p))) ** 2 / (1 - p) ** gamma


def binary_focal(p, targets, slope=1.0, gamma=2.0, balance=False):
    true = np.where(targets == 1, p, 1 - p)
    weight = focal_weight(true, gamma)
    if balance:
        weight = weight * np.where(targets == 1, 0.25, 0.75)
    return diagonal(weight * slope**2 / (p * (1 - p)) / (N * K))


def categorical(p, weight, from_logits=True):
    for_logits = np.einsum("nk,kj->nkj", p, np.eye(K)) - np.einsum(
        "nk,nj->nkj", p, p
    )
    if not from_logits:  # ∂z/∂p = 1/p.
        for_logits = for_logits / p[:, :, None] / p[:, None, :]
    return blocks(weight[:, None, None] * for_logits / N)


def overlap(p, share):
    return diagonal(share / (p * (1 - p)))


def cosine(outputs):
    norm = np.linalg.norm(outputs, axis=1)[:, None]
    u = outputs / norm
    tangent = np.eye(K) - np.einsum("nk,nj->nkj", u, u)
    return blocks(tangent / norm[:, :, None] ** 2 / N)


P, SOFT = sigmoid(LOGITS), softmax(LOGITS)
MISSED = 1 - (SOFT * ONE_HOT).sum(axis=1)
CASES = {
    "hinge": (losses.Hinge, {}, LOGITS, BINARY, lambda: hinge(LOGITS, 1)),
    "squared_hinge": (
        losses.SquaredHinge,
        {},
        LOGITS,
        2 * BINARY - 1,
        lambda: hinge(LOGITS, 2),
    ),
    "focal": (
        losses.BinaryFocalCrossentropy,
        {},
        P,
        BINARY,
        lambda: binary_focal(P, BINARY),
    ),
    "focal_logits": (
        losses.BinaryFocalCrossentropy,
        {"from_logits": True, "gamma": 1.5, "apply_class_balancing": True},
        LOGITS,
        BINARY,
        lambda: binary_focal(P, BINARY, P * (1 - P), 1.5, balance=True),
    ),
    "categorical_focal": (
        losses.CategoricalFocalCrossentropy,
        {},
        SOFT,
        ONE_HOT,
        lambda: categorical(
            SOFT, 0.25 * focal_weight(1 - MISSED, 2.0), from_logits=False
        ),
    ),
    "categorical_focal_logits": (
        losses.CategoricalFocalCrossentropy,
        {"from_logits": True, "gamma": 1.0, "alpha": [0.2, 0.3, 0.5]},
        LOGITS,
        ONE_HOT,
        lambda: categorical(
            SOFT, ONE_HOT @ [0.2, 0.3, 0.5] * focal_weight(1 - MISSED, 1.0)
        ),
    ),
    "categorical_hinge": (
        losses.CategoricalHinge,
        {},
        LOGITS,
        ONE_HOT,
        lambda: categorical(SOFT, np.ones(N)),
    ),
    "dice": (losses.Dice, {}, P, BINARY, lambda: overlap(P, 1 / (N * K))),
    "tversky": (
        losses.Tversky,
        {"alpha": 0.3},
        P,
        BINARY,
        lambda: overlap(P, 1 / (N * K)),
    ),
    "mape": (
        losses.MeanAbsolutePercentageError,
        {},
        LOGITS,
        REAL,
        lambda: diagonal(100 / REAL**2 / (N * K)),
    ),
    "cosine": (
        losses.CosineSimilarity,
        {},
        LOGITS,
        REAL,
        lambda: cosine(LOGITS),
    ),
}
each = pytest.mark.parametrize("name", CASES)


def fisher(loss, outputs, targets, **weights):
    """`Jᵀ diag(c F) J` at the outputs, from the surrogate's own parts."""
    surrogate = find_surrogate(loss, outputs.shape)
    variable = tf.Variable(outputs)
    with tf.GradientTape() as tape:
        parameters, c = surrogate.term(
            tf.convert_to_tensor(variable), targets, **weights
        )
    jacobian = tape.jacobian(parameters, variable).numpy()
    size = parameters.shape[-1]
    jacobian = jacobian.reshape(-1, size, outputs.size)
    own = surrogate.head.fisher(parameters).numpy().reshape(-1, size, size)
    own = own * c.numpy().reshape(-1, 1, 1)
    flat = np.einsum("pia,pij,pjb->ab", jacobian, own, jacobian)
    return flat.reshape(*outputs.shape, *outputs.shape)


def case(name, **options):
    make, own, outputs, targets, expected = CASES[name]
    loss = make(**own, **options, dtype="float64")
    return loss, outputs, targets, expected


@each
def test_fisher(name):
    loss, outputs, targets, expected = case(name)
    np.testing.assert_allclose(
        fisher(loss, outputs, targets), expected(), rtol=1e-7, atol=1e-12
    )


@each
def test_weights_and_the_reduction_scale_it(name):
    loss, outputs, targets, expected = case(name)
    weights = np.linspace(0.5, 2.0, N)
    scale = weights[:, None, None, None]
    if name in ("dice", "tversky"):  # One number for the whole batch.
        scale = weights.mean()
    np.testing.assert_allclose(
        fisher(loss, outputs, targets, sample_weight=weights),
        scale * expected(),
        rtol=1e-6,
        atol=1e-12,
    )
    loss, outputs, targets, expected = case(name, reduction="sum")
    scale = 1 if name in ("dice", "tversky") else N
    np.testing.assert_allclose(
        fisher(loss, outputs, targets),
        scale * expected(),
        rtol=1e-7,
        atol=1e-12,
    )


def test_overlap_of_every_example():
    """With an axis the loss has one value per example, each a mean share."""
    loss = losses.Dice(axis=1, dtype="float64")
    weights = np.linspace(0.5, 2.0, N)
    np.testing.assert_allclose(
        fisher(loss, P, BINARY, sample_weight=weights),
        overlap(P, weights[:, None] / (N * K)),
        rtol=1e-9,
    )


@pytest.mark.parametrize("name", ["focal", "categorical_focal", "cosine"])
def test_another_axis(name):
    """The transposed problem with `axis=1` has the transposed Fisher."""
    make, own, outputs, targets, _ = CASES[name]
    outputs = np.stack([outputs, outputs[::-1]], axis=1)  # [N, 2, K]
    targets = np.stack([targets, targets], axis=1)
    last = fisher(make(**own, dtype="float64"), outputs, targets)
    other = fisher(
        make(**own, axis=1, dtype="float64"),
        outputs.transpose(0, 2, 1),
        targets.transpose(0, 2, 1),
    )
    np.testing.assert_allclose(
        other.transpose(0, 2, 1, 3, 5, 4), last, rtol=1e-9, atol=1e-15
    )


def test_frames_of_ctc():
    """Each frame is one categorical; the loss sums over the frames."""
    outputs = RNG.normal(size=(2, 4, K))
    targets = np.array([[1, 2], [2, 0]])
    weights = np.array([0.5, 2.0])
    found = fisher(losses.CTC(), outputs, targets, sample_weight=weights)
    expected = np.zeros(found.shape)
    p = softmax(outputs)
    for n, t in np.ndindex(2, 4):
        one = np.diag(p[n, t]) - np.outer(p[n, t], p[n, t])
        expected[n, t, :, n, t] = weights[n] / 2 * one
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-15)


def test_cosine_is_the_normal_likelihood_of_directions():
    loss, outputs, targets, _ = case("cosine")
    unit = targets / np.linalg.norm(targets, axis=1, keepdims=True)
    parameters, c = find_surrogate(loss).term(tf.constant(outputs), targets)
    found = -np.sum(c * heads.Normal(1.0).log_prob(parameters, unit))
    constant = 0.5 * K * np.log(2 * np.pi) + 1
    np.testing.assert_allclose(found - constant, loss(targets, outputs))


def test_relative_errors_are_the_laplace_likelihood():
    loss, outputs, targets, _ = case("mape")
    parameters, c = find_surrogate(loss).term(tf.constant(outputs), targets)
    relative = np.sign(targets)
    found = -np.sum(c * heads.Laplace(1.0).log_prob(parameters, relative))
    constant = 100 * np.log(2)
    np.testing.assert_allclose(found - constant, loss(targets, outputs))


@pytest.mark.parametrize(
    ("loss", "head"),
    [
        ("hinge", heads.Bernoulli()),
        ("mape", heads.Laplace(1.0)),
        (losses.dice, heads.Bernoulli(from_logits=False)),
        (losses.CTC, heads.Categorical(sparse=False)),
        (
            functools.partial(
                losses.binary_focal_crossentropy, from_logits=True
            ),
            heads.Bernoulli(),
        ),
        (losses.CosineSimilarity(), heads.Normal(1.0)),
    ],
)
def test_forms_of_a_loss(loss, head):
    assert find_surrogate(loss).head == head
    with pytest.raises(ValueError, match="No head is known for the loss"):
        from_loss(loss)


@pytest.mark.parametrize("loss", ["mse", losses.Circle(), lambda y, p: p, None])
def test_losses_without_a_surrogate(loss):
    assert find_surrogate(loss) is None
