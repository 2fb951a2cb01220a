"""A matrix that is used as E and as Eᵀ, in canonical form."""

import dataclasses

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_natgrad.capture import (
    LinearMap,
    ParameterLayout,
    Plan,
    Taps,
    linear_maps,
    make_plan,
    match_layers,
    registry,
)
from keras_natgrad.capture.positions import shared_positions
from keras_natgrad.linalg import (
    OneHot,
    TwoWayCotangents,
    TwoWayRows,
    contract_rows,
)

from .conftest import randomized

pytestmark = pytest.mark.usefixtures("float64")

layers = keras.layers
DEPTH, FEATURES, BATCH = 5, 3, 4


def tokens(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, DEPTH, size=shape)


def lookup_first(layer, ids, hidden):
    """Language model: the logits depend on both uses."""
    x = tf.tanh(layer(ids)) + hidden[:, : ids.shape[1]]
    return layer(x, reverse=True)


def projection_first(layer, ids, hidden):
    """The embeddings of the tokens, weighted by earlier logits."""
    weights = tf.nn.softmax(layer(hidden, reverse=True))
    return (
        layer(ids)
        * tf.reduce_sum(weights[..., :2], axis=[1, 2])[
            :, tf.newaxis, tf.newaxis
        ]
    )


def several_uses(layer, ids, hidden):
    """Three projections and two lookups, interleaved."""
    first = layer(hidden, reverse=True)
    scale = tf.reduce_sum(tf.tanh(first), axis=[1, 2], keepdims=True)
    x = layer(ids[:, :1]) + hidden * scale
    second = layer(x, reverse=True)
    x = tf.concat([layer(ids), tf.tanh(x)], axis=1)
    return tf.concat([first, second, layer(x, reverse=True)], axis=1)


def only_lookup(layer, ids, hidden):
    return layer(ids)


def only_projection(layer, ids, hidden):
    return layer(hidden, reverse=True)


MODELS = {
    "lookup_first": (lookup_first, 1, 1),
    "projection_first": (projection_first, 1, 1),
    "several": (several_uses, 2, 3),
    "only_lookup": (only_lookup, 1, 0),
    "only_projection": (only_projection, 0, 1),
}


@pytest.fixture
def layer():
    layer = layers.ReversibleEmbedding(DEPTH, FEATURES)
    return randomized(layer, tokens(BATCH, 2))


def gradients_of_uses(layer, model, ids, hidden, loss_of):
    """Gradients of one example by lookups and by projections.

    Brute force: the same model with two copies of E, one for each use.
    """
    one = layers.Embedding(DEPTH, FEATURES)
    one.build((None, None))
    two = tf.Variable(layer.embeddings.value)
    one.embeddings.assign(two)

    def copies(x, reverse=False):
        return tf.matmul(x, two, transpose_b=True) if reverse else one(x)

    with tf.GradientTape() as tape:
        loss = loss_of(model(copies, ids, hidden))
    found = tape.gradient(
        loss,
        [one.embeddings.value, two],
        unconnected_gradients=tf.UnconnectedGradients.ZERO,
    )
    return [tf.convert_to_tensor(gradient).numpy() for gradient in found]


@pytest.mark.parametrize("name", MODELS)
def test_both_uses_equal_brute_force(name, layer):
    model, lookups, projections = MODELS[name]
    rng = np.random.default_rng(1)
    ids, hidden = tokens(BATCH, 2), rng.normal(size=(BATCH, 3, FEATURES))
    (spec,) = linear_maps(layer)
    assert spec.block == "tied" and spec.layout.two_way
    with Taps([layer]) as taps, tf.GradientTape(persistent=True) as tape:
        outputs = model(layer, ids, tf.constant(hidden))
        weights = rng.normal(size=tuple(outputs.shape))
        loss = tf.reduce_sum(tf.tanh(outputs) * weights)
    record = taps.record(layer)
    z = list(record.preactivations)
    assert [x.shape[-1] for x in z] == [FEATURES] * lookups + [
        DEPTH
    ] * projections
    rows = record.canonical_inputs("float64", BATCH)
    sent = record.canonical_cotangents(tape.gradient(loss, z), "float64", BATCH)
    assert isinstance(rows, TwoWayRows) and isinstance(sent, TwoWayCotangents)
    assert isinstance(rows.direct, OneHot) == bool(lookups)
    found = contract_rows(rows, sent)
    direct = contract_rows(rows.direct, sent.direct)
    transposed = contract_rows(sent.transposed, rows.transposed)
    for i in range(BATCH):
        expected = gradients_of_uses(
            layer,
            model,
            ids[i : i + 1],
            tf.constant(hidden[i : i + 1]),
            lambda y, i=i: tf.reduce_sum(tf.tanh(y) * weights[i : i + 1]),
        )
        np.testing.assert_allclose(
            direct[i], expected[0], rtol=1e-9, atol=1e-12
        )
        np.testing.assert_allclose(
            transposed[i], expected[1], rtol=1e-9, atol=1e-12
        )
        np.testing.assert_allclose(
            found[i], sum(expected), rtol=1e-9, atol=1e-12
        )
    tied = tape.gradient(loss, layer.embeddings.value)
    tied = tf.convert_to_tensor(tied)
    np.testing.assert_allclose(
        tf.reduce_sum(found, 0), tied, rtol=1e-9, atol=1e-12
    )
    # The map itself: z = e E and z = h Eᵀ.
    values = record.canonical_cotangents(z, "float64", BATCH)
    matrix = layer.embeddings.value
    if lookups:
        np.testing.assert_allclose(
            values.direct, rows.direct.matmul(matrix), rtol=1e-9, atol=1e-12
        )
    if projections:
        np.testing.assert_allclose(
            values.transposed,
            tf.einsum("bsi,vi->bsv", rows.transposed, matrix),
            rtol=1e-9,
            atol=1e-12,
        )


def test_jacobians_of_the_logits(layer):
    """Per-example Jacobians `∂ logits / ∂E`, one backward pass per logit."""
    rng = np.random.default_rng(1)
    ids, hidden = tokens(BATCH, 2), rng.normal(size=(BATCH, 2, FEATURES))
    with Taps([layer]) as taps, tf.GradientTape(persistent=True) as tape:
        outputs = lookup_first(layer, ids, hidden)
    record = taps.record(layer)
    rows = record.canonical_inputs("float64", BATCH)
    jacobian = tf.convert_to_tensor(
        tape.jacobian(outputs, layer.embeddings.value)
    )
    for position in range(2):
        for logit in range(DEPTH):
            unit = np.zeros(tuple(outputs.shape))
            unit[:, position, logit] = 1.0
            sent = record.canonical_cotangents(
                tape.gradient(
                    outputs,
                    list(record.preactivations),
                    output_gradients=tf.constant(unit),
                ),
                "float64",
                BATCH,
            )
            np.testing.assert_allclose(
                contract_rows(rows, sent),
                jacobian[:, position, logit],
                rtol=1e-9,
                atol=1e-12,
            )


def test_masked_tokens():
    """The mask keeps them out of the loss, not out of the lookup."""
    layer = layers.ReversibleEmbedding(DEPTH, FEATURES, mask_zero=True)
    ids = np.array([[1, 2, 0], [3, 0, 0]])
    randomized(layer, ids)
    with Taps([layer]) as taps, tf.GradientTape() as tape:
        x = layer(ids)
        logits = layer(tf.tanh(x), reverse=True)
        mask = tf.cast(x._keras_mask, tf.float64)[..., tf.newaxis]
        loss = tf.reduce_sum(mask * tf.square(logits))
    record = taps.record(layer)
    sent = record.canonical_cotangents(
        tape.gradient(loss, list(record.preactivations)), "float64", 2
    )
    rows = record.canonical_inputs("float64", 2)
    np.testing.assert_array_equal(rows.direct.indices, ids)
    for g in sent:
        assert np.all(g.numpy()[ids == 0] == 0)
        assert np.all(g.numpy()[ids != 0] != 0)


@pytest.mark.parametrize("first", ["lookup", "projection"])
def test_plan(first):
    layer = layers.ReversibleEmbedding(DEPTH, FEATURES)
    ids = keras.Input((2,), dtype="int32")
    if first == "lookup":
        outputs = layer(layers.Dense(FEATURES)(layer(ids)), reverse=True)
        model = keras.Model(ids, outputs)
    else:
        hidden = keras.Input((2, FEATURES))
        layer.build((None, 2))
        logits = layer(layers.Dense(FEATURES)(hidden), reverse=True)
        model = keras.Model([hidden, ids], [logits, layer(ids)])
    variables = model.trainable_variables
    plan = make_plan(model, variables)
    assert plan.fallback == ()
    assert Plan.from_config(plan.get_config()) == plan
    found = {each.layer_class: each for each in plan.layers}
    entry = found["ReversibleEmbedding"]
    assert entry.block == "tied" and entry.layout.two_way
    assert (layer, 0) in match_layers(plan, model, variables)
    assert shared_positions(layer) is None
    # What takes one-way matrices only leaves it out, with the reason.
    for reduced in (plan.only_one_way("why"), plan.only_matrices("why")):
        assert [each.layer_class for each in reduced.layers] == ["Dense"]
        assert reduced.fallback == entry.variables
        assert reduced.reasons == ("ReversibleEmbedding variable: why",)


def test_positions_of_a_layer_with_two_matrices_are_not_known():
    layer = layers.ReversibleEmbedding(DEPTH, FEATURES, tie_weights=False)
    layer.build((None, 4))
    assert [shared_positions(layer, index) for index in (0, 1)] == [None, None]


def of_matrix(inputs, outputs, bias=False):
    return ParameterLayout.of_matrix(inputs, outputs, bias)


@pytest.mark.parametrize(
    ("two_way", "bias", "transposed", "message"),
    [
        (True, False, None, "if and only if"),
        (False, False, (2, 3), "if and only if"),
        (True, False, (3, 2), "inputs and outputs exchanged"),
        (True, True, (2, 3), "no bias"),
    ],
)
def test_maps_that_do_not_fit(two_way, bias, transposed, message):
    def make(layout, other=None):
        return LinearMap((), layout, tf.identity, tf.identity, transposed=other)

    other = None if transposed is None else make(of_matrix(*transposed))
    layout = dataclasses.replace(of_matrix(3, 2, bias), two_way=two_way)
    with pytest.raises(ValueError, match=message):
        make(layout, other)


class TiedCode(keras.layers.Layer):
    """An autoencoder's matrix: `x W` where it encodes, `h Wᵀ` elsewhere."""

    def build(self, shape):
        self.w = self.add_weight(shape=(4, 2), name="w")

    def call(self, x, decode=False):
        return tf.matmul(x, self.w, transpose_b=decode)


def test_a_layer_of_ones_own(monkeypatch):
    """Dense rows on both sides."""
    monkeypatch.setattr(registry, "_LAYERS", dict(registry._LAYERS))

    @registry.register_layer(TiedCode)
    def describe(layer):
        decode = LinearMap(
            variables=(layer.w,),
            layout=of_matrix(2, 4),
            inputs=lambda h: h[:, tf.newaxis],
            cotangents=lambda u: u[:, tf.newaxis],
            applies=lambda decode=False: decode,
        )
        return LinearMap(
            variables=(layer.w,),
            layout=dataclasses.replace(of_matrix(4, 2), two_way=True),
            inputs=lambda x: x[:, tf.newaxis],
            cotangents=lambda g: g[:, tf.newaxis],
            block="tied",
            applies=lambda decode=False: not decode,
            transposed=decode,
        )

    layer, x = TiedCode(), np.random.default_rng(0).normal(size=(BATCH, 4))
    randomized(layer, x)
    with Taps([layer]) as taps, tf.GradientTape(persistent=True) as tape:
        outputs = layer(tf.tanh(layer(x)), decode=True)
        loss = tf.reduce_sum(tf.square(outputs - x), axis=-1)
    record = taps.record(layer)
    found = contract_rows(
        record.canonical_inputs("float64", BATCH),
        record.canonical_cotangents(
            tape.gradient(loss, list(record.preactivations)), "float64", BATCH
        ),
    )
    expected = tape.jacobian(loss, layer.w.value)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)
