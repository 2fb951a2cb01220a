"""Layers of whitened inputs: what they compute, conversion, saving."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_natgrad as kng
from keras_natgrad.layers import InputMoments, WhitenedDense, rewhiten
from tests.training.networks import (
    assert_close,
    assert_equal,
    cross_entropy,
    data,
    mlp,
    state,
)

layers = keras.layers


def correlated(size=300, features=6, seed=0):
    """Inputs with a large mean and a condition number of about 1e6."""
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(features, features)) * np.logspace(0, -3, features)
    x = rng.normal(size=(size, features)) @ mix.T + 3.0
    return x.astype(keras.config.floatx())


def network():
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [
            keras.Input((6,)),
            layers.Dense(5, "tanh"),
            layers.Dense(4, "relu", use_bias=False),
            layers.Dense(3),
        ]
    )


def relative_error(found, expected):
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


def whiten(model, x, **kwargs):
    callback = kng.callbacks.Whiten(x, **kwargs)
    callback.set_model(model)
    callback.whiten()


def test_whitening_keeps_the_outputs_in_float32():
    x = correlated()
    model = network()
    expected = model.predict(x, verbose=0)
    model = kng.layers.whitened(model)
    np.testing.assert_array_equal(model.predict(x, verbose=0), expected)
    model.compile(keras.optimizers.SGD(0.0), loss="mse")
    for size in (300, 100, 200):
        before = model.predict(x, verbose=0)
        whiten(model, x[:size], damping=1e-4)
        after = model.predict(x, verbose=0)
        assert relative_error(after, before) < 1e-6
        assert np.any(model.layers[0].whitening.numpy() != np.eye(6))


def test_inputs_are_white(float64):
    x = correlated()
    model = kng.layers.whitened(network())
    model.compile(keras.optimizers.SGD(0.0), loss="mse")
    whiten(model, x, damping=0.0)
    white = np.asarray(model.layers[0].whiten(x))
    np.testing.assert_allclose(white.mean(axis=0), 0.0, atol=1e-9)
    np.testing.assert_allclose(white.T @ white / 300, np.eye(6), atol=1e-7)
    # Without a bias the second moment is whitened, about zero.
    hidden = model.layers[0](x)
    white = np.asarray(model.layers[1].whiten(hidden))
    np.testing.assert_array_equal(model.layers[1].centre, np.zeros(5))
    np.testing.assert_allclose(white.T @ white / 300, np.eye(5), atol=1e-7)


def test_positions_count_as_examples(float64):
    x = correlated(40).reshape(10, 4, 6)
    model = keras.Sequential([keras.Input((4, 6)), WhitenedDense(2)])
    (found,) = kng.layers.input_moments(model, x, batch_size=3)
    flat = x.reshape(-1, 6)
    np.testing.assert_allclose(found.mean, flat.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(
        found.covariance, np.cov(flat, rowvar=False, bias=True), rtol=1e-9
    )


def test_velocity_is_the_same_step_of_the_canonical_weights(float64):
    rng = np.random.default_rng(0)
    layer = WhitenedDense(3)
    layer.build((None, 4))
    velocities = [
        keras.Variable(rng.normal(size=v.shape))
        for v in (layer.kernel, layer.bias)
    ]

    def canonical_step():
        before = layer.canonical_weights()
        kept = [v.numpy() for v in layer.trainable_variables]
        for variable, velocity in zip(
            layer.trainable_variables, velocities, strict=True
        ):
            variable.assign(variable.value + velocity.value)
        after = layer.canonical_weights()
        for variable, value in zip(
            layer.trainable_variables, kept, strict=True
        ):
            variable.assign(value)
        return [b - a for a, b in zip(before, after, strict=True)]

    for _ in range(3):
        expected = canonical_step()
        x = rng.normal(size=(20, 4)) * rng.uniform(0.1, 5.0, 4) + 1.0
        moments = InputMoments(
            x.mean(axis=0), np.cov(x, rowvar=False, bias=True)
        )
        rewhiten(layer, moments, 0.01, True, velocities)
        assert_close(canonical_step(), expected, 1e-9, 1e-11)


def test_conversion_there_and_back(float64):
    x = correlated()
    inner = keras.Sequential([keras.Input((4,)), layers.Dense(3, name="deep")])
    source = keras.Input((6,))
    shared = layers.Dense(6, "tanh", name="shared")
    hidden = layers.BatchNormalization()(shared(shared(source)))
    outputs = inner(layers.Dense(4, name="plain")(hidden))
    model = keras.Model(source, outputs)
    white = kng.layers.whitened(model, ["shared", "deep"])
    kinds = {
        layer.name: type(layer)
        for layer in [*white.layers, *white.layers[-1].layers]
    }
    assert kinds["shared"] is kinds["deep"] is WhitenedDense
    assert kinds["plain"] is layers.Dense
    white.compile(keras.optimizers.SGD(0.01, 0.9), loss="mse")
    y = np.zeros((300, 3))
    white.fit(x, y, callbacks=[kng.callbacks.Whiten(x, 3)], verbose=0)
    back = kng.layers.canonical(white)
    assert not any(isinstance(layer, WhitenedDense) for layer in back.layers)
    np.testing.assert_allclose(
        back.predict(x, verbose=0), white.predict(x, verbose=0), rtol=1e-9
    )
    # The given model is left alone.
    assert relative_error(model.predict(x, verbose=0), back(x)) > 1e-3


def test_saved_and_resumed_bit_for_bit(tmp_path):
    x, y = data()

    def fit(model):
        model.fit(
            x,
            y,
            batch_size=8,
            epochs=2,
            shuffle=False,
            verbose=0,
            callbacks=[kng.callbacks.Whiten(x, 4)],
        )

    model = kng.layers.whitened(mlp())
    model.compile(keras.optimizers.SGD(0.1, 0.9), loss=cross_entropy())
    fit(model)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert_equal(state(loaded), state(model))
    for each in (model, loaded):
        fit(each)
    assert_equal(state(loaded), state(model))


def test_saved_file_holds_the_canonical_weights():
    layer = WhitenedDense(3)
    layer.build((None, 6))
    moments = InputMoments(np.ones(6), np.diag(np.arange(1.0, 7.0)))
    rewhiten(layer, moments, 0.1)
    store = {}
    layer.save_own_variables(store)
    plain = layer.to_plain()
    plain.build((None, 6))
    plain.set_weights([store["kernel"], store["bias"]])
    x = correlated()
    np.testing.assert_allclose(plain(x), layer(x), rtol=1e-5, atol=1e-5)
    copy = WhitenedDense(3)
    copy.build((None, 6))
    copy.load_own_variables(store)
    assert_equal(copy.get_weights(), layer.get_weights())
    with pytest.raises(ValueError, match=f"{copy.name!r}.*missing"):
        copy.load_own_variables({"0": store["kernel"]})


def test_captured_by_curvature_optimizers(float64):
    """The white inputs are the layer's canonical ones."""
    x, y = data()
    model = kng.layers.whitened(mlp())
    model.compile(keras.optimizers.SGD(0.0), loss=cross_entropy())
    whiten(model, x)
    operators = kng.fisher(
        model, x, kng.heads.Categorical(), approximation="input_factor"
    )
    first = next(iter(operators.values())).to_dense().numpy()
    white = np.asarray(model.layers[0].whiten(x))
    homogeneous = np.hstack([white, np.ones((24, 1))])
    expected = np.kron(homogeneous.T @ homogeneous / 24, np.eye(5))
    np.testing.assert_allclose(first, expected, atol=1e-12)


@pytest.mark.parametrize("jit_compile", [False, True])
def test_in_a_graph(jit_compile, float64):
    x, y = data()
    results = []
    for eager in (True, False):
        model = kng.layers.whitened(mlp())
        model.compile(
            keras.optimizers.SGD(0.1, 0.5),
            loss=cross_entropy(),
            run_eagerly=eager,
            jit_compile=jit_compile and not eager,
        )
        model.fit(
            x,
            y,
            batch_size=8,
            epochs=2,
            shuffle=False,
            verbose=0,
            callbacks=[kng.callbacks.Whiten(x, 2)],
        )
        results.append([v.numpy() for v in model.weights])
    assert_close(*results, 1e-8, 1e-10)


# -- Bad input ---------------------------------------------------------------


@pytest.mark.parametrize(
    "kwargs",
    [
        {"kernel_regularizer": "l2"},
        {"bias_constraint": "non_neg"},
        {"lora_rank": 2},
    ],
    ids=lambda kwargs: next(iter(kwargs)),
)
def test_settings_that_act_on_the_weights(kwargs):
    with pytest.raises(ValueError, match=f"{next(iter(kwargs))}.*'mine'"):
        WhitenedDense(3, name="mine", **kwargs)
    model = keras.Sequential(
        [keras.Input((4,)), layers.Dense(3, name="mine", **kwargs)]
    )
    with pytest.raises(ValueError, match="layer='mine'"):
        kng.layers.whitened(model)


def test_other_layers_are_named():
    model = keras.Sequential(
        [keras.Input((8, 4)), layers.LSTM(3, name="recurrent")]
    )
    with pytest.raises(ValueError, match="'recurrent' of type LSTM"):
        kng.layers.whitened(model, ["recurrent"])
    with pytest.raises(
        ValueError, match="only replace keras.layers.Dense.*'recurrent'"
    ):
        WhitenedDense.from_plain(model.layers[0])
    with pytest.raises(ValueError, match="no layers of these names.*'no'"):
        kng.layers.whitened(model, ["no"])


def test_models_that_cannot_be_copied():
    class Mine(keras.Model):
        pass

    with pytest.raises(ValueError, match="'theirs' of type Mine"):
        kng.layers.whitened(Mine(name="theirs"))
    with pytest.raises(ValueError, match="built=False"):
        kng.layers.canonical(keras.Sequential([layers.Dense(3)]))


def test_singular_covariance_and_bad_inputs():
    layer = WhitenedDense(3, name="mine")
    layer.build((None, 2))
    moments = InputMoments(np.zeros(2), np.diag([1.0, 0.0]))
    with pytest.raises(ValueError, match="singular.*'mine'"):
        rewhiten(layer, moments, 0.0)
    model = keras.Sequential([keras.Input((2,)), layer])
    x = np.array([[1.0, np.nan]])
    with pytest.raises(ValueError, match="finite.*'mine'"):
        kng.layers.input_moments(model, x)
    assert tf.reduce_all(tf.math.is_finite(layer.kernel))
