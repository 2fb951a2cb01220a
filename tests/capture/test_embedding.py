"""Embeddings in canonical form: one-hot rows."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_natgrad.capture import (
    ParameterLayout,
    Taps,
    linear_maps,
    make_plan,
    match_layers,
    registry,
)
from keras_natgrad.capture.embedding import one_hot_rows
from keras_natgrad.capture.registry import why_not_captured
from keras_natgrad.linalg import OneHot

from .conftest import check, check_examples, randomized

pytestmark = pytest.mark.usefixtures("float64")

layers = keras.layers
DEPTH, FEATURES = 5, 3


def tokens(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, DEPTH, size=shape)


@settings(max_examples=12, deadline=None)
@given(shape=st.lists(st.integers(1, 3), min_size=0, max_size=2))
def test_embedding(shape):
    layer = layers.Embedding(DEPTH, FEATURES, dtype="float64")
    ids = tokens(4, *shape)
    layer.build((None, *shape))
    randomized(layer, ids)
    (spec,) = linear_maps(layer)
    assert spec.layout.one_hot and spec.block is None
    (record,) = check(layer, [layer], ids)
    check_examples(layer, [layer], ids)
    rows = record.canonical_inputs("float64", 4)
    assert isinstance(rows, OneHot)
    np.testing.assert_array_equal(
        rows.to_dense(), np.eye(DEPTH)[ids.reshape(4, -1)]
    )


def test_used_twice():
    layer = layers.Embedding(DEPTH, FEATURES)
    ids = tokens(4, 3)
    randomized(layer, ids)

    def model(ids):
        return tf.concat([layer(ids), layer(ids[:, :2])], axis=1)

    (record,) = check(model, [layer], ids)
    check_examples(model, [layer], ids)
    assert record.canonical_inputs("float64", 4).indices.shape == (4, 5)


def test_integers_of_any_kind():
    """Keras casts floats, and counts negative integers from the end."""
    layer = layers.Embedding(DEPTH, FEATURES)
    ids = np.array([[-1, 2], [-DEPTH, 1]])
    randomized(layer, ids)
    check(layer, [layer], ids)


@pytest.mark.parametrize(
    "dtype",
    [
        *("int8", "int16", "int32", "int64"),
        *("uint8", "uint16", "uint32", "uint64", "float32"),
    ],
)
def test_integers_of_any_size(dtype):
    """The vocabulary may be larger than the largest integer, too."""
    depth = 300
    ids = tf.constant([[1, 4], [100, 1]], dtype)
    rows = one_hot_rows(ids, depth)
    dense = np.eye(depth)[np.asarray(ids, int)]
    np.testing.assert_array_equal(rows.to_dense(), dense)
    moment = dense.reshape(4, depth).T @ dense.reshape(4, depth)
    np.testing.assert_array_equal(rows.second_moment(), moment)
    np.testing.assert_array_equal(rows.squares(), np.diag(moment))
    g = np.random.default_rng(0).normal(size=(2, 2, FEATURES))
    sums = np.einsum("nsr,nsm->nrm", dense, g)
    np.testing.assert_allclose(
        rows.cast("float64").gradient_squares(tf.constant(g)),
        np.square(sums).sum(axis=0),
    )
    np.testing.assert_allclose(
        rows.cast("float64").matmul(tf.eye(depth, dtype="float64")), dense
    )


@pytest.mark.parametrize("dtypes", [("int32", "int64"), ("uint8", "int64")])
def test_uses_with_integers_of_different_sizes(dtypes):
    layer = layers.Embedding(DEPTH, FEATURES)
    randomized(layer, tokens(4, 3))

    def model(ids):
        uses = [layer(tf.cast(ids, dtype)) for dtype in dtypes]
        return tf.concat(uses, axis=1)

    check(model, [layer], tokens(4, 3))
    check_examples(model, [layer], tokens(4, 3))


def test_integers_out_of_range_look_up_nothing():
    rows = one_hot_rows(tf.constant([[DEPTH, 1, -DEPTH - 1]]), DEPTH)
    dense = rows.to_dense().numpy()
    np.testing.assert_array_equal(dense[0], [[0] * 5, [0, 1, 0, 0, 0], [0] * 5])


def test_masked_tokens():
    """They look up their row; the mask keeps them out of the loss."""
    embedding = layers.Embedding(DEPTH, FEATURES, mask_zero=True)
    model = keras.Sequential(
        [
            keras.Input((4,), dtype="int32"),
            embedding,
            layers.GlobalAveragePooling1D(),
            layers.Dense(2),
        ]
    )
    ids = np.array([[1, 2, 0, 0], [3, 0, 0, 0], [4, 4, 1, 2]])
    randomized(model, ids)
    (record,) = check(model, [embedding], ids)
    check_examples(model, [embedding], ids)
    np.testing.assert_array_equal(
        record.canonical_inputs("float64", 3).indices, ids
    )
    with Taps([embedding]) as taps, tf.GradientTape() as tape:
        loss = tf.reduce_sum(model(ids) ** 2)
    z = taps.record(embedding).preactivations
    cotangents = tape.gradient(loss, z)[0].numpy()
    assert np.all(cotangents[ids == 0] == 0)
    assert np.all(cotangents[ids != 0] != 0)


def test_ragged_integers():
    layer = layers.Embedding(DEPTH, FEATURES)
    layer.build((None, None))
    with Taps([layer]) as taps:
        layer(tf.ragged.constant([[1, 2], [3]]))
    with pytest.raises(ValueError, match="ragged or sparse"):
        taps.record(layer).canonical_inputs("float64", 2)


@pytest.mark.parametrize("order", ["forward", "reverse", "both"])
def test_reversible_embedding_without_tied_weights(order):
    layer = layers.ReversibleEmbedding(DEPTH, FEATURES, tie_weights=False)
    ids, hidden = tokens(4, 2), np.random.default_rng(0).normal(size=(4, 2, 3))
    randomized(layer, ids)
    assert len(linear_maps(layer)) == 2

    def model(ids):
        parts = []
        if order != "forward":
            parts.append(layer(hidden[: len(ids)], reverse=True))
        if order != "reverse":
            parts.append(layer(ids))
        if order == "both":
            parts.append(layer(tf.tanh(parts[1]), reverse=True))
        return tf.concat(parts, axis=-1)

    if order == "both":
        check(model, [layer], ids, product=True)
        return
    with Taps([layer]) as taps:
        model(ids)
    uses = [len(taps.record(layer, index).inputs) for index in (0, 1)]
    assert uses == {"forward": [1, 0], "reverse": [0, 1]}[order]
    unused = 1 - uses.index(1)
    empty = taps.record(layer, 1 - uses.index(0))
    assert len(empty.inputs) == 1
    zeros = taps.record(layer, unused).canonical_cotangents([], "float64", 4)
    assert zeros.shape[:2] == (4, 1)


def test_soft_cap_leaves_the_projection_out():
    layer = layers.ReversibleEmbedding(
        DEPTH, FEATURES, tie_weights=False, logit_soft_cap=5.0
    )
    layer.build((None, 2))
    (spec,) = linear_maps(layer)
    assert spec.variables == (layer.embeddings,)


def test_tied_weights_with_a_soft_cap_fall_back():
    layer = layers.ReversibleEmbedding(DEPTH, FEATURES, logit_soft_cap=5.0)
    ids = keras.Input((2,), dtype="int32")
    model = keras.Model(ids, layer(layer(ids), reverse=True))
    plan = make_plan(model, model.trainable_variables)
    assert plan.layers == () and plan.fallback == (0,)
    assert "with `logit_soft_cap`" in plan.reasons[0]


class Positions(keras.layers.Layer):
    """Adds an embedding of the positions, as in Keras's own examples."""

    def __init__(self, batch_axis=False):
        super().__init__()
        self.tokens = layers.Embedding(DEPTH, FEATURES)
        self.positions = layers.Embedding(4, FEATURES)
        self.batch_axis = batch_axis

    def call(self, ids):
        steps = keras.ops.arange(keras.ops.shape(ids)[-1])
        if self.batch_axis:
            steps = steps[None]
        return self.tokens(ids) + self.positions(steps)


def test_positions_without_a_batch_axis_fall_back():
    layer = Positions()
    model = keras.Sequential([layer, layers.Dense(2)])
    model(tokens(3, 4))
    plan = make_plan(model, model.trainable_variables)
    assert [each.layer_class for each in plan.layers] == ["Embedding", "Dense"]
    assert plan.fallback == (1,)
    assert "without a batch axis" in plan.reasons[0]
    assert why_not_captured(layer.tokens) is None


def test_lacks_batch():
    layer = Positions(batch_axis=True)
    layer(tokens(3, 4))
    with Taps([layer.tokens, layer.positions]) as taps:
        layer(tokens(3, 4))
    assert not taps.record(layer.tokens).lacks_batch(3)
    assert taps.record(layer.tokens).lacks_batch(2)
    assert taps.record(layer.tokens).lacks_batch(None)
    assert taps.record(layer.positions).lacks_batch(3)
    assert not taps.record(layer.positions).lacks_batch(1)


class Borrowing(layers.Dense):
    """A dense layer with the kernel of another one."""

    def __init__(self, lender, holds=True, **kwargs):
        super().__init__(3, use_bias=False, **kwargs)
        self.kernel_of = lambda: lender.kernel
        if holds:
            self.lender = lender

    def build(self, shape):
        self._kernel = self.kernel_of()
        self.bias = None
        self.built = True


class Reading(keras.layers.Layer):
    """The same, of a class that capture does not know."""

    def __init__(self, lender, **kwargs):
        super().__init__(**kwargs)
        self.kernel_of = lambda: lender.kernel

    def build(self, shape):
        self.w = self.kernel_of()

    def call(self, x):
        return x @ self.w


@pytest.mark.parametrize(
    "make",
    [
        Borrowing,
        lambda lender, name: Borrowing(lender, holds=False, name=name),
        Reading,
    ],
)
def test_a_variable_of_two_layers_falls_back(make):
    lender = layers.Dense(3, name="lender")
    lender.build((None, 3))
    model = keras.Sequential(
        [keras.Input((3,)), lender, make(lender, name="borrower")]
    )
    variables = model.trainable_variables
    assert len(variables) == 2
    plan = make_plan(model, variables)
    assert plan.layers == ()
    shared = plan.fallback.index(0)
    names = plan.reasons[shared].removeprefix("variable shared by the layers ")
    assert sorted(names.split(" and ")) == ["borrower", "lender"]
    # Without the other layer it is captured.
    alone = keras.Sequential([keras.Input((3,)), lender])
    plan = make_plan(alone, variables)
    assert match_layers(plan, alone, variables) == [(lender, 0)]


class Around(keras.layers.Layer):
    """A layer whose map has the variables of a layer inside it."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.cell = Cell()

    def build(self, shape):
        self.cell.build(shape)

    def call(self, x):
        return self.cell(x)


class Cell(keras.layers.Layer):
    def build(self, shape):
        self.w = self.add_weight(shape=(shape[-1], 2), name="w")

    def call(self, x):
        return x @ self.w


def test_variables_of_an_inner_layer_are_not_shared(monkeypatch):
    monkeypatch.setattr(registry, "_LAYERS", dict(registry._LAYERS))

    @registry.register_layer(Around)
    def describe(layer):
        return registry.LinearMap(
            variables=(layer.cell.w,),
            layout=ParameterLayout.of_matrix(3, 2, bias=False),
            inputs=lambda x: x[:, None],
            cotangents=lambda g: g[:, None],
        )

    model = keras.Sequential([keras.Input((3,)), Around()])
    plan = make_plan(model, model.trainable_variables)
    assert [layer.layer_class for layer in plan.layers] == ["Around"]
    assert plan.fallback == ()


def test_nested_models_share_nothing():
    inner = keras.Sequential(
        [keras.Input((4,)), layers.Embedding(DEPTH, FEATURES)]
    )
    x = keras.Input((4,))
    model = keras.Model(x, layers.Dense(2)(inner(x)))
    plan = make_plan(model, model.trainable_variables)
    assert len(plan.layers) == 2 and plan.fallback == ()
