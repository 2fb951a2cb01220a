"""Whole K-FAC steps in float64 equal a NumPy reference, step after step."""

import dataclasses

import keras
import numpy as np
import pytest

import keras_natgrad as kng
from tests.reference.bridge import (
    dense_layers,
    matrix_of,
    mlp,
    network_of,
    randomize,
)
from tests.reference.heads import Term
from tests.reference.kfac import (
    LevenbergMarquardt,
    ReferenceKFAC,
    Settings,
)

pytestmark = pytest.mark.usefixtures("float64")

RTOL = 1e-9
BATCH = 6
MODEL_RULE = LevenbergMarquardt(
    relative=0.5,
    decay=0.75,
    period=2,
    minimum=1e-6,
    maximum=1e6,
    inverse_ratio=0.5,
)
DEFAULTS = Settings(
    learning_rate=None, momentum=None, damping=MODEL_RULE, factor_decay=0.75
)


def make_optimizer(settings, **kwargs):
    """The optimizer with every option stated, from the reference's options."""
    rule = settings.damping
    if isinstance(rule, LevenbergMarquardt):
        rule = kng.LevenbergMarquardt(
            initial="auto", **dataclasses.asdict(settings.damping)
        )
    rate, momentum = settings.learning_rate, settings.momentum
    momentum = "auto" if momentum is None else momentum
    if settings.spring:
        momentum = kng.Spring(settings.spring)
    options = dict(
        learning_rate="auto" if rate is None else rate,
        momentum=momentum,
        damping=rule,
        fisher="exact",
        factor_decay=settings.factor_decay,
        curvature_update_period=settings.curvature_period,
        inverse_update_period=settings.inverse_period,
        quadratic_model=kng.QuadraticModel(
            "exact", settings.model_period, settings.model_decay
        ),
        damping_split="layer",
        refresh_growth=None,
        norm_constraint=settings.norm_constraint,
        block="auto" if settings.feature_scaled else "kronecker",
        weight_sharing=settings.weight_sharing,
        max_factor_size=4096,
        weight_decay=settings.weight_decay,
    )
    return kng.KFAC(**{**options, **kwargs})


def mean_squared_error(targets, weights):
    """The term of "mse": N(η, ½), averaged over all but the example."""
    targets = targets.reshape(len(targets), -1, targets.shape[-1])
    _, positions, units = targets.shape
    coefficients = np.broadcast_to(
        weights[:, np.newaxis] / (len(targets) * positions * units),
        (len(targets), positions),
    )
    return Term("normal", coefficients, targets, scale=0.5**0.5)


def binary_crossentropy(targets, weights):
    units = targets.shape[-1]
    coefficients = weights[:, np.newaxis] / (len(targets) * units)
    return Term("bernoulli", coefficients, targets[:, np.newaxis])


def sparse_categorical_crossentropy(labels, weights, classes=3):
    coefficients = weights[:, np.newaxis] / len(labels)
    return Term(
        "categorical", coefficients, np.eye(classes)[labels][:, np.newaxis]
    )


LOSSES = {
    "mse": ("mse", mean_squared_error),
    "bernoulli": (
        keras.losses.BinaryCrossentropy,
        binary_crossentropy,
    ),
    "categorical": (
        keras.losses.SparseCategoricalCrossentropy,
        sparse_categorical_crossentropy,
    ),
}


def make_targets(rng, loss, units, positions=None, batch=BATCH):
    shape = (batch, units) if positions is None else (batch, positions, units)
    if loss == "mse":
        return rng.normal(size=shape)
    if loss == "bernoulli":
        return rng.integers(0, 2, size=shape).astype(float)
    return rng.integers(0, units, size=batch)


def compiled_loss(loss):
    found = LOSSES[loss][0]
    return found if isinstance(found, str) else found(from_logits=True)


def assert_same_weights(model, reference):
    for layer, matrix in zip(
        dense_layers(model), reference.network.matrices, strict=True
    ):
        error = np.linalg.norm(matrix_of(layer) - matrix)
        assert error <= RTOL * np.linalg.norm(matrix), layer.name


def check_steps(
    model,
    settings,
    loss,
    steps=4,
    sample_weight=False,
    eager=True,
    units=1.0,
    batch=BATCH,
    **kwargs,
):
    """Trains both on the same batches and compares after every step."""
    rng = np.random.default_rng(1)
    for layer in dense_layers(model):
        if settings.l2_kernel:
            layer.kernel.regularizer = keras.regularizers.L2(settings.l2_kernel)
        if settings.l2_bias:
            layer.bias.regularizer = keras.regularizers.L2(settings.l2_bias)
    optimizer = make_optimizer(settings, **kwargs).attach(model)
    model.compile(
        optimizer,
        loss=compiled_loss(loss),
        run_eagerly=eager,
        jit_compile=False,
    )
    reference = ReferenceKFAC(network_of(model.layers), settings)
    positions = model.input_shape[1] if len(model.input_shape) == 3 else None
    if len(model.output_shape) == 2:
        output_positions = None
    else:
        output_positions = positions
    # Similar batches, so that no step looks as if it had gone wrong.
    base = units * rng.normal(size=(batch, *model.input_shape[1:]))
    y = make_targets(rng, loss, model.output_shape[-1], output_positions, batch)
    for _ in range(steps):
        x = base + 0.1 * units * rng.normal(size=base.shape)
        w = rng.uniform(0.2, 2.0, size=batch) if sample_weight else None
        term = LOSSES[loss][1](y, np.ones(batch) if w is None else w)
        model.train_on_batch(x, y, sample_weight=w)
        reference.step(x, [term])
        assert_same_weights(model, reference)
        statistics = optimizer.statistics
        np.testing.assert_allclose(
            statistics["damping"], reference.damping, rtol=1e-8
        )
        np.testing.assert_allclose(
            [statistics["learning_rate"], statistics["momentum"]],
            reference.coefficients,
            rtol=1e-7,
        )
        assert statistics["failures"] == statistics["retries"] == 0
    return optimizer, reference


@pytest.mark.variants("mse")
@pytest.mark.parametrize("loss", LOSSES)
def test_everything_automatic(loss):
    settings = dataclasses.replace(DEFAULTS)
    optimizer, reference = check_steps(mlp([3, 4, 3]), settings, loss, steps=5)
    assert reference.ratio is not None
    np.testing.assert_allclose(
        optimizer.statistics["reduction_ratio"], reference.ratio, rtol=1e-6
    )


def test_fixed_rate_fixed_momentum_constant_damping():
    settings = Settings(0.3, 0.8, 0.25, factor_decay=0.75)
    check_steps(mlp([3, 4, 2], "sigmoid"), settings, "mse")


def test_plain_natural_gradient_without_momentum_and_memory():
    settings = Settings(1.0, 0.0, 0.5, factor_decay=0.0)
    check_steps(mlp([3, 4, 2], bias=False), settings, "mse")


@pytest.mark.parametrize(
    ("rate", "momentum"),
    [(None, 0.5), (0.4, None), (None, 0.0)],
    ids=["auto_rate", "auto_momentum", "auto_rate_no_momentum"],
)
def test_one_coefficient_from_the_model(rate, momentum):
    settings = Settings(rate, momentum, 0.25, factor_decay=0.75)
    check_steps(mlp([3, 4, 3]), settings, "categorical")


@pytest.mark.variants("fixed")
@pytest.mark.parametrize(
    ("rate", "damping", "eager"),
    [(0.3, 0.25, True), (None, MODEL_RULE, True), (0.3, MODEL_RULE, False)],
    ids=["fixed", "automatic", "traced"],
)
def test_spring(rate, damping, eager):
    """`φ = P (∇ + λ μ φ₋₁)`, λ being that of the inverse P in use."""
    settings = Settings(
        rate, 0.0, damping, 0.75, spring=0.8, inverse_period=2, l2_kernel=0.0625
    )
    check_steps(mlp([3, 4, 3]), settings, "categorical", 6, eager=eager)


def test_spring_with_a_full_block_is_that_of_the_natural_gradient():
    """One linear layer: its Fisher is that of the network, and constant."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(BATCH, 8)), rng.normal(size=(BATCH, 2))
    models = [mlp([8, 2]) for _ in range(2)]
    models[1].set_weights(models[0].get_weights())
    optimizers = [
        kng.NaturalGradient(0.3, 0.05, "dense", momentum=kng.Spring(0.8)),
        kng.KFAC(0.3, kng.Spring(0.8), 0.05, block="full", fisher="exact"),
    ]
    for model, optimizer in zip(models, optimizers, strict=True):
        model.compile(optimizer.attach(model), "mse", run_eagerly=True)
    for _ in range(5):
        # More parameters than residuals: directions that only μ reaches.
        for model in models:
            model.train_on_batch(x, y)
        for a, b in zip(*(m.get_weights() for m in models), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-9)


def test_periods():
    settings = dataclasses.replace(
        DEFAULTS, curvature_period=2, inverse_period=3
    )
    check_steps(mlp([3, 4, 3]), settings, "categorical", steps=7)


@pytest.mark.parametrize("rate", [None, 0.3], ids=["auto", "fixed"])
def test_weight_decay_is_decoupled(rate):
    settings = dataclasses.replace(
        DEFAULTS, learning_rate=rate, weight_decay=0.125, damping=0.25
    )
    check_steps(mlp([3, 4, 3]), settings, "categorical")


@pytest.mark.parametrize("rate", [None, 0.3], ids=["auto", "fixed"])
def test_regularizers_of_kernel_and_bias(rate):
    settings = dataclasses.replace(
        DEFAULTS, learning_rate=rate, l2_kernel=0.0625, l2_bias=0.03125
    )
    check_steps(mlp([3, 4, 3]), settings, "categorical")


@pytest.mark.parametrize("rate", [None, 0.3], ids=["auto", "fixed"])
def test_norm_constraint(rate):
    settings = Settings(
        rate, 0.5, 0.0625, factor_decay=0.75, norm_constraint=0.0078125
    )
    check_steps(mlp([3, 4, 3]), settings, "categorical")


@pytest.mark.variants("automatic-expand", "l2-reduce")
@pytest.mark.parametrize("weight_sharing", ["expand", "reduce"])
@pytest.mark.parametrize(
    "settings",
    [
        DEFAULTS,
        dataclasses.replace(DEFAULTS, l2_kernel=0.0625, l2_bias=0.03125),
        Settings(0.3, 0.0, 0.25, 0.75, spring=0.8, inverse_period=2),
    ],
    ids=["automatic", "l2", "spring"],
)
def test_damping_in_the_units_of_the_features(settings, weight_sharing):
    settings = dataclasses.replace(
        settings, feature_scaled=(0,), weight_sharing=weight_sharing
    )
    model = mlp([4, 3, 2], positions=3)
    units = np.array([1.0, 30.0, 0.01, 1.0])
    _, reference = check_steps(model, settings, "mse", units=units)
    assert reference.metrics[0].min() < 1e-6
    assert reference.metrics[0].max() == 1.0


@pytest.mark.slow
def test_averaged_quadratic_model():
    settings = dataclasses.replace(
        DEFAULTS, damping=1.0, model_period=2, model_decay=0.4
    )
    references = []
    for decay in (0.0, 0.4):
        settings = dataclasses.replace(settings, model_decay=decay)
        keras.utils.set_random_seed(0)
        _, reference = check_steps(mlp([3, 4, 3]), settings, "mse", 45)
        references.append(reference)
    plain, averaged = (r.network.matrices[0] for r in references)
    assert not np.allclose(plain, averaged, rtol=1e-6)


@pytest.mark.variants("eager-None-mse")
@pytest.mark.parametrize("loss", ["mse", "bernoulli"])
@pytest.mark.parametrize("momentum", [None, 0.5, 0.0])
@pytest.mark.parametrize("eager", [True, False], ids=["eager", "traced"])
def test_a_rate_for_each_layer(loss, momentum, eager):
    """With one output, estimates from random signs are exact."""
    settings = Settings(
        None,
        momentum,
        MODEL_RULE,
        factor_decay=0.75,
        l2_kernel=0.0625,
        model_period=2,
        model_decay=0.4,
        by_layer=True,
        samples=256,
        spread=3.0,
    )
    model = mlp([3, 4, 3, 1])
    _, reference = check_steps(
        model,
        settings,
        loss,
        10,  # Later the gradient is rounding, and so are the rates.
        eager=eager,
        batch=256,
        fisher="propagated",
        quadratic_model=kng.QuadraticModel("estimated", 2, 0.4),
    )
    assert reference.quotients.shape == (4, 4)
    # In this one case the rates stay within the bounds by themselves.
    free = loss == "mse" and momentum is None
    assert (reference.bounded == 0) == free


@pytest.mark.variants("eager-None-bernoulli")
@pytest.mark.parametrize("loss", ["mse", "bernoulli"])
@pytest.mark.parametrize("momentum", [None, 0.5, 0.0])
@pytest.mark.parametrize("eager", [True, False], ids=["eager", "traced"])
def test_one_rate_for_one_example(loss, momentum, eager):
    """Few examples have the common rate, from an average of its own."""
    settings = Settings(
        None,
        momentum,
        MODEL_RULE,
        factor_decay=0.75,
        l2_kernel=0.0625,
        model_period=2,
        model_decay=0.4,
    )
    model = mlp([3, 4, 3, 1])
    _, reference = check_steps(
        model,
        settings,
        loss,
        20,  # Later the gradient is rounding, and so are the rates.
        eager=eager,
        batch=1,
        fisher="propagated",
        quadratic_model=kng.QuadraticModel("estimated", 2, 0.4),
    )
    assert reference.quotients.shape == (2, 2)
    assert model.optimizer.settings.quadratic_model.by_layer


@pytest.mark.parametrize("loss", LOSSES)
def test_sample_weights(loss):
    check_steps(mlp([3, 4, 3]), DEFAULTS, loss, steps=3, sample_weight=True)


@pytest.mark.variants("sequence-expand", "pooled-expand")
@pytest.mark.parametrize("weight_sharing", ["expand", "reduce"])
@pytest.mark.parametrize("pool", [False, True], ids=["sequence", "pooled"])
def test_sequences(weight_sharing, pool):
    settings = dataclasses.replace(DEFAULTS, weight_sharing=weight_sharing)
    model = mlp([2, 3, 2], positions=3, pool=pool)
    check_steps(model, settings, "mse", steps=3)


def test_decimal_factor_decay():
    """A decay with no exact float32 value is used in float64."""
    settings = dataclasses.replace(DEFAULTS, factor_decay=0.95)
    check_steps(mlp([3, 4, 3]), settings, "categorical")


def test_decimal_damping_decay_and_norm_constraint():
    """Neither has an exact float32 value."""
    rule = dataclasses.replace(MODEL_RULE, decay=0.77, period=1)
    settings = dataclasses.replace(DEFAULTS, damping=rule, norm_constraint=0.01)
    check_steps(mlp([3, 4, 3]), settings, "categorical")


def test_batch_without_any_weight_leaves_no_trace():
    """A batch of padding, such as the rest of an epoch, harms nothing."""
    rng = np.random.default_rng(0)
    model = mlp([3, 4, 3])
    optimizer = make_optimizer(DEFAULTS).attach(model)
    model.compile(optimizer, loss="mse", run_eagerly=True)
    for weight in (1.0, 0.0, 1.0, 1.0):
        x, y = rng.normal(size=(BATCH, 3)), rng.normal(size=(BATCH, 3))
        model.train_on_batch(x, y, sample_weight=np.full(BATCH, weight))
    assert all(np.all(np.isfinite(v)) for v in model.trainable_variables)
    assert np.isfinite(optimizer.statistics["damping"])
    assert np.isfinite(float(optimizer.curvature.mean_eigenvalue()))
    assert optimizer.statistics["failures"] == 0


def test_traced_steps():
    settings = dataclasses.replace(
        DEFAULTS,
        inverse_period=2,
        l2_kernel=0.0625,
        l2_bias=0.03125,
        norm_constraint=0.5,
    )
    model = mlp([3, 4, 3])
    check_steps(
        model, settings, "categorical", 5, sample_weight=True, eager=False
    )


def test_two_heads():
    """A Bernoulli and a categorical output share the first layer."""
    rng = np.random.default_rng(2)
    inputs = keras.Input((3,))
    trunk = keras.layers.Dense(4, activation="tanh")
    first, second = keras.layers.Dense(2), keras.layers.Dense(3)
    hidden = trunk(inputs)
    model = keras.Model(inputs, [first(hidden), second(hidden)])
    randomize(model)
    optimizer = make_optimizer(DEFAULTS).attach(model)
    model.compile(
        optimizer,
        loss=[
            keras.losses.BinaryCrossentropy(from_logits=True),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        ],
        loss_weights=[2.0, 0.5],
        run_eagerly=True,
    )
    layers = [trunk, first, second]
    network = network_of(layers, sources={2: 1}, outputs=(2, 3))
    reference = ReferenceKFAC(network, DEFAULTS)
    for _ in range(4):
        x = rng.normal(size=(BATCH, 3))
        binary = rng.integers(0, 2, size=(BATCH, 2)).astype(float)
        labels = rng.integers(0, 3, size=BATCH)
        model.train_on_batch(x, [binary, labels])
        terms = [
            binary_crossentropy(binary, np.full(BATCH, 2.0)),
            sparse_categorical_crossentropy(labels, np.full(BATCH, 0.5)),
        ]
        reference.step(x, terms)
        assert_same_weights(model, reference)
    np.testing.assert_allclose(
        optimizer.statistics["damping"], reference.damping, rtol=1e-8
    )


def test_tied_layer():
    """A layer that is used twice has both uses as shared positions."""
    rng = np.random.default_rng(3)
    inputs = keras.Input((3,))
    tied = keras.layers.Dense(3, activation="tanh")
    last = keras.layers.Dense(2)
    model = keras.Model(inputs, last(tied(tied(inputs))))
    randomize(model)
    optimizer = make_optimizer(DEFAULTS).attach(model)
    model.compile(optimizer, loss="mse", run_eagerly=True)
    reference = ReferenceKFAC(network_of([tied, tied, last]), DEFAULTS)
    for _ in range(3):
        x, y = rng.normal(size=(BATCH, 3)), rng.normal(size=(BATCH, 2))
        model.train_on_batch(x, y)
        reference.step(x, [mean_squared_error(y, np.ones(BATCH))])
        assert_same_weights(model, reference)
