"""Captured layers against ordinary gradients."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_natgrad.capture import Taps, linear_map


@pytest.fixture
def assert_captures():
    return check


def check(model, layers, x, rtol=1e-9):
    """Asserts that `Σ_n Σ_s ā gᵀ` is the gradient of each layer.

    The loss is a random linear function of tanh of the outputs, so that all
    positions and features matter. Returns the records.
    """
    with Taps(layers) as taps, tf.GradientTape(persistent=True) as tape:
        outputs = keras.tree.flatten(model(x))
        loss = tf.add_n([scalar(output) for output in outputs])
    records = [taps.record(layer) for layer in layers]
    for layer, record in zip(layers, records, strict=True):
        spec = linear_map(layer)
        assert spec is not None
        batch = keras.tree.flatten(x)[0].shape[0]
        inputs = record.canonical_inputs("float64", batch)
        cotangents = record.canonical_cotangents(
            tape.gradient(loss, list(record.preactivations)), "float64", batch
        )
        assert inputs.shape[0] == cotangents.shape[0] == batch
        assert inputs.shape[1] == cotangents.shape[1]
        assert inputs.shape[2] == spec.layout.rows
        assert cotangents.shape[2] == spec.layout.columns
        gradients = tape.gradient(loss, [v.value for v in spec.variables])
        expected = spec.layout.to_matrix(gradients)
        found = tf.einsum("nsr,nsm->rm", inputs, cotangents)
        np.testing.assert_allclose(found, expected, rtol=rtol, atol=1e-12)
        # The map itself: z = ā W.
        matrix = spec.layout.to_matrix(
            [tf.convert_to_tensor(v.value) for v in spec.variables]
        )
        values = record.canonical_cotangents(
            record.preactivations, "float64", batch
        )
        product = tf.einsum("nsr,rm->nsm", inputs, matrix)
        if spec.layout.bias_shape is not None or not has_bias(layer):
            np.testing.assert_allclose(values, product, rtol=1e-9, atol=1e-12)
    return records


def has_bias(layer):
    return layer.bias is not None


def scalar(outputs):
    rng = np.random.default_rng(7)
    weights = rng.normal(size=tuple(outputs.shape))
    return tf.reduce_sum(tf.tanh(outputs) * weights)
