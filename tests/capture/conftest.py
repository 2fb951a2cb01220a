"""Captured layers against ordinary gradients."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_natgrad.capture import Taps, linear_maps
from keras_natgrad.linalg import to_dense


@pytest.fixture
def assert_captures():
    return check


def check(model, layers, x, rtol=1e-9, product=True):
    """Asserts that `Σ_n Σ_s ā gᵀ` is the gradient of each layer's matrices.

    The loss is a random linear function of tanh of the outputs, so that all
    positions and features matter. Returns the records of the first matrices.

    Args:
        model: Function of `x`.
        layers: The layers to look at.
        x: Inputs.
        rtol: Relative tolerance of the gradients.
        product: Whether to check `z = ā W` too. Not for layers whose other
            matrix or bias takes part in z.
    """
    with Taps(layers) as taps, tf.GradientTape(persistent=True) as tape:
        outputs = keras.tree.flatten(model(x))
        loss = tf.add_n([scalar(output) for output in outputs])
    batch = keras.tree.flatten(x)[0].shape[0]
    for layer in layers:
        specs = linear_maps(layer)
        assert specs, layer
        for index, spec in enumerate(specs):
            record = taps.record(layer, index)
            inputs = to_dense(record.canonical_inputs("float64", batch))
            cotangents = record.canonical_cotangents(
                tape.gradient(loss, list(record.preactivations)),
                "float64",
                batch,
            )
            lead = list(spec.layout.lead)
            assert inputs.shape[:-2] == [*lead, batch]
            assert cotangents.shape[:-1] == inputs.shape[:-1]
            assert inputs.shape[-1] == spec.layout.rows
            assert cotangents.shape[-1] == spec.layout.columns
            gradients = [
                tf.convert_to_tensor(gradient)
                for gradient in tape.gradient(
                    loss, [v.value for v in spec.variables]
                )
            ]
            expected = spec.layout.to_matrix(gradients)
            back = spec.layout.from_matrix(expected)
            for one, other in zip(back, gradients, strict=True):
                np.testing.assert_array_equal(one, other)
            found = tf.einsum("...nsr,...nsm->...rm", inputs, cotangents)
            np.testing.assert_allclose(found, expected, rtol=rtol, atol=1e-12)
            complete = spec.layout.bias_shape is not None or not has_bias(layer)
            if not (product and complete):
                continue
            # The map itself: z = ā W.
            matrix = spec.layout.to_matrix(
                [tf.convert_to_tensor(v.value) for v in spec.variables]
            )
            values = record.canonical_cotangents(
                record.preactivations, "float64", batch
            )
            mapped = tf.einsum("...nsr,...rm->...nsm", inputs, matrix)
            np.testing.assert_allclose(values, mapped, rtol=1e-9, atol=1e-12)
    return [taps.record(layer) for layer in layers]


def check_examples(model, layers, x):
    """Asserts that `Σ_s ā gᵀ` is the gradient of every single example.

    The reference calls the model on one example at a time, so examples must
    not act on each other.
    """
    rng = np.random.default_rng(3)
    with Taps(layers) as taps, tf.GradientTape(persistent=True) as tape:
        outputs = model(x)
        weights = rng.normal(size=tuple(outputs.shape))
        loss = tf.reduce_sum(tf.tanh(outputs) * weights)
    batch = len(x)
    for layer in layers:
        for index, spec in enumerate(linear_maps(layer)):
            record = taps.record(layer, index)
            inputs = to_dense(record.canonical_inputs("float64", batch))
            cotangents = record.canonical_cotangents(
                tape.gradient(loss, list(record.preactivations)),
                "float64",
                batch,
            )
            found = tf.einsum("...sr,...sm->...rm", inputs, cotangents)
            for i in range(batch):
                with tf.GradientTape() as single:
                    own = tf.tanh(model(x[i : i + 1])) * weights[i : i + 1]
                    own = tf.reduce_sum(own)
                gradients = [
                    tf.convert_to_tensor(gradient)
                    for gradient in single.gradient(
                        own, [v.value for v in spec.variables]
                    )
                ]
                np.testing.assert_allclose(
                    found[..., i, :, :],
                    spec.layout.to_matrix(gradients),
                    rtol=1e-9,
                    atol=1e-12,
                )


def check_both(model, layers, x, **arguments):
    """Asserts what `check` and `check_examples` do; returns the records."""
    records = check(model, layers, x, **arguments)
    check_examples(model, layers, x)
    return records


def randomized(layer, x, seed=0):
    """Builds a layer and gives every weight a random value.

    Those that must not be negative stay so.
    """
    layer(x)
    rng = np.random.default_rng(seed)
    for variable in layer.weights:
        value = rng.normal(size=tuple(variable.shape))
        positive = "variance" in variable.name
        variable.assign(np.abs(value) + 0.1 if positive else value)
    return layer


def has_bias(layer):
    return getattr(layer, "bias", None) is not None


def scalar(outputs):
    rng = np.random.default_rng(7)
    weights = rng.normal(size=tuple(outputs.shape))
    return tf.reduce_sum(tf.tanh(outputs) * weights)
