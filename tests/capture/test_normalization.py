"""Scale and shift of normalisation layers in canonical form."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_natgrad.capture import Taps, linear_maps, make_plan
from keras_natgrad.capture.registry import why_not_captured

from .conftest import check, check_examples, randomized

pytestmark = pytest.mark.usefixtures("float64")

layers = keras.layers
EXAMPLES = settings(max_examples=12, deadline=None)
SHAPES = st.lists(st.integers(1, 3), min_size=1, max_size=3)
FLAGS = st.sampled_from([(True, True), (True, False), (False, True)])


def inputs(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape) + 0.3


def canonical(layer, x, **arguments):
    """The layer's canonical inputs, `[groups, batch, shared, rows]`."""
    with Taps([layer]) as taps:
        layer(x, **arguments)
    return taps.record(layer).canonical_inputs("float64", len(x)).numpy()


def standardised(x, axes, epsilon, center=True):
    mean = x.mean(axis=axes, keepdims=True)
    return (x - center * mean) / np.sqrt(
        x.var(axis=axes, keepdims=True) + epsilon
    )


def elements_first(x, axes):
    """`[batch, ...]` to `[elements, batch, shared]`."""
    axes = [axis % x.ndim for axis in axes]
    rest = [axis for axis in range(1, x.ndim) if axis not in axes]
    moved = x.transpose([*sorted(axes), 0, *rest])
    return moved.reshape(-1, len(x), int(np.prod([x.shape[a] for a in rest])))


def assert_spec(layer, flags):
    (spec,) = linear_maps(layer)
    assert spec.block == "full"
    assert spec.layout.rows == sum(flags) and spec.layout.columns == 1
    scale, shift = flags
    expected = [layer.gamma] * scale + [layer.beta] * shift
    assert [v.path for v in spec.variables] == [v.path for v in expected]


@EXAMPLES
@given(shape=SHAPES, flags=FLAGS, data=st.data())
def test_layer_normalization(shape, flags, data):
    rank = len(shape) + 1
    axes = data.draw(
        st.lists(
            st.integers(1, rank - 1), min_size=1, max_size=rank - 1, unique=True
        )
    )
    if data.draw(st.booleans()):
        axes = [axis - rank for axis in axes]
    layer = layers.LayerNormalization(
        axes, scale=flags[0], center=flags[1], dtype="float64"
    )
    x = inputs(2, *shape)
    randomized(layer, x)
    assert_spec(layer, flags)
    check(layer, [layer], x, product=flags[0])
    check_examples(layer, [layer], x)
    if flags[0]:
        expected = standardised(x, tuple(axes), layer.epsilon)
        np.testing.assert_allclose(
            canonical(layer, x)[..., 0],
            elements_first(expected, axes),
            rtol=1e-9,
            atol=1e-12,
        )


def test_axes_of_mixed_signs():
    """Keras reshapes a scale of shape (2, 3) to the axes' own order."""
    layer = layers.LayerNormalization([1, -1])
    x = inputs(4, 3, 5, 2)
    randomized(layer, x)
    assert layer.gamma.shape == (2, 3)
    check(layer, [layer], x)
    check_examples(layer, [layer], x)


@pytest.mark.filterwarnings("ignore:You passed `rms_scaling")
def test_layer_normalization_with_rms_scaling():
    layer = layers.LayerNormalization(rms_scaling=True)
    x = inputs(3, 2, 4)
    randomized(layer, x)
    check(layer, [layer], x)
    check_examples(layer, [layer], x)
    expected = standardised(x, -1, layer.epsilon, center=False)
    np.testing.assert_allclose(
        canonical(layer, x)[..., 0], elements_first(expected, [-1]), rtol=1e-9
    )


@EXAMPLES
@given(shape=SHAPES, count=st.integers(1, 3), negative=st.booleans())
def test_rms_normalization(shape, count, negative):
    count = min(count, len(shape))
    rank = len(shape) + 1
    axes = [rank - 1 - i - rank * negative for i in range(count)]
    layer = layers.RMSNormalization(axes, dtype="float64")
    x = inputs(3, *shape)
    randomized(layer, x)
    check(layer, [layer], x)
    check_examples(layer, [layer], x)
    scale = np.sqrt((x**2).mean(axis=tuple(axes), keepdims=True) + 1e-6)
    np.testing.assert_allclose(
        canonical(layer, x)[..., 0],
        elements_first(x / scale, axes),
        rtol=1e-9,
    )


def test_rms_normalization_of_an_inner_axis():
    """Keras aligns the scale with the last axis whichever is normalised."""
    layer = layers.RMSNormalization(axis=1)
    x = inputs(4, 3, 3)
    randomized(layer, x)
    check(layer, [layer], x)
    check_examples(layer, [layer], x)


@EXAMPLES
@given(
    groups=st.integers(1, 3),
    width=st.integers(1, 2),
    sides=st.lists(st.integers(1, 3), min_size=0, max_size=2),
    data=st.data(),
    flags=FLAGS,
)
def test_group_normalization(groups, width, sides, data, flags):
    axis = data.draw(st.integers(1, len(sides) + 1))
    shape = [*sides[: axis - 1], groups * width, *sides[axis - 1 :]]
    if data.draw(st.booleans()):
        axis -= len(shape) + 1
    layer = layers.GroupNormalization(
        groups, axis, scale=flags[0], center=flags[1], dtype="float64"
    )
    x = inputs(2, *shape)
    randomized(layer, x)
    assert_spec(layer, flags)
    check(layer, [layer], x, product=flags[0])
    check_examples(layer, [layer], x)
    if flags[0]:
        moved = np.moveaxis(x, axis, 1).reshape(2, groups, -1)
        expected = standardised(moved, -1, layer.epsilon)
        expected = expected.reshape(2, groups * width, -1).swapaxes(0, 1)
        np.testing.assert_allclose(
            canonical(layer, x)[..., 0], expected, rtol=1e-9, atol=1e-12
        )


def test_instance_normalization():
    layer = layers.GroupNormalization(groups=-1)
    x = inputs(3, 5, 4)
    randomized(layer, x)
    check(layer, [layer], x)
    check_examples(layer, [layer], x)


@EXAMPLES
@given(shape=SHAPES, flags=FLAGS, training=st.booleans(), data=st.data())
def test_batch_normalization(shape, flags, training, data):
    axis = data.draw(st.sampled_from([*range(1, len(shape) + 1), -1]))
    layer = layers.BatchNormalization(
        axis, scale=flags[0], center=flags[1], dtype="float64"
    )
    x = inputs(4, *shape)
    randomized(layer, x)
    assert_spec(layer, flags)

    def call(x):
        return layer(x, training=training)

    check(call, [layer], x, product=flags[0])
    if not training:
        check_examples(call, [layer], x)
    if flags[0] and training:
        last = np.moveaxis(x, axis, -1)
        rest = tuple(range(x.ndim - 1))
        np.testing.assert_allclose(
            canonical(layer, x, training=True)[..., 0],
            elements_first(standardised(last, rest, layer.epsilon), [-1]),
            rtol=1e-8,
            atol=1e-10,
        )


def test_inference_uses_the_moving_statistics():
    layer = layers.BatchNormalization()
    x = inputs(4, 3)
    randomized(layer, x)
    mean, variance = (
        np.asarray(v) for v in (layer.moving_mean, layer.moving_variance)
    )
    found = canonical(layer, x, training=False)[:, :, 0, 0].T
    np.testing.assert_allclose(
        found, (x - mean) / np.sqrt(variance + 1e-3), rtol=1e-9
    )
    default = canonical(layer, x)[:, :, 0, 0].T
    np.testing.assert_array_equal(default, found)


def test_frozen_batch_normalization_is_recorded_in_inference_mode():
    layer = layers.BatchNormalization()
    x = inputs(4, 3)
    randomized(layer, x)
    layer.trainable = False
    check(lambda x: layer(x, training=True), [layer], x)


@pytest.mark.parametrize("masked", ["some", "none", "all but one"])
def test_batch_normalization_with_a_mask(masked):
    layer = layers.BatchNormalization()
    x = inputs(3, 4, 2)
    randomized(layer, x)
    mask = np.ones([3, 4], bool)
    if masked == "some":
        mask[0, 1:] = mask[2, 3] = False
    elif masked == "all but one":
        mask[:] = False
        mask[1, 2] = True
    check(lambda x: layer(x, training=True, mask=mask), [layer], x)
    kept = x[mask]
    count = len(kept) + keras.config.epsilon()
    mean = kept.sum(axis=0) / count
    variance = ((kept - mean) ** 2).sum(axis=0) / count
    found = canonical(layer, x, training=True, mask=mask)[..., 0]
    expected = (x - mean) / np.sqrt(variance + layer.epsilon)
    np.testing.assert_allclose(
        found, elements_first(expected, [-1]), rtol=1e-9, atol=1e-12
    )


def test_mask_that_keras_hands_on():
    model = keras.Sequential(
        [
            keras.Input((4, 2)),
            layers.Masking(),
            layers.BatchNormalization(),
        ]
    )
    x = inputs(3, 4, 2)
    x[0, 2:] = 0.0
    randomized(model, x)
    check(lambda x: model(x, training=True), [model.layers[-1]], x)


@pytest.mark.parametrize(
    "make",
    [
        layers.BatchNormalization,
        layers.LayerNormalization,
        lambda: layers.GroupNormalization(2),
        layers.RMSNormalization,
    ],
)
def test_scale_of_zero(make):
    """x̂ is not z divided by the scale."""
    layer = make()
    x = inputs(4, 3, 2)
    randomized(layer, x)
    scale = layer.gamma if hasattr(layer, "gamma") else layer.scale
    scale.assign(np.zeros(scale.shape))
    check(layer, [layer], x)
    assert np.abs(canonical(layer, x)[..., 0]).min() > 1e-3


@pytest.mark.parametrize("frozen", ["gamma", "beta"])
def test_a_parameter_frozen_by_itself(frozen):
    """The other one is a map of its own."""
    layer = layers.LayerNormalization()
    x = inputs(4, 3)
    randomized(layer, x)
    getattr(layer, frozen).trainable = False
    (spec,) = linear_maps(layer)
    other = {"gamma": layer.beta, "beta": layer.gamma}[frozen]
    assert [v.path for v in spec.variables] == [other.path]
    check(layer, [layer], x, product=False)


def test_layer_used_twice_and_on_several_positions():
    layer = layers.LayerNormalization()
    x = inputs(3, 2, 4)

    def model(x):
        return layer(tf.tanh(layer(x)))

    randomized(layer, x)
    check(model, [layer], x)
    check_examples(model, [layer], x)


def test_what_has_no_map():
    layer = layers.BatchNormalization(renorm=True)
    layer.build((None, 3))
    assert linear_maps(layer) == ()
    assert why_not_captured(layer) == "batch renormalisation"
    for layer in (
        layers.LayerNormalization(scale=False, center=False),
        layers.BatchNormalization(scale=False, center=False),
        layers.UnitNormalization(),
    ):
        layer.build((None, 3))
        assert linear_maps(layer) == ()
        assert not layer.trainable_variables


def test_reason_in_the_plan():
    model = keras.Sequential(
        [keras.Input((3,)), layers.BatchNormalization(renorm=True)]
    )
    plan = make_plan(model, model.trainable_variables)
    assert plan.layers == () and plan.fallback == (0, 1)
    assert set(plan.reasons) == {"BatchNormalization: batch renormalisation"}


@pytest.mark.parametrize("dtype", ["mixed_float16", "mixed_bfloat16"])
@pytest.mark.parametrize(
    "make",
    [
        layers.BatchNormalization,
        layers.LayerNormalization,
        lambda **kw: layers.GroupNormalization(2, **kw),
        layers.RMSNormalization,
    ],
)
def test_half_precision(make, dtype):
    """x̂ is computed in float32 from the half-precision input."""
    layer = make(dtype=dtype)
    x = tf.cast(inputs(5, 3, 4), dtype.removeprefix("mixed_"))
    layer(x)
    found = canonical(layer, x)
    wide = make(dtype="float32")
    wide.build(x.shape)
    expected = canonical(wide, tf.cast(x, "float32"))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
