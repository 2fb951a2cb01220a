"""Networks of convolutions: their Fisher, and training with it."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from scipy.linalg import block_diag

import keras_natgrad as kng
from keras_natgrad.capture import linear_maps
from tests.reference.bridge import randomize

pytestmark = pytest.mark.usefixtures("float64")

L = keras.layers
SCALE = 0.7


def images(count=3, size=4, channels=2):
    rng = np.random.default_rng(0)
    return rng.normal(size=(count, size, size, channels))


def network(*layers, size=4, channels=2):
    model = keras.Sequential([keras.Input((size, size, channels)), *layers])
    randomize(model)
    return model


def definition(model, x):
    """`1/(N P) Σ JᵀJ / σ²` of each matrix, by the Jacobian of the outputs.

    Of a layer with groups the blocks of its groups. P counts positions.
    """
    blocks = []
    with tf.GradientTape(persistent=True) as tape:
        outputs = model(x)
    count = np.prod(outputs.shape[:-1])
    for layer in model.layers:
        for spec in linear_maps(layer):
            values = [variable.value for variable in spec.variables]
            jacobians = [
                tf.reshape(j, [tf.size(outputs), *value.shape])
                for j, value in zip(
                    # Vectorisation knows no grouped convolutions.
                    tape.jacobian(outputs, values, experimental_use_pfor=False),
                    values,
                    strict=True,
                )
            ]
            rows = np.stack(
                [
                    spec.layout.to_matrix([j[i] for j in jacobians])
                    for i in range(tf.size(outputs))
                ]
            )
            groups = spec.layout.groups or 1
            rows = rows.reshape(len(rows), groups, -1) / SCALE
            blocks.append(
                block_diag(*np.einsum("aki,akj->kij", rows, rows)) / count
            )
    return blocks


def found(model, x, approximation, **kwargs):
    head = kng.heads.Normal(scale=SCALE)
    operators = kng.fisher(model, x, head, approximation, **kwargs)
    return [operator.to_dense().numpy() for operator in operators.values()]


def assert_blocks(blocks, expected):
    for one, other in zip(blocks, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-8, atol=1e-11)


def differ(block, expected):
    distance = np.linalg.norm(block - expected)
    return distance > 1e-2 * np.linalg.norm(expected)


@pytest.mark.parametrize(
    "layer",
    [
        L.Conv2D(2, 2, activation="tanh"),
        L.Conv2D(4, 2, strides=2, groups=2, padding="same", activation="tanh"),
        L.DepthwiseConv2D(2, depth_multiplier=2, activation="tanh"),
        L.SeparableConv2D(3, 2, activation="tanh"),
        L.Conv2DTranspose(2, 2, strides=2, activation="tanh"),
    ],
    ids=lambda layer: layer.name,
)
def test_full_block_is_a_block_of_the_dense_fisher(layer):
    """Per-example Jacobians by brute force."""
    layer = type(layer).from_config({**layer.get_config(), "dtype": "float64"})
    model = network(layer, L.GlobalAveragePooling2D(), L.Dense(2))
    x = images()
    expected = definition(model, x)
    assert_blocks(found(model, x, "full"), expected)
    diagonals = [np.diag(np.diag(block)) for block in expected]
    assert_blocks(found(model, x, "diagonal"), diagonals)


# Eschenhagen et al. 2023, propositions 1 and 2: linear networks whose outputs
# are positions, or the mean over positions.
@pytest.mark.variants("positions-True", "mean-True")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("pool", [False, True], ids=["positions", "mean"])
def test_the_right_weight_sharing_is_exact(bias, pool):
    layers = [
        L.Conv2D(3, 2, padding="same", use_bias=bias),
        L.Conv2D(2, 1, use_bias=bias),
    ]
    if pool:
        layers += [L.GlobalAveragePooling2D(), L.Dense(2, use_bias=bias)]
    model, x = network(*layers), images(4)
    right, wrong = ("reduce", "expand") if pool else ("expand", "reduce")
    expected = definition(model, x)
    assert_blocks(found(model, x, "kfac", weight_sharing=right), expected)
    other = found(model, x, "kfac", weight_sharing=wrong)
    assert differ(other[0], expected[0])


def test_bias_of_a_transposed_convolution_is_exact():
    """Under both ways of sharing: its cotangents are summed over positions."""
    layer = L.Conv2DTranspose(2, 2, strides=2)
    model = network(layer, L.GlobalAveragePooling2D(), L.Dense(2))
    x = images()
    expected = definition(model, x)[1]
    for sharing in ("expand", "reduce"):
        blocks = found(model, x, "kfac", weight_sharing=sharing)
        np.testing.assert_allclose(blocks[1], expected, rtol=1e-9, atol=1e-12)


def convolutional():
    return network(
        L.Conv2D(4, 3, padding="same", activation="tanh"),
        L.SeparableConv2D(4, 2, strides=2, activation="tanh"),
        L.GlobalAveragePooling2D(),
        L.Dense(3),
        size=5,
    )


def labelled(count=24):
    x = images(count, 5)
    return x, (x[:, :, :3].sum((1, 2)) @ [1.0, -1.0] > 0).astype(int) + 1


def trained(optimizer, steps, **options):
    x, y = labelled()
    model = convolutional()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer.attach(model), loss, **options)
    losses = [float(model.train_on_batch(x, y)) for _ in range(steps)]
    return losses, [np.asarray(v) for v in model.trainable_variables]


@pytest.mark.slow
@pytest.mark.parametrize(
    "jit_compile", [False, pytest.param(True, marks=pytest.mark.slow)]
)
def test_modes_agree(jit_compile):
    """Eager, in a graph and compiled."""
    losses, eager = trained(kng.KFAC(), 2, run_eagerly=True)
    others, values = trained(
        kng.KFAC(), 2, run_eagerly=False, jit_compile=jit_compile
    )
    np.testing.assert_allclose(others, losses, rtol=1e-7)
    for one, other in zip(values, eager, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("weight_sharing", ["expand", "reduce"])
def test_kfac_trains(weight_sharing):
    optimizer = kng.KFAC(weight_sharing=weight_sharing)
    losses, _ = trained(optimizer, 30, run_eagerly=False, jit_compile=False)
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.variants("kernel")
@pytest.mark.parametrize("solver", ["kernel", "dense"])
def test_natural_gradient_is_the_damped_solve(solver):
    """One step on a convolution alone, whose Fisher is one block."""
    x = images(3, 3)
    y = np.random.default_rng(1).normal(size=(3, 2, 2, 2))
    model = network(L.Conv2D(2, 2), size=3)
    (spec,) = linear_maps(model.layers[0])
    values = [v.value for v in spec.variables]
    with tf.GradientTape() as tape:
        loss = keras.losses.MeanSquaredError()(y, model(x))
    gradient = spec.layout.to_matrix(tape.gradient(loss, values))
    before = spec.layout.to_matrix([tf.identity(v) for v in values])
    # Both units of the mean squared error have the scale one.
    fisher = SCALE**2 * definition(model, x)[0]
    optimizer = kng.NaturalGradient(1.0, 0.05, solver).attach(model)
    model.compile(optimizer, "mse", run_eagerly=True)
    model.train_on_batch(x, y)
    step = np.linalg.solve(
        fisher + 0.05 * np.eye(len(fisher)), np.ravel(gradient)
    )
    after = spec.layout.to_matrix(values)
    np.testing.assert_allclose(
        np.ravel(after), np.ravel(before) - step, rtol=1e-8, atol=1e-10
    )


def test_natural_gradient_trains_a_convolutional_network():
    optimizer = kng.NaturalGradient(0.5, 0.1, "kernel")
    losses, _ = trained(optimizer, 5, run_eagerly=False, jit_compile=False)
    assert losses[-1] < 0.8 * losses[0]
