"""Layers with a parameter per element."""

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_natgrad import _compat
from keras_natgrad.capture import Taps, linear_maps

from .conftest import check, check_examples, randomized

pytestmark = pytest.mark.usefixtures("float64")


@settings(max_examples=15, deadline=None)
@given(
    shape=st.lists(st.integers(1, 3), min_size=1, max_size=3), data=st.data()
)
def test_prelu(shape, data):
    shared = data.draw(
        st.lists(st.integers(1, len(shape)), max_size=len(shape), unique=True)
    )
    layer = keras.layers.PReLU(shared_axes=shared or None, dtype="float64")
    x = np.random.default_rng(0).normal(size=(3, *shape))
    randomized(layer, x)
    (spec,) = linear_maps(layer)
    assert spec.layout.groups == layer.alpha.shape.num_elements()
    assert spec.block == "full"
    check(layer, [layer], x, product=False)
    check_examples(layer, [layer], x)
    with Taps([layer]) as taps:
        layer(x)
    found = taps.record(layer).canonical_inputs("float64", 3)
    np.testing.assert_allclose(
        np.sort(np.ravel(found)), np.sort(np.minimum(x, 0).ravel())
    )


def test_negative_shared_axis():
    """Keras counts a negative one in the shape of α: this is axis 1."""
    layer = keras.layers.PReLU(shared_axes=[-1])
    x = np.random.default_rng(0).normal(size=(3, 2, 4))
    randomized(layer, x)
    check(layer, [layer], x, product=False)
    check_examples(layer, [layer], x)


@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 3, 4)])
def test_layer_scale(shape):
    """Of ConvNeXt: one scale per channel, `z = x γ`."""
    layer = _compat.layer_scale_class()(1e-6, 4, dtype="float64")
    x = np.random.default_rng(0).normal(size=(3, *shape))
    randomized(layer, x)
    (spec,) = linear_maps(layer)
    assert spec.layout.groups == 4
    assert spec.block == "full"
    check(layer, [layer], x)
    check_examples(layer, [layer], x)
