"""Layers in loops: captured around TimeDistributed, known for cells."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_natgrad._compat import flatten_layers
from keras_natgrad.capture import Taps, make_plan
from keras_natgrad.capture.loops import can_fold, unreachable_layers
from tests.reference.bridge import randomize

from .conftest import check_both

layers = keras.layers
pytestmark = pytest.mark.usefixtures("float64")


def inputs(*shape):
    return np.random.default_rng(0).normal(size=shape)


def distributed(inner, steps=None):
    model = keras.Sequential(
        [keras.Input((steps, 3)), layers.TimeDistributed(inner)]
    )
    randomize(model)
    return model


def nested():
    return keras.Sequential(
        [keras.Input((3,)), layers.Dense(4, "tanh"), layers.Dense(2)]
    )


class Noted(layers.Layer):
    """A layer of a user, which may do anything to the batch."""

    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(2)

    def build(self, shape):
        self.dense.build(shape)

    def call(self, x):
        return self.dense(x - keras.ops.mean(x, axis=0))


class DenseCell(layers.Layer):
    """A recurrent cell made of a Dense layer."""

    def __init__(self):
        super().__init__()
        self.hidden = layers.Dense(3, "tanh", name="hidden")
        self.state_size = 3

    def build(self, shape):
        self.hidden.build((None, shape[-1] + 3))
        self.built = True

    def call(self, inputs, states):
        h = self.hidden(tf.concat([inputs, states[0]], axis=-1))
        return h, [h]


def recurrent(layer, steps=4):
    model = keras.Sequential([keras.Input((steps, 2)), layer, layers.Dense(1)])
    randomize(model)
    return model


def reasons_of(model):
    plan = make_plan(model, model.trainable_variables)
    return [layer.path.split("/")[-1] for layer in plan.layers], plan.reasons


@pytest.mark.parametrize("steps", [None, 4])
@pytest.mark.parametrize("make", [lambda: layers.Dense(4, "tanh"), nested])
def test_time_distributed_layers_are_captured(make, steps):
    """Gradients and products, with the time steps as positions."""
    model = distributed(make(), steps)
    inner = [e for e in flatten_layers(model) if isinstance(e, layers.Dense)]
    found, reasons = reasons_of(model)
    assert len(found) == len(inner) and reasons == ()

    def run(x):
        with Taps(flatten_layers(model)) as taps:
            outputs = model(x)
        return taps, outputs

    x = inputs(5, 4, 3)
    taps, outputs = run(tf.constant(x))
    np.testing.assert_allclose(outputs, model(x), rtol=1e-12)
    for layer in inner:
        record = taps.record(layer)
        assert len(record.preactivations) == 1
        assert record.canonical_inputs("float64", 5).shape[:2] == [5, 4]
    with_wrapper = Watched(model)
    check_both(with_wrapper, inner, x)


class Watched:
    """Calls a model with all its layers tapped, wrappers included."""

    def __init__(self, model):
        self.model = model

    def __call__(self, x):
        wrappers = [
            layer
            for layer in flatten_layers(self.model)
            if isinstance(layer, layers.TimeDistributed)
        ]
        with Taps(wrappers):
            return self.model(x)


def test_unknown_length_in_a_graph():
    """The wrapper's own loop would run in a graph of its own."""
    model = distributed(layers.Dense(4, "tanh"))
    inner = model.layers[0].layer

    def run(x):
        with Taps(flatten_layers(model)) as taps, tf.GradientTape() as tape:
            loss = tf.reduce_sum(model(x) ** 2)
        record = taps.record(inner)
        assert not record.lost
        sent = tape.gradient(loss, list(record.preactivations))
        return (
            record.canonical_inputs("float64", tf.shape(x)[0]),
            record.canonical_cotangents(sent, "float64", tf.shape(x)[0]),
        )

    traced = tf.function(
        run, input_signature=[tf.TensorSpec([None, None, 3], tf.float64)]
    )
    x = tf.constant(inputs(5, 4, 3))
    for eager, graph in zip(run(x), traced(x), strict=True):
        assert eager.shape[:2] == [5, 4]
        np.testing.assert_allclose(graph, eager, rtol=1e-12)


def test_nothing_remains_on_the_wrapper():
    model = distributed(layers.Dense(2))
    before = dict(vars(model.layers[0]))
    with Taps(flatten_layers(model)):
        model(inputs(2, 4, 3))
        assert "call" in vars(model.layers[0])
    assert vars(model.layers[0]).keys() == before.keys()


STATEFUL = {
    "batch statistics": lambda: keras.Sequential(
        [layers.Dense(2), layers.BatchNormalization()]
    ),
    "random numbers": lambda: keras.Sequential(
        [layers.Dense(2), layers.Dropout(0.5, seed=1)]
    ),
    "a user's layer": Noted,
}


@pytest.mark.parametrize("name", STATEFUL)
def test_layers_that_may_not_be_folded(name):
    """They stay a loop: unrolled where the length is known, else planned."""
    model = distributed(STATEFUL[name](), steps=None)
    assert not can_fold(model.layers[0])
    found, reasons = reasons_of(model)
    assert found == []
    assert set(reasons) == {
        "weights of a loop: TimeDistributed 'time_distributed'"
    }
    model = distributed(STATEFUL[name](), steps=4)
    assert not can_fold(model.layers[0])
    found, _ = reasons_of(model)
    # The dense layer, and batch normalisation, which is captured step by step.
    assert len(found) == (2 if name == "batch statistics" else 1)
    dense = [e for e in flatten_layers(model) if isinstance(e, layers.Dense)]
    x = inputs(5, 4, 3)
    with Taps(flatten_layers(model)) as taps:
        model(x)
    assert len(taps.record(dense[0]).preactivations) == 4


def penalised():
    return keras.Sequential(
        [layers.Dense(4, activity_regularizer="l2"), layers.Dense(2)]
    )


def centred(x):
    return x - keras.ops.mean(x, axis=0, keepdims=True)


def with_lambda():
    return keras.Sequential([layers.Dense(2), layers.Lambda(centred)])


def functional(function):
    source = keras.Input((3,))
    return keras.Model(source, function(layers.Dense(2)(source)))


@pytest.mark.parametrize("steps", [None, 4])
@pytest.mark.parametrize(
    ("inner", "folds"),
    [
        (penalised, False),
        (lambda: layers.Dense(2, activity_regularizer="l2"), False),
        (
            lambda: keras.Sequential(
                [layers.Dense(2), layers.ActivityRegularization(0.1)]
            ),
            False,
        ),
        (with_lambda, False),
        (lambda: functional(centred), False),
        (lambda: functional(lambda x: x + keras.ops.relu(x) * x), True),
    ],
    ids=["penalty", "own penalty", "layer", "lambda", "operations", "sum"],
)
def test_the_forward_pass_stays_as_it_is(inner, folds, steps):
    """Outputs and penalties are those of the loop, tapped or not."""
    model = distributed(inner(), steps)
    assert can_fold(model.layers[0]) == folds
    x = tf.constant(inputs(5, 4, 3))
    expected = model(x)
    penalties = [float(loss) for loss in model.losses]
    with Taps(flatten_layers(model)):
        found = model(x)
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    np.testing.assert_allclose(model.losses, penalties, rtol=1e-12)


@pytest.mark.parametrize(
    ("inner", "uses"), [(lambda: layers.Dense(2), 1), (nested, 4)]
)
def test_masks(inner, uses):
    """A layer that takes a mask gets that of its own time step."""
    wrapper = layers.TimeDistributed(inner())
    model = keras.Sequential([keras.Input((4, 3)), layers.Masking(), wrapper])
    x = inputs(5, 4, 3)
    x[:, 2:] = 0
    with Taps(flatten_layers(model)) as taps:
        tapped = model(x)
    np.testing.assert_allclose(tapped, model(x), rtol=1e-12)
    for layer in flatten_layers(wrapper) or [wrapper.layer]:
        if isinstance(layer, keras.layers.Dense):
            assert len(taps.record(layer).preactivations) == uses


@pytest.mark.parametrize(
    ("layer", "names"),
    [
        (lambda: layers.SimpleRNN(3), ["SimpleRNN"]),
        (lambda: layers.GRU(3), ["GRU"]),
        (lambda: layers.LSTM(3), ["LSTM"]),
        (lambda: layers.Bidirectional(layers.GRU(3)), ["GRU"]),
        (
            lambda: layers.RNN([layers.LSTMCell(3), layers.GRUCell(2)]),
            ["RNN"],
        ),
        (lambda: layers.RNN(DenseCell()), ["RNN"]),
    ],
)
def test_cells_fall_back_with_the_reason(layer, names):
    model = recurrent(layer())
    found, reasons = reasons_of(model)
    assert found == ["dense"]
    assert len(reasons) == len(model.trainable_variables) - 2
    for reason in reasons:
        assert reason.startswith(f"weights of a loop: {names[0]} ")


def test_convolutional_cells_fall_back():
    model = keras.Sequential(
        [
            keras.Input((3, 4, 4, 1)),
            layers.ConvLSTM2D(2, 2),
            layers.Flatten(),
            layers.Dense(1),
        ]
    )
    _, reasons = reasons_of(model)
    assert {reason.split(" 'conv")[0] for reason in reasons} == {
        "weights of a loop: ConvLSTM2D"
    }


def test_unrolled_cell_of_layers_is_captured():
    """Without a loop every time step is a use of the layer."""
    model = recurrent(layers.RNN(DenseCell(), unroll=True))
    hidden = model.layers[0].cell.hidden
    assert unreachable_layers(model) == {}
    found, reasons = reasons_of(model)
    assert found == ["hidden", "dense"] and reasons == ()
    (record,) = check_both(model, [hidden], inputs(5, 4, 2))
    assert record.canonical_inputs("float64", 5).shape == (5, 4, 6)


def test_unrolled_keras_cell_falls_back():
    """Keras's own cells compute without layers inside."""
    model = recurrent(layers.GRU(3, unroll=True))
    found, reasons = reasons_of(model)
    assert found == ["dense"]
    assert set(reasons) == {"GRUCell variable without a captured linear map"}
