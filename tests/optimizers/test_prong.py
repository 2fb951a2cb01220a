"""PRONG in both forms equals the reference, and they equal each other."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_natgrad as kng
from keras_natgrad.callbacks.whiten import _velocities
from keras_natgrad.curvature.captured_pass import CapturedPass
from keras_natgrad.layers import input_moments, rewhiten
from tests.reference import fisher, prong
from tests.reference.bridge import dense_layers, matrix_of, mlp, network_of
from tests.reference.heads import Term
from tests.training.networks import (
    assert_close,
    compiled,
    cross_entropy,
    data,
    weights,
)

BATCH, RATE = 12, 0.3
DAMPINGS = [(0.05, False), (0.2, True)]


def batch(seed=0):
    rng = np.random.default_rng(seed)
    return 2.0 + rng.normal(size=(BATCH, 3)), rng.integers(0, 3, size=BATCH)


def every_step(damping, relative, **kwargs):
    """Statistics of the last batch alone, renewed at every step."""
    return kng.PRONG(
        RATE,
        damping=damping,
        relative_damping=relative,
        factor_decay=0.0,
        curvature_update_period=1,
        inverse_update_period=1,
        refresh_growth=None,
        **kwargs,
    )


def compile_attached(model, optimizer, **kwargs):
    kwargs.setdefault("run_eagerly", True)
    model.compile(optimizer.attach(model), loss=cross_entropy(), **kwargs)
    return model


def reference_step(model, x, y, damping, relative):
    """The matrices after a step, twice: from (V, d), and in closed form."""
    trace = network_of(model.layers).trace(x)
    term = Term(
        "categorical", np.full((BATCH, 1), 1 / BATCH), np.eye(3)[y][:, None]
    )
    pairs = []
    for index, layer in enumerate(dense_layers(model)):
        inputs = trace.inputs[index][:, 0, :-1]
        white = prong.whitening(inputs, damping, relative)
        matrix = matrix_of(layer)
        gradient = fisher.gradient(trace, [term], index)
        w, b = prong.step(
            matrix[:-1].T,
            matrix[-1],
            (gradient[:-1].T, gradient[-1]),
            white,
            RATE,
        )
        closed = prong.closed_step(matrix, gradient, white, RATE)
        pairs.append((np.vstack([w.T, b]), closed))
    return pairs


@pytest.mark.parametrize(("damping", "relative"), DAMPINGS)
@pytest.mark.parametrize("form", ["preconditioner", "layers"])
def test_a_step_equals_the_closed_identity(form, damping, relative, float64):
    x, y = batch()
    model = mlp([3, 4, 3])
    expected = reference_step(model, x, y, damping, relative)
    if form == "preconditioner":
        compile_attached(model, every_step(damping, relative))
        model.train_on_batch(x, y)
        found = [matrix_of(layer) for layer in dense_layers(model)]
    else:
        model = kng.layers.whitened(model)
        model.compile(keras.optimizers.SGD(RATE), loss=cross_entropy())
        whiten = kng.callbacks.Whiten(x, 1, damping, relative)
        whiten.set_model(model)
        whiten.whiten()
        model.train_on_batch(x, y)
        found = [
            np.vstack(layer.canonical_weights())
            for layer in dense_layers(model)
        ]
    for matrix, pair in zip(found, expected, strict=True):
        for each in pair:
            np.testing.assert_allclose(matrix, each, rtol=1e-9, atol=1e-12)


@pytest.mark.variants("True-0.0", "False-0.0")
@pytest.mark.parametrize("momentum", [0.0, 0.5])
@pytest.mark.parametrize("use_bias", [True, False])
def test_both_forms_agree(momentum, use_bias, float64):
    """Over steps and whitenings, on other batches every time.

    Keras rounds its momentum to float32, so it has to be a binary fraction.
    """
    layers = keras.layers

    def make():
        keras.utils.set_random_seed(3)
        return keras.Sequential(
            [
                keras.Input((3,)),
                layers.Dense(4, "tanh", use_bias=use_bias),
                layers.Dense(3, use_bias=use_bias),
            ]
        )

    left = compile_attached(make(), every_step(0.2, True, momentum=momentum))
    right = kng.layers.whitened(make())
    right.compile(keras.optimizers.SGD(RATE, momentum), loss=cross_entropy())
    moments = None
    for step in range(6):
        x, y = batch(step)
        now = input_moments(right, x)
        # The preconditioner is of the batch before, but for the first.
        for layer, each in zip(right.layers, moments or now, strict=True):
            velocities = _velocities(right.optimizer, layer)
            rewhiten(layer, each, 0.2, True, velocities)
        moments = now
        left.train_on_batch(x, y)
        right.train_on_batch(x, y)
        assert_close(
            weights(left), weights(kng.layers.canonical(right)), 1e-8, 1e-11
        )


def test_invariant_to_an_affine_map_of_the_inputs(float64):
    """With relative damping, to their unit and mean; without, to no map."""
    x, y = batch()
    results = []
    for scale, shift in ((1.0, 0.0), (100.0, 7.0)):
        model = mlp([3, 4, 3])
        first = dense_layers(model)[0]
        kernel, bias = first.kernel.numpy(), first.bias.numpy()
        first.kernel.assign(kernel / scale)
        first.bias.assign(bias - shift / scale * kernel.sum(axis=0))
        compile_attached(model, every_step(0.2, True))
        inputs = scale * x + shift
        for _ in range(5):
            model.train_on_batch(inputs, y)
        results.append(model.predict(inputs, verbose=0))
    np.testing.assert_allclose(*results, rtol=1e-7, atol=1e-9)


def test_a_regularizer_enters_by_its_gradient_only(float64):
    x, y = batch()
    model = mlp([3, 4, 3])
    before = [matrix_of(layer) for layer in dense_layers(model)]
    expected = reference_step(model, x, y, 0.05, False)
    for layer in dense_layers(model):
        layer.kernel.regularizer = keras.regularizers.L2(0.125)
    trace = network_of(model.layers).trace(x)
    compile_attached(model, every_step(0.05, False))
    model.train_on_batch(x, y)
    for index, layer in enumerate(dense_layers(model)):
        white = prong.whitening(trace.inputs[index][:, 0, :-1], 0.05, False)
        penalty = 0.25 * before[index]
        penalty[-1] = 0.0
        matrix = prong.closed_step(expected[index][1], penalty, white, RATE)
        np.testing.assert_allclose(
            matrix_of(layer), matrix, rtol=1e-9, atol=1e-12
        )


def test_makes_no_second_backward_pass(monkeypatch):
    def fail(*_):
        raise AssertionError("a backward pass of cotangents")

    monkeypatch.setattr(CapturedPass, "backward", fail)
    x, y = data()
    model = compile_attached(mlp([4, 3, 3]), kng.PRONG())
    model.fit(x, y, batch_size=8, verbose=0)
    assert model.optimizer.statistics["curvature_updates"] == 3
    with pytest.raises(AssertionError, match="of cotangents"):
        compile_attached(mlp([4, 3, 3]), kng.KFAC()).train_on_batch(x, y)


def test_other_layers_take_plain_steps(float64):
    """As under SGD of the same rate, in a step from the same weights."""
    x, y = batch()

    def make():
        keras.utils.set_random_seed(0)
        layers = [keras.layers.Dense(4), keras.layers.LayerNormalization()]
        return keras.Sequential(
            [keras.Input((3,)), *layers, keras.layers.Dense(3)]
        )

    left, right = make(), make()
    with pytest.warns(UserWarning, match="layer_normalization"):
        compile_attached(left, every_step(0.2, True)).train_on_batch(x, y)
    right.compile(keras.optimizers.SGD(RATE), loss=cross_entropy())
    right.train_on_batch(x, y)
    for a, b in zip(
        left.layers[1].get_weights(), right.layers[1].get_weights(), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-10)


def test_any_loss_without_a_warning(recwarn):
    x, y = data()
    model = mlp([4, 3, 3])
    optimizer = kng.PRONG().attach(model)

    def loss(y_true, y_pred):
        return tf.reduce_mean(tf.abs(y_pred) ** 1.5, axis=-1)

    model.compile(optimizer, loss=loss, run_eagerly=True)
    first = model.evaluate(x, y, verbose=0)
    model.fit(x, y, epochs=3, verbose=0)
    assert model.evaluate(x, y, verbose=0) < first
    assert not [w for w in recwarn if "losses" in str(w.message)]
    lines = []
    optimizer.summary(lines.append)
    assert "not needed: G = I" in lines[0] and "⊗ I" in lines[0]


def test_custom_loop_needs_no_head():
    x, y = data()
    model = mlp([4, 3, 3])
    optimizer = kng.PRONG(0.3).attach(model)
    losses = []
    for _ in range(10):
        with kng.CurvatureTape(optimizer) as tape:
            loss = cross_entropy()(y, model(x))
        variables = model.trainable_variables
        optimizer.apply(tape.gradient(loss, variables), variables)
        losses.append(float(loss))
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"damping": -0.1}, "damping=-0.1"),
        ({"damping": "auto"}, "damping='auto'"),
        ({"damping": kng.LevenbergMarquardt()}, "damping=Lev"),
        ({"momentum": 1.0}, "momentum=1.0"),
        ({"momentum": "auto"}, "momentum='auto'"),
        ({"factor_decay": 1.0}, "factor_decay=1.0"),
        ({"inverse_update_period": 0}, "inverse_update_period=0"),
        ({"curvature_update_period": 1.5}, "curvature_update_period=1.5"),
        ({"refresh_growth": 0.0}, "refresh_growth=0.0"),
        ({"weight_sharing": "sum"}, "weight_sharing='sum'"),
        ({"max_factor_size": 0}, "max_factor_size=0"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        kng.PRONG(**kwargs)


def test_scheduled_rate_and_damping(float64):
    schedule = keras.optimizers.schedules.ExponentialDecay(0.4, 1, 0.5)
    optimizer = kng.PRONG(schedule, damping=schedule, refresh_growth=None)
    copy = keras.optimizers.deserialize(keras.optimizers.serialize(optimizer))
    assert copy.get_config() == optimizer.get_config()
    x, y = data()
    model = compile_attached(mlp([4, 3, 3]), optimizer)
    for step in range(3):
        model.train_on_batch(x, y)
        found = model.optimizer.statistics
        np.testing.assert_allclose(found["damping"], 0.4 * 0.5**step)
        np.testing.assert_allclose(found["learning_rate"], 0.4 * 0.5**step)


def test_convolutions_get_the_factor_of_their_patches():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(32, 6, 6, 2)).astype("float32")
    y = (x.mean(axis=(1, 2, 3)) > 0).astype("int32")
    model = keras.Sequential(
        [
            keras.Input((6, 6, 2)),
            keras.layers.Conv2D(4, 3, activation="tanh"),
            keras.layers.BatchNormalization(),
            keras.layers.Flatten(),
            keras.layers.Dense(2),
        ]
    )
    optimizer = kng.PRONG(0.1)
    with pytest.warns(UserWarning, match="no input factor"):
        compiled(model, optimizer)
        model.train_on_batch(x, y)
    kinds = [entry.block.kind for entry in optimizer.curvature.entries]
    assert kinds == ["input_factor", "input_factor", "plain", "plain"]
    assert optimizer.curvature.entries[0].block.shape.rows == 3 * 3 * 2 + 1
    before = model.evaluate(x, y, verbose=0)
    for _ in range(10):
        model.train_on_batch(x, y)
    assert model.evaluate(x, y, verbose=0) < before


@pytest.mark.parametrize("value", [0.0, 3.0])
def test_constant_inputs_leave_the_bias_to_train(value):
    """Their covariance is zero; the layer stood still, bias and all."""
    rng = np.random.default_rng(0)
    y = (1.0 + 0.1 * rng.normal(size=(16, 1))).astype("float32")
    x = np.full((16, 4), value, "float32")
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    model.compile(kng.PRONG(0.3).attach(model), "mse", run_eagerly=True)
    for _ in range(30):
        model.train_on_batch(x, y)
    assert model.evaluate(x, y, verbose=0) < 0.02
    assert model.optimizer.statistics["failures"] == 0


def test_a_first_batch_of_one_example():
    x, y = data()
    model = compiled(optimizer=kng.PRONG())
    before = model.evaluate(x[:1], y[:1], verbose=0)
    model.train_on_batch(x[:1], y[:1])
    assert model.evaluate(x[:1], y[:1], verbose=0) < before
