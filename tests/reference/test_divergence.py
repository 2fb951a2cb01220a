"""The Fisher as the curvature of the divergence, and a published example.

A. Kristiadi, "Natural Gradient Descent": the Hessian of the Kullback–Leibler
divergence is F, its expansion `½ dᵀFd + O(‖d‖³)`, and a logistic regression
on two Gaussians, whose figures are found here again.
"""

import keras
import numpy as np
import pytest
import tensorflow as tf
import tensorflow_probability as tfp
from scipy.special import expit

import keras_natgrad as kng

HEADS = {
    "normal": (kng.heads.Normal(scale="softplus"), 2),
    "beta": (kng.heads.Beta(), 2),
    "gamma": (kng.heads.Gamma(), 2),
    "bernoulli": (kng.heads.Bernoulli(), 2),
    "categorical": (kng.heads.Categorical(), 4),
}


def outputs_of(count):
    return np.random.default_rng(1).normal(size=(3, count))


def divergence(head, outputs, others):
    """`KL(p_outputs ‖ p_others)` per example, by TensorFlow Probability."""
    first, second = map(head.distribution, (outputs, others))
    values = tfp.distributions.kl_divergence(
        first, second, allow_nan_stats=False
    )
    return tf.reduce_sum(tf.reshape(values, [len(outputs), -1]), axis=1)


@pytest.mark.parametrize(("head", "count"), HEADS.values(), ids=HEADS)
def test_hessian_of_the_divergence_is_the_fisher(head, count):
    outputs = tf.constant(outputs_of(count))
    with tf.GradientTape() as outer:
        outer.watch(outputs)
        with tf.GradientTape() as inner:
            inner.watch(outputs)
            fixed = tf.stop_gradient(outputs)
            total = tf.reduce_sum(divergence(head, fixed, outputs))
        slope = inner.gradient(total, outputs)
    hessian = outer.batch_jacobian(slope, outputs)
    np.testing.assert_allclose(slope, np.zeros((3, count)), atol=1e-12)
    np.testing.assert_allclose(
        hessian, head.fisher(outputs), rtol=1e-10, atol=1e-12
    )


@pytest.mark.parametrize(("head", "count"), HEADS.values(), ids=HEADS)
def test_remainder_of_the_divergence_is_cubic(head, count):
    """Slope 3 between steps of 0.02 and 0.01, in log-log."""
    outputs = outputs_of(count)
    direction = np.random.default_rng(2).normal(size=outputs.shape)
    fisher = head.fisher(outputs).numpy()
    remainders = []
    for size in (0.02, 0.01):
        d = size * direction
        model = 0.5 * np.einsum("nk,nkl,nl->n", d, fisher, d)
        exact = divergence(head, outputs, outputs + d).numpy()
        remainders.append(np.abs(exact - model))
    slopes = np.log2(remainders[0] / remainders[1])
    np.testing.assert_allclose(slopes, 3, atol=0.1)


# -- Logistic regression on two Gaussians --------------------------------

STEPS = 15


def two_gaussians():
    """150 of 200 points of N(±1, I), their labels and the first weights.

    The draws are those of the published script, so that its figures can be
    compared.
    """
    random = np.random.RandomState(9999)
    x = np.vstack([random.randn(100, 2) - 1, random.randn(100, 2) + 1])
    order = np.arange(200)
    random.shuffle(order)
    labels = np.repeat([0.0, 1.0], 100)
    start = 0.01 * random.randn(2)
    return x[order][:150], labels[order][:150], start


def scores(x, labels, w):
    """Gradients of the examples' negative log-likelihoods, `[N, 2]`."""
    return (expit(x @ w) - labels)[:, np.newaxis] * x


def true_fisher(x, labels, w):
    p = expit(x @ w)
    return x.T @ ((p * (1 - p))[:, np.newaxis] * x) / len(x)


METRICS = {
    "sgd": lambda *_: np.eye(2),
    "covariance": lambda *state: np.cov(scores(*state).T),
    "fisher": true_fisher,
}


def iterates(metric):
    """Weights after 0, 1, … steps of `w − M⁻¹ ∇` on the mean loss."""
    x, labels, w = two_gaussians()
    found = [w]
    for _ in range(STEPS):
        mean = scores(x, labels, w).mean(axis=0)
        w = w - np.linalg.solve(METRICS[metric](x, labels, w), mean)
        found.append(w)
    return np.array(found)


def summed_losses(ws):
    x, labels, _ = two_gaussians()
    z = ws @ x.T
    return np.sum(np.logaddexp(0, z) - labels * z, axis=1)


# Summed training loss after so many steps. The published script prints it
# before each step, so its line 15 is the loss after 14 steps.
TABLE_STEPS = (0, 1, 5, 6, 14)
TABLE = {
    "sgd": (105.51, 52.49, 36.09, 34.87, 30.74),
    "covariance": (105.51, 28.91, 27.90, 27.89, 27.89),
    "fisher": (105.51, 47.24, 27.90, 27.89, 27.89),
}


@pytest.mark.parametrize("metric", TABLE)
def test_table_of_losses(metric):
    losses = summed_losses(iterates(metric))[list(TABLE_STEPS)]
    np.testing.assert_allclose(losses, TABLE[metric], rtol=0, atol=0.005)


def test_rates_of_convergence():
    """Quadratic with the true Fisher, linear with the covariance."""
    x, labels, _ = two_gaussians()
    best = iterates("fisher")[-1]
    gradient = scores(x, labels, best).mean(axis=0)
    assert np.linalg.norm(gradient) < 1e-16
    errors = np.linalg.norm(iterates("fisher") - best, axis=1)
    ratios = errors[4:8] / errors[3:7] ** 2
    assert errors[3] > 0.5 and errors[7] < 1e-5
    assert np.all((0.3 < ratios) & (ratios < 0.6))
    errors = np.linalg.norm(iterates("covariance") - best, axis=1)
    ratios = errors[6:] / errors[5:-1]
    assert np.all((0.5 < ratios) & (ratios < 0.8))


@pytest.mark.parametrize("solver", ["kernel", "dense"])
@pytest.mark.usefixtures("float64")
def test_optimizer_makes_the_same_steps(solver):
    x, labels, start = two_gaussians()
    model = keras.Sequential(
        [keras.Input((2,)), keras.layers.Dense(1, use_bias=False)]
    )
    model.layers[0].kernel.assign(start[:, np.newaxis])
    optimizer = kng.NaturalGradient(1.0, damping=0.0, solver=solver)
    loss = keras.losses.BinaryCrossentropy(from_logits=True)
    model.compile(optimizer.attach(model), loss)
    for expected in iterates("fisher")[1:]:
        model.train_on_batch(x, labels[:, np.newaxis])
        found = np.ravel(model.layers[0].kernel)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-9)


# -- Adam ----------------------------------------------------------------


def one_step_of_adam(w):
    """The second moment, without its bias towards zero, and the step."""
    x, labels, _ = two_gaussians()
    model = keras.Sequential(
        [keras.Input((2,)), keras.layers.Dense(1, use_bias=False)]
    )
    kernel = model.layers[0].kernel
    kernel.assign(w[:, np.newaxis])
    # Powers of two, as Keras rounds these numbers to float32.
    optimizer = keras.optimizers.Adam(2.0**-7, 0.5, 0.5, epsilon=1e-12)
    model.compile(optimizer, keras.losses.BinaryCrossentropy(from_logits=True))
    model.train_on_batch(x, labels[:, np.newaxis])
    (second,) = (v for v in optimizer.variables if "velocity" in v.path)
    step = np.ravel(kernel) - w
    return np.ravel(second) / (1 - optimizer.beta_2), step


@pytest.mark.usefixtures("float64")
def test_second_moment_of_adam_is_not_a_diagonal_fisher():
    """It is the square of the mean gradient, and enters by its root.

    The text takes it for the Fisher "constrained to be diagonal". Near the
    solution it vanishes, while the diagonals of the Fisher and of the
    empirical Fisher do not; and the step is the sign of the gradient, not
    `∇ / v`.
    """
    x, labels, start = two_gaussians()
    for w in (start, iterates("fisher")[4]):
        mean = scores(x, labels, w).mean(axis=0)
        found, step = one_step_of_adam(w)
        np.testing.assert_allclose(found, mean**2, rtol=1e-9)
        np.testing.assert_allclose(step, -np.sign(mean) / 128, rtol=1e-6)
    empirical = np.mean(scores(x, labels, w) ** 2, axis=0)
    exact = np.diag(true_fisher(x, labels, w))
    assert np.all(found < 1e-2 * empirical)
    assert np.all(found < 1e-2 * exact)


def test_fisher_of_a_canonical_link_is_the_hessian():
    """F as "drop-in replacement": for logistic regression it is the Hessian.

    For networks it is not: tests/reference/test_pullback.py.
    """
    x, labels, start = two_gaussians()
    steps = 1e-5 * np.eye(2)
    numeric = [
        scores(x, labels, start + e).mean(0)
        - scores(x, labels, start - e).mean(0)
        for e in steps
    ]
    np.testing.assert_allclose(
        np.array(numeric) / 2e-5, true_fisher(x, labels, start), rtol=1e-8
    )
