"""Factor and solver together, against a NumPy pseudo-inverse."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from scipy.special import expit

import keras_natgrad as kng
from keras_natgrad.solvers import ConjugateGradient
from tests.reference.bridge import mlp, network_of
from tests.training.networks import weights

# 24 parameters of a 3-3-3 network, 20 of a 3-3-2 network; N to fit.
SIZES = {"categorical": 3, "normal": 2, "mean and scale": 2}
EXAMPLES = {"fewer": 4, "equal": None, "more": 30}
FLOOR = 1e-6
SEED = 6


def output_fisher(name, outputs):
    """F_η of every example, `[N, K, K]`, from its definition."""
    if name == "categorical":
        shifted = np.exp(outputs - outputs.max(axis=1, keepdims=True))
        p = shifted / shifted.sum(axis=1, keepdims=True)
        return np.einsum("nk,kl->nkl", p, np.eye(3)) - np.einsum(
            "nk,nl->nkl", p, p
        )
    if name == "normal":
        return np.tile(np.eye(2), (len(outputs), 1, 1))
    scale = np.log1p(np.exp(outputs[:, 1])) + FLOOR
    slope = expit(outputs[:, 1])
    result = np.zeros((len(outputs), 2, 2))
    result[:, 0, 0] = scale**-2
    result[:, 1, 1] = 2 * (slope / scale) ** 2
    return result


def output_gradient(name, outputs, y):
    """The gradient of each example's loss in its outputs, `[N, K]`."""
    if name == "categorical":
        shifted = np.exp(outputs - outputs.max(axis=1, keepdims=True))
        return shifted / shifted.sum(axis=1, keepdims=True) - np.eye(3)[y]
    if name == "normal":
        return outputs - y
    scale = np.log1p(np.exp(outputs[:, 1])) + FLOOR
    slope = expit(outputs[:, 1])
    error = (outputs[:, 0] - y[:, 0]) / scale
    return np.stack([error / scale, (1 - error**2) * slope / scale], axis=1)


def loss_of(name):
    if name == "categorical":
        return keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    if name == "normal":
        return kng.losses.NegativeLogLikelihood(kng.heads.Normal(1.0))
    head = kng.heads.Normal("softplus")
    return kng.losses.NegativeLogLikelihood(head)


def flat(model):
    values = weights(model)
    rows = [
        np.vstack(values[i : i + 2]).ravel() for i in range(0, len(values), 2)
    ]
    return np.concatenate(rows)


@pytest.mark.variants(20)
@pytest.mark.parametrize("solver", ["kernel", "dense", "cg"])
@pytest.mark.parametrize("damping", [0.0, 1e-3, 1.0])
@pytest.mark.parametrize("deficient", [False, True])
@pytest.mark.parametrize("columns", EXAMPLES)
@pytest.mark.parametrize("name", SIZES)
def test_step_equals_numpy(name, columns, deficient, damping, solver, float64):
    units = SIZES[name]
    model = mlp([3, 3, units])
    size = model.count_params()
    examples = EXAMPLES[columns] or size // units
    generator = np.random.default_rng(SEED)
    x = generator.normal(size=(examples, 3))
    if deficient:  # Every example twice, and a feature that repeats another.
        x[1::2] = x[: len(x[1::2])]
        x[:, 2] = x[:, 0]
    y = generator.normal(size=(examples, 2 if name == "normal" else 1))
    if name == "categorical":
        y = generator.integers(0, 3, examples)
    trace = network_of(model.layers).trace(x)
    jacobian = np.concatenate(
        [
            trace.parameter_jacobian(index).reshape(examples, units, -1)
            for index in range(2)
        ],
        axis=2,
    )
    outputs = trace.outputs[0][:, 0]
    fisher = np.einsum(
        "nka,nkl,nlb->ab", jacobian, output_fisher(name, outputs), jacobian
    )
    gradient = np.einsum(
        "nk,nka->a", output_gradient(name, outputs, y), jacobian
    )
    fisher, gradient = fisher / examples, gradient / examples
    if damping == 0:
        inverse = np.linalg.pinv(fisher, rcond=1e-10, hermitian=True)
    else:
        inverse = np.linalg.inv(fisher + damping * np.eye(size))
    if solver == "cg":
        if damping == 0:
            pytest.skip("conjugate gradients have no pseudo-inverse")
        solver = ConjugateGradient(500, 0.0, 0.0)
    elif damping == 0:
        kinds = {"kernel": kng.solvers.Kernel, "dense": kng.solvers.Dense}
        solver = kinds[solver](cutoff=1e-10)
    before = flat(model)
    optimizer = kng.NaturalGradient(1.0, damping, solver).attach(model)
    model.compile(optimizer, loss_of(name), run_eagerly=True)
    model.train_on_batch(x, y)
    step = inverse @ gradient
    # Both sides solve with F, and so lose the digits of its condition number,
    # which is above 1e7 in few of the cases without damping.
    values = np.linalg.eigvalsh(fisher) + damping
    condition = values[-1] / values[values > 1e-10 * values[-1]][0]
    tolerance = max(1e-8, 4 * np.finfo("float64").eps * condition)
    assert tolerance < 1e-6
    error = np.abs(before - flat(model) - step).max() / np.abs(step).max()
    assert error < tolerance


@pytest.mark.parametrize("name", SIZES)
def test_single_precision(name):
    """The same step in float32, to 1e-3 at a damping of 0.01."""
    results = []
    for policy in ("float32", "float64"):
        keras.config.set_dtype_policy(policy)
        keras.config.set_floatx(policy)
        model = mlp([3, 3, SIZES[name]])
        generator = np.random.default_rng(6)
        x = generator.normal(size=(8, 3))
        y = generator.normal(size=(8, 2 if name == "normal" else 1))
        if name == "categorical":
            y = generator.integers(0, 3, 8)
        optimizer = kng.NaturalGradient(1.0, 0.01, "kernel").attach(model)
        model.compile(optimizer, loss_of(name), run_eagerly=True)
        before = flat(model)
        model.train_on_batch(tf.constant(x, policy), y)
        results.append(before - flat(model))
    scale = np.abs(results[1]).max()
    assert results[0].dtype == np.float32
    np.testing.assert_allclose(*results, 0, 1e-3 * scale)
