"""Layers without a captured linear map, against per-example Jacobians.

The gradient of a fallback variable is `G = Σ_n ± J_nᵀ u_n`. Over all signs of
the examples its outer products average to those of the single examples.
"""

import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests.reference.bridge import randomize

layers = keras.layers
BATCH = 3


def lora(layer):
    """A layer whose kernel is frozen beside a product of low rank."""

    def prepare(model):
        model.layers[-3].enable_lora(1)

    return layer, prepare


def quantized(layer):
    """A layer of integers, of which only the bias is trained."""

    def prepare(model):
        model.layers[-3].quantize("int8")

    return layer, prepare


def frozen(layer, name):
    """A layer of which one variable is not trained."""

    def prepare(model):
        getattr(model.layers[-3], name).trainable = False

    return layer, prepare


# Name: inputs' shape, layer, number of variables that fall back.
CASES = {
    "SimpleRNN": ((4, 2), lambda: (layers.SimpleRNN(3), None), 3),
    "GRU": ((4, 2), lambda: (layers.GRU(2), None), 3),
    "GRU, reset before": (
        (4, 2),
        lambda: (layers.GRU(2, reset_after=False), None),
        3,
    ),
    "LSTM": ((4, 2), lambda: (layers.LSTM(2), None), 3),
    "LSTM, all steps": (
        (4, 2),
        lambda: (layers.LSTM(2, return_sequences=True), None),
        3,
    ),
    "LSTM, unrolled": ((4, 2), lambda: (layers.LSTM(2, unroll=True), None), 3),
    "LSTM, no bias": (
        (4, 2),
        lambda: (layers.LSTM(2, use_bias=False), None),
        2,
    ),
    "Bidirectional GRU": (
        (4, 2),
        lambda: (layers.Bidirectional(layers.GRU(2)), None),
        6,
    ),
    "Bidirectional LSTM, summed": (
        (4, 2),
        lambda: (
            layers.Bidirectional(
                layers.LSTM(2, return_sequences=True), merge_mode="sum"
            ),
            None,
        ),
        6,
    ),
    "stacked cells": (
        (4, 2),
        lambda: (layers.RNN([layers.LSTMCell(2), layers.GRUCell(3)]), None),
        6,
    ),
    "ConvLSTM1D": ((3, 4, 1), lambda: (layers.ConvLSTM1D(2, 2), None), 3),
    "ConvLSTM2D": ((2, 3, 3, 1), lambda: (layers.ConvLSTM2D(2, 2), None), 3),
    "Dense, LoRA": ((3,), lambda: lora(layers.Dense(4)), 3),
    "EinsumDense, LoRA": (
        (2, 3),
        lambda: lora(layers.EinsumDense("abc,cd->abd", (2, 4), bias_axes="d")),
        3,
    ),
    "Conv1D, LoRA": ((4, 2), lambda: lora(layers.Conv1D(3, 2)), 3),
    "Dense, int8": ((3,), lambda: quantized(layers.Dense(4)), 1),
    "Dense, bias frozen": ((3,), lambda: frozen(layers.Dense(4), "bias"), 1),
    "Conv1D, kernel frozen": (
        (4, 2),
        lambda: frozen(layers.Conv1D(3, 2), "kernel"),
        1,
    ),
}


def network(shape, layer, prepare):
    model = keras.Sequential(
        [
            keras.Input(shape),
            layers.Activation("tanh"),
            layer,
            layers.Flatten(),
            layers.Dense(1),
        ]
    )
    randomize(model)
    if prepare:
        prepare(model)
        for index, variable in enumerate(model.trainable_variables):
            rng = np.random.default_rng(index)
            variable.assign(0.7 * rng.normal(size=tuple(variable.shape)))
    return model


def jacobians(model, x, term, variable):
    """`√(c_n F_n) ∂η_n/∂W` of every example, from a call on it alone."""
    roots = np.sqrt(
        np.ravel(term.head.fisher(term.outputs)) * np.ravel(term.coefficients)
    )
    found = []
    for n in range(BATCH):
        with tf.GradientTape() as tape:
            output = tf.reduce_sum(model(x[n : n + 1]))
        gradient = tape.gradient(output, variable.value)
        found.append(roots[n] * np.asarray(gradient))
    return found


@pytest.mark.variants(
    "SimpleRNN",
    "GRU, reset before",
    "LSTM, no bias",
    "ConvLSTM1D",
    "Dense, LoRA",
    "Dense, int8",
)
@pytest.mark.parametrize("name", CASES)
def test_average_over_all_signs(name, record):
    shape, make, count = CASES[name]
    model = network(shape, *make())
    x = tf.constant(np.random.default_rng(0).normal(size=(BATCH, *shape)))
    recorded = record(model, x, ["normal"])
    fallbacks = [e for e in recorded.curvature.entries if e.layer is None]
    assert len(fallbacks) == count
    (term,) = recorded.terms
    sums = None
    for signs in itertools.product([-1.0, 1.0], repeat=BATCH):
        sent = term.cotangent(tf.constant(signs)[:, tf.newaxis])
        gradients = recorded.captured.backward([sent]).gradients
        found = [
            [
                np.asarray(each)
                for each in e.block.gradient_statistics(gradient).values()
            ]
            for e, gradient in zip(fallbacks, gradients, strict=True)
        ]
        if sums is None:
            sums = found
        else:
            sums = [
                [a + b for a, b in zip(*pair, strict=True)]
                for pair in zip(sums, found, strict=True)
            ]
    for entry, statistics in zip(fallbacks, sums, strict=True):
        variable = recorded.variables[entry.variables[0]]
        rows = [
            g.reshape(entry.block.shape.matrix)
            for g in jacobians(model, x, term, variable)
        ]
        assert any(np.any(g != 0) for g in rows)
        if entry.block.kind == "gradient_kronecker":
            expected = [sum(g @ g.T for g in rows), sum(g.T @ g for g in rows)]
        else:
            expected = [sum(g**2 for g in rows)]
        # Keras keeps the factors of LoRA in float32, and their gradients.
        rtol = 1e-9 if variable.dtype == "float64" else 1e-6
        for total, own in zip(statistics, expected, strict=True):
            np.testing.assert_allclose(
                total / 2**BATCH, own, rtol=rtol, atol=0.1 * rtol * np.max(own)
            )
