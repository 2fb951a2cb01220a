"""Layers whose tensors the tape cannot see are never silently wrong.

A layer called in a graph of its own (a loop over time steps, a `tf.function`
inside the model) or on a batch folded with positions must either be captured
correctly, or be refused or reported by name. What may not happen is a Fisher
of zero, and with it a step of size one over the damping.
"""

import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_natgrad as kng
from tests.reference import fisher as reference
from tests.reference.bridge import mlp, network_of
from tests.reference.heads import Term

BATCH = 6


class TracedInside(keras.Model):
    """A layer inside a `tf.function` inside the model."""

    def __init__(self):
        super().__init__()
        self.hidden = keras.layers.Dense(3)
        self.last = keras.layers.Dense(1)

    @tf.function
    def traced(self, x):
        return self.hidden(x)

    def call(self, x):
        return self.last(tf.tanh(self.traced(x)))


class Cell(keras.layers.Layer):
    """A recurrent cell made of a Dense layer."""

    def __init__(self):
        super().__init__()
        self.hidden = keras.layers.Dense(3, activation="tanh")
        self.state_size = 3

    def build(self, shape):
        self.hidden.build((None, shape[-1] + 3))
        self.built = True

    def call(self, inputs, states):
        h = self.hidden(tf.concat([inputs, states[0]], axis=-1))
        return h, [h]


def recurrent():
    return keras.Sequential(
        [keras.Input((4, 2)), keras.layers.RNN(Cell()), keras.layers.Dense(1)]
    )


def time_distributed():
    return keras.Sequential(
        [
            keras.Input((None, 2)),
            keras.layers.TimeDistributed(
                keras.layers.Dense(3, activation="tanh")
            ),
            keras.layers.GlobalAveragePooling1D(),
            keras.layers.Dense(1),
        ]
    )


@pytest.mark.parametrize("eager", [True, False], ids=["eager", "graph"])
@pytest.mark.parametrize("make", [TracedInside, recurrent, time_distributed])
def test_layer_in_an_inner_graph(make, eager):
    model = make()
    rng = np.random.default_rng(0)
    shape = (BATCH, 2) if make is TracedInside else (BATCH, 4, 2)
    x, y = rng.normal(size=shape), rng.normal(size=(BATCH, 1))
    model(x)
    optimizer = kng.KFAC().attach(model)
    model.compile(optimizer, loss="mse", run_eagerly=eager, jit_compile=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            model.train_on_batch(x, y)
        except (ValueError, NotImplementedError) as error:
            assert "dense" in str(error), "the error must name the layer"
            assert "AddN" not in str(error)
            return
    named = [str(w.message) for w in caught if "dense" in str(w.message)]
    for entry in optimizer.curvature.entries:
        assert float(entry.block.trace()) > 0 or named


def test_layer_on_a_batch_folded_with_positions(float64):
    """`[B T, n]` inputs are `[B, T, n]` in canonical form."""
    model = mlp([2, 3, 2], positions=4)
    source = keras.Input((4, 2))
    first, last = model.layers
    folded = keras.ops.reshape(source, (-1, 2))
    hidden = keras.ops.reshape(first(folded), (-1, 4, 3))
    folding = keras.Model(source, last(hidden))
    x = np.random.default_rng(0).normal(size=(BATCH, 4, 2))
    np.testing.assert_allclose(folding(x), model(x))
    try:
        operators = kng.fisher(folding, x, "normal", "full")
    except ValueError as error:
        assert first.path in str(error)
        return
    coefficients = np.full((BATCH, 4), 1.0 / (4 * BATCH))
    term = Term("normal", coefficients)
    trace = network_of(model.layers).trace(x)
    np.testing.assert_allclose(
        operators[first.path].to_dense(),
        reference.block(trace, [term], 0),
        rtol=1e-10,
        atol=1e-14,
    )
    kronecker = kng.fisher(folding, x, "normal")
    expected = kng.fisher(model, x, "normal")
    for a, b in zip(kronecker.values(), expected.values(), strict=True):
        np.testing.assert_allclose(a.to_dense(), b.to_dense(), rtol=1e-10)
