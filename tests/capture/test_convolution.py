"""Convolutions in canonical form, against gradients of single examples."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_natgrad.capture import linear_maps
from keras_natgrad.capture.images import channels_last, patches
from keras_natgrad.linalg import Patches

from .conftest import check_both

pytestmark = pytest.mark.usefixtures("float64")

L = keras.layers
CONV = [L.Conv1D, L.Conv2D, L.Conv3D]
DEPTHWISE = [L.DepthwiseConv1D, L.DepthwiseConv2D]
SEPARABLE = [L.SeparableConv1D, L.SeparableConv2D]
TRANSPOSED = [L.Conv1DTranspose, L.Conv2DTranspose, L.Conv3DTranspose]
FEW = settings(max_examples=12, deadline=None)


def built(layer, shape, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=shape)
    layer(x)
    for variable in layer.weights:
        variable.assign(rng.normal(size=tuple(variable.shape)))
    return x


@st.composite
def geometries(draw, ranks, both=False):
    """Arguments of a convolution and a shape of inputs without channels."""
    rank = draw(st.integers(1, ranks))
    kernel = [draw(st.integers(1, 3)) for _ in range(rank)]
    # Strides of depthwise layers must be equal, and TensorFlow knows
    # dilations without strides only.
    stride, dilation = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    if not both and stride > 1:
        dilation = 1
    padding = draw(st.sampled_from(["valid", "same"]))
    sizes = [dilation * (k - 1) + draw(st.integers(1, 4)) for k in kernel]
    options = {
        "kernel_size": kernel,
        "strides": stride,
        "dilation_rate": dilation,
        "padding": padding,
        "use_bias": draw(st.booleans()),
        "activation": draw(st.sampled_from([None, "tanh"])),
        "dtype": "float64",
    }
    return rank, options, (draw(st.integers(1, 2)), *sizes)


@FEW
@given(geometry=geometries(3), channels=st.integers(1, 2))
def test_convolutions(geometry, channels):
    rank, options, shape = geometry
    layer = CONV[rank - 1](2, **options)
    check_both(layer, [layer], built(layer, (*shape, channels)))


@settings(max_examples=5, deadline=None)
@given(
    geometry=geometries(2), groups=st.integers(2, 3), filters=st.integers(1, 2)
)
def test_groups_of_channels(geometry, groups, filters):
    rank, options, shape = geometry
    layer = CONV[rank - 1](filters * groups, groups=groups, **options)
    x = built(layer, (*shape, 2 * groups))
    (record,) = check_both(layer, [layer], x)
    assert record.spec.layout.groups == groups


@FEW
@given(
    geometry=geometries(2, both=True),
    channels=st.integers(1, 3),
    multiplier=st.integers(1, 2),
)
def test_depthwise_convolutions(geometry, channels, multiplier):
    rank, options, shape = geometry
    layer = DEPTHWISE[rank - 1](depth_multiplier=multiplier, **options)
    (record,) = check_both(layer, [layer], built(layer, (*shape, channels)))
    assert record.spec.layout.groups == channels


@FEW
@given(
    geometry=geometries(2, both=True),
    channels=st.integers(1, 3),
    multiplier=st.integers(1, 2),
)
def test_separable_convolutions(geometry, channels, multiplier):
    rank, options, shape = geometry
    layer = SEPARABLE[rank - 1](3, depth_multiplier=multiplier, **options)
    x = built(layer, (*shape, channels))
    assert len(linear_maps(layer)) == 2
    check_both(layer, [layer], x, product=False)


@FEW
@given(geometry=geometries(3), output_padding=st.booleans())
def test_transposed_convolutions(geometry, output_padding):
    rank, options, shape = geometry
    # TensorFlow has no dilated transposed convolution on a CPU.
    options["dilation_rate"] = 1
    if output_padding and options["strides"] > 1:
        options["output_padding"] = 1
    layer = TRANSPOSED[rank - 1](2, **options)
    x = built(layer, (*shape, 2))
    assert len(linear_maps(layer)) == 1 + options["use_bias"]
    check_both(layer, [layer], x, product=False)


@pytest.mark.parametrize("strides", [1, 2])
def test_causal(strides):
    layer = L.Conv1D(2, 3, strides, padding="causal")
    check_both(layer, [layer], built(layer, (2, 5, 2)))
    layer = L.Conv1D(2, 3, padding="causal", dilation_rate=2)
    check_both(layer, [layer], built(layer, (2, 5, 2)))


@pytest.mark.variants("Conv2D")
@pytest.mark.parametrize(
    "layer",
    [
        L.Conv2D(4, 2, groups=2, data_format="channels_first"),
        L.Conv3D(3, 2, data_format="channels_first"),
        L.DepthwiseConv2D(2, data_format="channels_first"),
        L.DepthwiseConv1D(2, strides=2, data_format="channels_first"),
        L.SeparableConv2D(5, 2, data_format="channels_first"),
        L.SeparableConv1D(5, 2, data_format="channels_first"),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_channels_first(layer):
    """Those that Keras runs on a CPU.

    Keras 3.15 adds a bias along the last axis where its size is the number of
    filters; the sizes here avoid that.
    """
    layer = type(layer).from_config({**layer.get_config(), "dtype": "float64"})
    spatial = (3, 4, 3)[: layer.rank]
    x = built(layer, (2, 4, *spatial))
    check_both(layer, [layer], x, product=isinstance(layer, L.DepthwiseConv2D))


@pytest.mark.parametrize("layer_class", [L.Conv2D, L.Conv2DTranspose])
def test_channels_first_is_channels_last_transposed(layer_class):
    """Keras cannot run these on a CPU; the maps see the same tensors."""
    x = np.random.default_rng(0).normal(size=(2, 3, 4, 5))
    options = dict(filters=2, kernel_size=2, strides=2, padding="same")
    maps = []
    for data_format, shape in (
        ("channels_last", (None, 4, 5, 3)),
        ("channels_first", (None, 3, 4, 5)),
    ):
        layer = layer_class(**options, data_format=data_format)
        layer.build(shape)
        layer.built = True
        maps.append(linear_maps(layer))
    turned = tf.transpose(x, [0, 2, 3, 1])
    np.testing.assert_array_equal(channels_last(layer, tf.constant(x)), turned)
    for last, first in zip(*maps, strict=True):
        for own in ("inputs", "cotangents"):
            a = getattr(last, own)(turned)
            b = getattr(first, own)(tf.constant(x))
            if isinstance(a, Patches):
                a, b = a.to_dense(), b.to_dense()
            np.testing.assert_array_equal(a, b)
        assert last.layout == first.layout


def test_patches_are_formed_for_several_uses_only():
    layer = L.Conv1D(2, 3, padding="same", activation="tanh")
    x = built(layer, (3, 5, 2))
    (record,) = check_both(layer, [layer], x)
    assert isinstance(record.canonical_inputs("float64", 3), Patches)
    (record,) = check_both(lambda x: layer(layer(x)), [layer], x)
    inputs = record.canonical_inputs("float64", 3)
    assert tuple(inputs.shape) == (3, 10, 7)


@pytest.mark.variants("1-1")
@pytest.mark.parametrize("uses", [1, 2])
@pytest.mark.parametrize("groups", [1, 2])
def test_images_folded_into_the_batch(uses, groups):
    """A video `[batch, time, …]` through a convolution of its images."""
    layer = L.Conv2D(2, 2, padding="same", groups=groups)
    frames = built(layer, (6, 4, 3, 2))
    x = frames.reshape(3, 2, 4, 3, 2)

    def model(x):
        y = tf.reshape(x, [-1, 4, 3, 2])
        for _ in range(uses):
            y = layer(y)
        return tf.reshape(y, [len(x), -1])

    check_both(model, [layer], x)


def test_kernel_of_one_pixel_is_a_dense_layer():
    layer = L.Conv2D(3, 1, strides=2)
    x = built(layer, (2, 5, 4, 2))
    (record,) = check_both(layer, [layer], x)
    inputs = record.canonical_inputs("float64", 2)
    np.testing.assert_array_equal(
        inputs[..., :2], x[:, ::2, ::2].reshape(2, -1, 2)
    )


def test_half_precision():
    """Inputs of a mixed policy; the canonical form is in float32."""
    layer = L.Conv2D(3, 2, dtype="mixed_float16")
    x = built(layer, (2, 4, 4, 2)).astype("float16")
    (spec,) = linear_maps(layer)
    rows = spec.inputs(tf.constant(x)).cast("float32")
    assert rows.dtype == tf.float32
    own = patches(layer, tf.constant(x, tf.float32)).to_dense()
    np.testing.assert_array_equal(rows.to_dense(), own)
    layer = L.SeparableConv2D(3, 2, dtype="mixed_float16")
    x = built(layer, (2, 4, 4, 2)).astype("float16")
    for spec in linear_maps(layer):
        assert spec.inputs(tf.constant(x)).dtype == tf.float16
        g = tf.zeros([2, 3, 3, 3], tf.float16)
        assert spec.cotangents(g).dtype == tf.float16


def test_subclass_with_another_convolution_is_not_captured():
    class Standardised(L.Conv2D):
        def convolution_op(self, inputs, kernel):
            return super().convolution_op(inputs, kernel - kernel.mean())

    class Named(L.Conv2D):
        pass

    shape = (None, 4, 4, 2)
    other, named = Standardised(2, 2), Named(2, 2)
    for layer in (other, named):
        layer.build(shape)
    assert linear_maps(other) == ()
    assert linear_maps(named) != ()
