"""Convolutions of whitened patches: what they compute, statistics, saving."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_natgrad as kng
from keras_natgrad.layers import (
    InputMoments,
    WhitenedConv1D,
    WhitenedConv2D,
    WhitenedConv3D,
    WhitenedDense,
    rewhiten,
)
from tests.capture.conftest import check
from tests.reference.bridge import patches_of, randomize
from tests.training.networks import (
    assert_close,
    assert_equal,
    cross_entropy,
    state,
)

L = keras.layers
GEOMETRIES = {
    "strides-1d": (L.Conv1D, {"kernel_size": 3, "strides": 2}),
    "causal": (
        L.Conv1D,
        {"kernel_size": 2, "padding": "causal", "dilation_rate": 2},
    ),
    "same": (L.Conv2D, {"kernel_size": 3, "padding": "same"}),
    "same-strides": (
        L.Conv2D,
        {"kernel_size": (2, 3), "strides": (1, 2), "padding": "same"},
    ),
    "dilated": (L.Conv2D, {"kernel_size": 2, "dilation_rate": 2}),
    "no-bias": (
        L.Conv2D,
        {"kernel_size": 2, "padding": "same", "use_bias": False},
    ),
    "pixels": (L.Conv2D, {"kernel_size": 1, "strides": 2}),
    "same-3d": (L.Conv3D, {"kernel_size": 2, "padding": "same"}),
}
each_geometry = pytest.mark.parametrize("name", GEOMETRIES)


def images(rank, size=40, seed=0):
    """Smooth images of three channels with a large mean."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(size, *[7, 6, 5][:rank], 3))
    x = x + np.roll(x, 1, axis=1)
    mix = rng.normal(size=(3, 3)) * np.logspace(0, -2, 3)
    return (x @ mix.T + 2.0).astype(keras.config.floatx())


def network(name):
    """A plain model of one convolution, and inputs of it."""
    kind, options = GEOMETRIES[name]
    layer = kind(4, activation="tanh", name="convolution", **options)
    x = images(layer.rank)
    model = keras.Sequential([keras.Input(x.shape[1:]), layer])
    randomize(model, scale=0.2)
    return model, x


def classifier():
    """A plain network of two convolutions, its inputs and labels."""
    x = images(2, 24)
    model = keras.Sequential(
        [
            keras.Input((None, None, 3)),
            L.Conv2D(4, 3, activation="tanh", padding="same"),
            L.MaxPooling2D(),
            L.Conv2D(5, 2, strides=2, use_bias=False, activation="relu"),
            L.GlobalAveragePooling2D(),
            L.Dense(3),
        ]
    )
    randomize(model, scale=0.3)
    return model, x, np.argmax(x.mean(axis=(1, 2)), axis=-1)


def whiten(model, x, **kwargs):
    callback = kng.callbacks.Whiten(x, **kwargs)
    model.compile(keras.optimizers.SGD(0.0), loss="mse")
    callback.set_model(model)
    callback.whiten()


def relative_error(found, expected):
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


@each_geometry
def test_moments_are_those_of_the_patches(name, float64):
    """Zeros of the padding count; a few examples at a time or all at once."""
    model, x = network(name)
    layer = model.layers[0]
    patches = patches_of(layer, x)
    for batch_size in (7, 1000):
        (found,) = kng.layers.input_moments(
            kng.layers.whitened(model), x, batch_size
        )
        if layer.use_bias:
            mean = patches.mean(axis=0)
            covariance = np.cov(patches, rowvar=False, bias=True)
        else:
            mean = np.zeros(patches.shape[1])
            covariance = patches.T @ patches / len(patches)
        np.testing.assert_allclose(found.mean, mean, rtol=1e-12)
        np.testing.assert_allclose(
            found.covariance, covariance, rtol=1e-9, atol=1e-12
        )


@pytest.mark.variants("strides-1d", "dilated")
@each_geometry
def test_whitening_keeps_the_outputs_in_float32(name):
    model, x = network(name)
    expected = model.predict(x, verbose=0)
    model = kng.layers.whitened(model)
    np.testing.assert_allclose(model.predict(x, verbose=0), expected, 1e-5)
    for size in (40, 20, 30):
        before = model.predict(x, verbose=0)
        whiten(model, x[:size], damping=1e-3)
        after = model.predict(x, verbose=0)
        assert relative_error(after, before) < 1e-6
    side = model.layers[0].whitening.shape[0]
    assert np.any(model.layers[0].whitening.numpy() != np.eye(side))


@each_geometry
def test_patches_are_white(name, float64):
    model, x = network(name)
    patches = patches_of(model.layers[0], x)
    model = kng.layers.whitened(model)
    whiten(model, x, damping=0.0)
    layer = model.layers[0]
    white = np.asarray(layer.whiten(patches))
    if layer.use_bias:
        np.testing.assert_allclose(white.mean(axis=0), 0.0, atol=1e-9)
    count, side = white.shape
    np.testing.assert_allclose(white.T @ white / count, np.eye(side), atol=1e-7)
    # What the layer computes is the map of the white patches.
    mapped = white @ layer.kernel.numpy().reshape(side, -1)
    if layer.use_bias:
        mapped = mapped + layer.bias.numpy()
    found = np.asarray(layer(x)).reshape(count, -1)
    np.testing.assert_allclose(found, np.tanh(mapped), atol=1e-10)


@each_geometry
def test_capture_of_white_patches(name, float64):
    """`z = ā V` and `∇V = Σ ā gᵀ` with the white patches ā."""
    model, x = network(name)
    model = kng.layers.whitened(model)
    whiten(model, x)
    check(model, model.layers, x)


def test_channels_first(float64):
    """As the plain layer; TensorFlow has these on a CPU in three dimensions."""
    plain = L.Conv3D(2, 2, data_format="channels_first", padding="same")
    x = np.moveaxis(images(3), -1, 1)
    model = keras.Sequential([keras.Input(x.shape[1:]), plain])
    randomize(model)
    white = kng.layers.whitened(model)
    whiten(white, x)
    assert np.any(white.layers[0].centre.numpy() > 0.1)
    np.testing.assert_allclose(white(x), model(x), rtol=1e-9, atol=1e-11)
    patches = patches_of(
        L.Conv3D.from_config(
            {**plain.get_config(), "data_format": "channels_last"}
        ),
        np.moveaxis(x, 1, -1),
    )
    (found,) = kng.layers.input_moments(white, x)
    np.testing.assert_allclose(found.mean, patches.mean(axis=0), rtol=1e-12)


def test_channels_first_causal(float64):
    """XLA has these on a CPU."""
    x = images(1)
    last = WhitenedConv1D(2, 3, padding="causal", dilation_rate=2)
    last.build(x.shape)
    for variable in last.weights:
        variable.assign(np.random.default_rng(0).normal(size=variable.shape))
    expected = last(x)
    config = {**last.get_config(), "data_format": "channels_first"}
    first = WhitenedConv1D.from_config(config)
    first.build((None, 3, 7))
    first.set_weights(last.get_weights())
    found = tf.function(first, jit_compile=True)(np.moveaxis(x, -1, 1))
    np.testing.assert_allclose(
        np.moveaxis(np.asarray(found), 1, -1), expected, rtol=1e-9, atol=1e-11
    )


def test_velocity_is_the_same_step_of_the_canonical_weights(float64):
    rng = np.random.default_rng(0)
    layer = WhitenedConv2D(3, 2)
    layer.build((None, 4, 4, 2))
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
        h = rng.normal(size=(30, 8)) * rng.uniform(0.1, 5.0, 8) + 1.0
        moments = InputMoments(
            h.mean(axis=0), np.cov(h, rowvar=False, bias=True)
        )
        rewhiten(layer, moments, 0.01, True, velocities)
        assert_close(canonical_step(), expected, 1e-9, 1e-11)


def test_conversion_there_and_back(float64):
    model, x, y = classifier()
    white = kng.layers.whitened(model)
    kinds = [type(layer) for layer in white.layers]
    assert kinds[::2] == [WhitenedConv2D, WhitenedConv2D, WhitenedDense]
    np.testing.assert_allclose(white(x), model(x), rtol=1e-12)
    white.compile(keras.optimizers.SGD(0.1, 0.5), loss=cross_entropy())
    white.fit(x, y, epochs=2, callbacks=[kng.callbacks.Whiten(x, 1)], verbose=0)
    back = kng.layers.canonical(white)
    assert [type(each) for each in back.layers] == [
        type(each) for each in model.layers
    ]
    np.testing.assert_allclose(back(x), white(x), rtol=1e-9, atol=1e-12)
    assert relative_error(model(x), back(x)) > 1e-3
    one = kng.layers.whitened(model, [model.layers[2].name])
    assert [type(each) for each in one.layers[::2]] == [
        L.Conv2D,
        WhitenedConv2D,
        L.Dense,
    ]


@pytest.mark.parametrize(
    ("kind", "form"), [(L.Conv1D, WhitenedConv1D), (L.Conv3D, WhitenedConv3D)]
)
def test_other_ranks(kind, form):
    layer = kind(2, 3, padding="same", activation="relu", name="mine")
    white = form.from_plain(layer)
    assert white.get_config() == layer.get_config()
    assert type(white.to_plain()) is kind


def test_saved_and_resumed_bit_for_bit(tmp_path):
    model, x, y = classifier()

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

    model = kng.layers.whitened(model)
    model.compile(keras.optimizers.SGD(0.1, 0.9), loss=cross_entropy())
    fit(model)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert_equal(state(loaded), state(model))
    for each in (model, loaded):
        fit(each)
    assert_equal(state(loaded), state(model))


def test_saved_file_holds_the_canonical_weights(float64):
    model, x = network("same")
    model = kng.layers.whitened(model)
    whiten(model, x)
    layer = model.layers[0]
    store = {}
    layer.save_own_variables(store)
    plain = layer.to_plain()
    plain.build(x.shape)
    plain.set_weights([store["kernel"], store["bias"]])
    np.testing.assert_allclose(plain(x), layer(x), rtol=1e-9, atol=1e-12)
    with pytest.raises(ValueError, match="a WhitenedConv2D layer.*missing"):
        layer.load_own_variables({"0": store["kernel"]})


@pytest.mark.variants("False")
@pytest.mark.parametrize("jit_compile", [False, True])
def test_in_a_graph(jit_compile, float64):
    """With images and batches of unknown size.

    The last batch is smaller; XLA would compile the step for it again.
    """
    results = []
    for eager in (True, False):
        model, x, y = classifier()
        model = kng.layers.whitened(model)
        model.compile(
            keras.optimizers.SGD(0.1, 0.5),
            loss=cross_entropy(),
            run_eagerly=eager,
            jit_compile=jit_compile and not eager,
        )
        model.fit(
            x,
            y,
            batch_size=8 if jit_compile else 10,
            epochs=2,
            shuffle=False,
            verbose=0,
            callbacks=[kng.callbacks.Whiten(x, 2)],
        )
        results.append(kng.layers.canonical(model).get_weights())
    assert_close(*results, 1e-8, 1e-10)


# -- Bad input ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"kernel_regularizer": "l2"}, "kernel_regularizer.*layer='mine'"),
        ({"bias_constraint": "non_neg"}, "bias_constraint.*layer='mine'"),
        ({"lora_rank": 2}, "lora_rank.*layer='mine'"),
        ({"groups": 2}, "WhitenedConv2D.*groups=2, layer='mine'"),
    ],
    ids=lambda each: next(iter(each)) if isinstance(each, dict) else "",
)
def test_settings_that_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        WhitenedConv2D(4, 2, name="mine", **kwargs)
    model = keras.Sequential(
        [keras.Input((5, 5, 4)), L.Conv2D(4, 2, name="mine", **kwargs)]
    )
    with pytest.raises(ValueError, match=message):
        kng.layers.whitened(model)


def test_other_layers_stay():
    model = keras.Sequential(
        [
            keras.Input((6, 6, 2)),
            L.DepthwiseConv2D(2, name="depthwise"),
            L.SeparableConv2D(2, 2),
            L.Conv2DTranspose(2, 2),
            L.Conv2D(2, 2),
        ]
    )
    white = kng.layers.whitened(model)
    assert [type(each) for each in white.layers[:3]] == [
        type(each) for each in model.layers[:3]
    ]
    assert type(white.layers[3]) is WhitenedConv2D
    with pytest.raises(ValueError, match="'depthwise' of type DepthwiseConv2D"):
        kng.layers.whitened(model, ["depthwise"])
