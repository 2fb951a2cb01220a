"""Projections of attention layers, through their EinsumDense parts."""

import keras
import numpy as np
import pytest

from keras_natgrad._compat import flatten_layers
from keras_natgrad.capture import make_plan
from tests.reference.bridge import randomize

from .conftest import check_both

layers = keras.layers
pytestmark = pytest.mark.usefixtures("float64")


def inputs(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def projections(attention):
    return [
        layer
        for layer in flatten_layers(attention)
        if isinstance(layer, layers.EinsumDense)
    ]


def check_attention(attention, x, call=None, bias=True):
    call = call or (lambda x: attention(x, x))
    call(x)
    rng = np.random.default_rng(1)
    for variable in attention.weights:
        variable.assign(rng.normal(size=tuple(variable.shape)))
    found = projections(attention)
    assert len(found) == 4
    for record in check_both(call, found, x):
        assert (record.spec.layout.bias_shape is not None) == bias


MULTI_HEAD = {
    "plain": {},
    "value size": {"value_dim": 2},
    "output size": {"output_shape": 5},
    "no bias": {"use_bias": False},
    "one head": {"num_heads": 1},
}


@pytest.mark.variants("plain", "value size", "output size", "no bias")
@pytest.mark.parametrize("name", MULTI_HEAD)
def test_multi_head_attention(name):
    options = {"num_heads": 2, "key_dim": 3, **MULTI_HEAD[name]}
    attention = layers.MultiHeadAttention(**options)
    check_attention(attention, inputs(2, 3, 4), bias=name != "no bias")


@pytest.mark.parametrize("axes", [(1,), (2,), (1, 2)])
def test_attention_axes(axes):
    attention = layers.MultiHeadAttention(
        2, 3, value_dim=2, attention_axes=axes
    )
    check_attention(attention, inputs(2, 2, 3, 4))


def test_cross_attention():
    """Queries, keys and values of three sizes, keys of another length."""
    attention = layers.MultiHeadAttention(2, 3)
    own = inputs(1, 5, 3, seed=1)

    def call(x):
        values = own * x[:, :1, :1]
        return attention(x, values, values[..., :2])

    check_attention(attention, inputs(2, 3, 4), call)


@pytest.mark.parametrize("name", ["causal", "attention", "value"])
def test_masks(name):
    """A position nobody may look at has no part in keys and values."""
    attention = layers.MultiHeadAttention(2, 3)
    x = inputs(3, 4, 2)
    options = {
        "causal": lambda n: {"use_causal_mask": True},
        "attention": lambda n: {
            "attention_mask": np.tile(np.tri(4, k=1) > 0, (n, 1, 1))
        },
        "value": lambda n: {
            "value_mask": np.tile([True, True, False, True], (n, 1))
        },
    }[name]
    check_attention(attention, x, lambda x: attention(x, x, **options(len(x))))


GROUPED = {
    "plain": (4, 2, {}),
    "one key": (2, 1, {}),
    "all keys": (2, 2, {}),
    "no bias": (2, 1, {"use_bias": False}),
}


@pytest.mark.variants(
    "False-plain", "False-one key", "False-all keys", "False-no bias"
)
@pytest.mark.parametrize("name", GROUPED)
@pytest.mark.parametrize("causal", [False, True])
def test_group_query_attention(name, causal):
    """Keys and values that several query heads share."""
    query_heads, key_heads, options = GROUPED[name]
    attention = layers.GroupQueryAttention(3, query_heads, key_heads, **options)
    check_attention(
        attention,
        inputs(2, 3, 4),
        lambda x: attention(x, x, use_causal_mask=causal),
        bias=name != "no bias",
    )


@pytest.mark.parametrize(
    "make",
    [
        lambda: layers.MultiHeadAttention(2, 3),
        lambda: layers.GroupQueryAttention(3, 2, 1),
    ],
)
def test_plan_of_a_model(make):
    """Every variable of attention belongs to a captured projection."""
    x = keras.Input((3, 4))
    attention = make()
    model = keras.Model(x, layers.Dense(1)(attention(x, x)))
    randomize(model)
    plan = make_plan(model, model.trainable_variables)
    assert len(plan.layers) == 5 and plan.fallback == ()
