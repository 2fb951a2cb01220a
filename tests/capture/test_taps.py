"""Taps record one forward pass and leave nothing behind."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_natgrad as kng
from keras_natgrad._compat import flatten_layers
from keras_natgrad.capture import Taps
from tests.reference.bridge import mlp, randomize
from tests.reference.unknown import Unknown

from .conftest import check, check_both, randomized

pytestmark = pytest.mark.usefixtures("float64")


def dense_of(model):
    return [
        layer
        for layer in flatten_layers(model)
        if isinstance(layer, keras.layers.Dense)
    ]


def inputs(*shape):
    return np.random.default_rng(0).normal(size=shape)


class Subclassed(keras.Model):
    """Two layers, one of them used twice, and a nested model."""

    def __init__(self):
        super().__init__()
        self.first = keras.layers.Dense(3, activation="tanh")
        self.shared = keras.layers.Dense(3, activation="sigmoid")
        self.inner = keras.Sequential(
            [keras.layers.Dense(4, activation="relu"), keras.layers.Dense(2)]
        )

    def call(self, x):
        x = self.first(x)
        return self.inner(self.shared(self.shared(x)))


def test_subclassed_model_with_shared_layer_and_nested_model():
    model = Subclassed()
    x = inputs(4, 2)
    model(x)
    randomize(model)
    layers = dense_of(model)
    assert len(layers) == 4
    records = check(model, layers, x)
    uses = [len(record.preactivations) for record in records]
    assert sorted(uses) == [1, 1, 1, 2]


def test_shared_layer_on_different_lengths():
    tied = keras.layers.Dense(3, activation="tanh")
    one, two = keras.Input((4, 3)), keras.Input((3,))
    model = keras.Model([one, two], [tied(one), tied(tied(two))])
    randomize(model)
    (record,) = check(model, [tied], [inputs(5, 4, 3), inputs(5, 3)])
    assert record.canonical_inputs("float64", 5).shape == (5, 6, 4)


def direct_and_folded(layer, first, sides):
    """Calls a layer on the first part of x, and on all parts in the batch."""

    def model(x):
        part = x[:, 0]
        rest = tf.reshape(x, [-1, *sides])
        calls = [part, rest] if first == "direct" else [rest, part]
        outputs = [tf.reshape(layer(each), [len(x), -1]) for each in calls]
        return tf.concat(outputs, axis=1)

    return model


@pytest.mark.parametrize("first", ["direct", "folded"])
@pytest.mark.parametrize(
    ("make", "sides"),
    [
        (lambda: keras.layers.Dense(2), (3,)),
        (lambda: keras.layers.EinsumDense("bd,de->be", 2), (3,)),
        (lambda: keras.layers.LayerNormalization(), (3,)),
        (lambda: keras.layers.Conv2D(2, 2), (3, 4, 2)),
        (lambda: keras.layers.Conv2D(2, 2, groups=2), (3, 4, 2)),
        (lambda: keras.layers.Embedding(5, 3), (3,)),
    ],
)
def test_uses_with_and_without_a_folded_batch(make, sides, first):
    """Positions are taken out of the batch use by use."""
    layer = make()
    shape = (4, 2, *sides)
    x = inputs(*shape)
    if isinstance(layer, keras.layers.Embedding):
        x = np.random.default_rng(0).integers(0, 5, size=shape)
    randomized(layer, x[:, 0])
    check_both(direct_and_folded(layer, first, sides), [layer], x)


def test_uses_with_and_without_time_steps():
    dense = keras.layers.Dense(2, "tanh")
    source = keras.Input((3, 4))
    own = dense(keras.layers.GlobalAveragePooling1D()(source))
    steps = keras.layers.TimeDistributed(dense)(source)
    outputs = keras.layers.Concatenate()([own, keras.layers.Flatten()(steps)])
    model = keras.Model(source, outputs)
    operators = kng.fisher(model, inputs(5, 3, 4), kng.heads.Normal())
    assert operators[dense.path].shape == (10, 10)


def test_functional_model_in_a_model():
    inner = mlp([3, 4, 3], "sigmoid")
    outer_inputs = keras.Input((3,))
    outer = keras.Model(
        outer_inputs, keras.layers.Dense(2)(inner(inner(outer_inputs)))
    )
    randomize(outer)
    records = check(outer, dense_of(outer), inputs(4, 3))
    assert sorted(len(r.preactivations) for r in records) == [1, 2, 2]


def test_frozen_layers_are_recorded_all_the_same():
    model = mlp([3, 4, 2])
    model.layers[0].trainable = False
    x = inputs(4, 3)
    with Taps(dense_of(model)) as taps:
        model(x)
    for layer in dense_of(model):
        assert len(taps.record(layer).preactivations) == 1


def test_time_distributed_layer():
    inner = keras.layers.Dense(3, activation="tanh")
    model = keras.Sequential(
        [keras.Input((4, 2)), keras.layers.TimeDistributed(inner)]
    )
    randomize(model)
    (record,) = check(model, [inner], inputs(5, 4, 2))
    assert record.canonical_inputs("float64", 5).shape == (5, 4, 3)


def attributes(layers):
    return [dict(vars(layer)) for layer in layers]


def test_nothing_remains_on_the_layers():
    model = mlp([3, 4, 2])
    layers = flatten_layers(model)
    before, config = attributes(layers), model.get_config()
    with Taps(layers):
        model(inputs(4, 3))
        assert all("call" in vars(layer) for layer in dense_of(model))
    after = attributes(layers)
    for old, new in zip(before, after, strict=True):
        assert old.keys() == new.keys()
        for key in old:
            assert old[key] is new[key] or old[key] == new[key], key
    assert model.get_config() == config


class Failing(keras.layers.Layer):
    def call(self, x):
        raise RuntimeError("on purpose")


def test_nothing_remains_when_the_call_raises():
    def explode(z):
        raise RuntimeError("on purpose")

    layer = keras.layers.Dense(2, activation="tanh")
    layer(inputs(4, 3))
    layer.activation = explode
    with pytest.raises(RuntimeError, match="on purpose"):
        with Taps([layer]):
            layer(inputs(4, 3))
    assert "call" not in vars(layer)
    assert layer.activation is explode

    model = mlp([3, 4, 2])
    failing = Failing()
    with pytest.raises(RuntimeError, match="on purpose"):
        with Taps(flatten_layers(model)):
            failing(model(inputs(4, 3)))
    assert all("call" not in vars(layer) for layer in model.layers)


def test_outputs_are_untouched():
    model = mlp([3, 4, 2])
    x = inputs(4, 3)
    plain = model(x)
    with Taps(dense_of(model)):
        tapped = model(x)
    np.testing.assert_array_equal(plain, tapped)


def test_unused_layer_has_zero_statistics():
    model = mlp([3, 4, 2])
    extra = keras.layers.Dense(5)
    extra.build((None, 3))
    with Taps([*dense_of(model), extra]) as taps:
        model(inputs(4, 3))
    record = taps.record(extra)
    assert record.canonical_inputs("float64", 4).shape == (4, 1, 4)
    assert record.canonical_cotangents([], "float64", 4).shape == (4, 1, 5)


def test_only_tensors_of_the_current_graph_are_kept():
    """A layer built inside the pass is called in a graph thrown away."""
    model = keras.Sequential([keras.layers.Dense(4), keras.layers.Dense(2)])
    x = tf.constant(inputs(4, 3))

    @tf.function
    def run():
        with Taps(model.layers) as taps:
            model(x)
        return [len(taps.record(layer).inputs) for layer in model.layers]

    assert [int(count) for count in run()] == [1, 1]


def test_traced_pass_equals_the_eager_one():
    model = mlp([3, 4, 2])
    x = tf.constant(inputs(4, 3))
    layers = dense_of(model)

    def run(x):
        with Taps(layers) as taps, tf.GradientTape() as tape:
            loss = tf.reduce_sum(model(x) ** 2)
        record = taps.record(layers[0])
        cotangents = tape.gradient(loss, list(record.preactivations))
        return (
            record.canonical_inputs("float64", 4),
            record.canonical_cotangents(cotangents, "float64", 4),
        )

    for eager, traced in zip(run(x), tf.function(run)(x), strict=True):
        np.testing.assert_allclose(eager, traced, rtol=1e-12)


def test_taps_can_be_entered_again():
    model = mlp([3, 4, 2])
    taps = Taps(dense_of(model))
    for _ in range(2):
        with taps:
            model(inputs(4, 3))
        assert len(taps.record(model.layers[0]).inputs) == 1


def test_only_known_classes_are_tapped():
    layers = [Unknown(), keras.layers.Flatten()]
    with Taps(layers):
        assert all("call" not in vars(layer) for layer in layers)
