"""Gradients of layers in half precision, summed in float32."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_natgrad as kng

HALF = ["bfloat16", "float16"]
RNG = np.random.default_rng(0)


def attached(model):
    optimizer = kng.KFAC().attach(model, head=kng.heads.Normal())
    optimizer.build(model.trainable_variables)
    return optimizer


def taped(model, inputs, extra=lambda: 0.0, optimizer=None):
    """Returns the tape and the gradient of a loss of the model's outputs."""
    if optimizer is None:
        optimizer = attached(model)
    with kng.CurvatureTape(optimizer) as tape:
        outputs = tf.cast(model(inputs), tf.float32)
        loss = tf.reduce_mean(tf.square(outputs - 1.0)) + extra()
    variables = model.trainable_variables
    gradients = tape.gradient(loss, variables)
    by_variable = zip(map(id, variables), gradients, strict=True)
    return tape, loss, dict(by_variable)


def cotangents(tape, loss, layer):
    """Returns inputs and cotangents of a layer as it rounded them, float64."""
    record = tape.taps.record(layer)
    own = tape.gradient_tape.gradient(loss, record.preactivations)
    return (
        [np.asarray(tf.cast(x, tf.float64)) for x in record.inputs],
        [np.asarray(tf.cast(g, tf.float64)) for g in own],
    )


def assert_unrounded(found, expected):
    """To the rounding of float32 sums, which is far below that of halves."""
    scale = np.max(np.abs(expected))
    np.testing.assert_allclose(found, expected, rtol=0, atol=3e-6 * scale)


@pytest.fixture(params=HALF)
def policy(request):
    return f"mixed_{request.param}"


def dense_model(policy, **kwargs):
    return keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Dense(5, "tanh", dtype=policy, **kwargs),
            keras.layers.Dense(4, dtype=policy),
        ]
    )


def test_dense(policy):
    model = dense_model(policy)
    tape, loss, gradients = taped(model, RNG.normal(size=(64, 6)))
    rounded = 0
    for layer in model.layers:
        (x,), (g,) = cotangents(tape, loss, layer)
        assert_unrounded(gradients[id(layer.kernel)], x.T @ g)
        assert_unrounded(gradients[id(layer.bias)], g.sum(axis=0))
        plain = tape.gradient_tape.gradient(loss, layer.kernel)
        error = np.max(np.abs(plain - x.T @ g)) / np.max(np.abs(x.T @ g))
        rounded = max(rounded, error)
    # What Keras's own gradient loses.
    assert rounded > 1e-4


def test_einsum_on_sequences(policy):
    layer = keras.layers.EinsumDense(
        "btd,dhe->bthe", (None, 2, 3), dtype=policy
    )
    model = keras.Sequential([keras.Input((5, 4)), layer])
    tape, loss, gradients = taped(model, RNG.normal(size=(16, 5, 4)))
    (x,), (g,) = cotangents(tape, loss, layer)
    expected = np.einsum("btd,bthe->dhe", x, g)
    assert_unrounded(gradients[id(layer.kernel)], expected)


def test_convolution(policy):
    layer = keras.layers.Conv2D(3, 2, strides=2, padding="same", dtype=policy)
    model = keras.Sequential([keras.Input((7, 7, 2)), layer])
    tape, loss, gradients = taped(model, RNG.normal(size=(8, 7, 7, 2)))
    (x,), (g,) = cotangents(tape, loss, layer)
    kernel = tf.zeros(layer.kernel.shape, tf.float64)
    with tf.GradientTape() as reference:
        reference.watch(kernel)
        z = tf.nn.conv2d(x, kernel, strides=2, padding="SAME")
    expected = reference.gradient(z, kernel, output_gradients=g)
    assert_unrounded(gradients[id(layer.kernel)], expected)
    assert_unrounded(gradients[id(layer.bias)], g.sum(axis=(0, 1, 2)))


def test_embedding(policy):
    layer = keras.layers.Embedding(5, 3, dtype=policy)
    model = keras.Sequential([keras.Input((4,), dtype="int32"), layer])
    ids = RNG.integers(0, 5, size=(32, 4))
    tape, loss, gradients = taped(model, ids)
    _, (g,) = cotangents(tape, loss, layer)
    expected = np.zeros((5, 3))
    np.add.at(expected, ids, g)
    assert_unrounded(gradients[id(layer.embeddings)], expected)


def test_tied_embedding(policy):
    """A matrix that is used as its transpose, too."""
    layer = keras.layers.ReversibleEmbedding(5, 3, dtype=policy)
    inputs = keras.Input((4,), dtype="int32")
    hidden = keras.layers.Activation("tanh", dtype=policy)(layer(inputs))
    model = keras.Model(inputs, layer(hidden, reverse=True))
    ids = RNG.integers(0, 5, size=(32, 4))
    tape, loss, gradients = taped(model, ids)
    (_, h), (g, u) = cotangents(tape, loss, layer)
    expected = np.einsum("btv,btd->vd", u, h)
    np.add.at(expected, ids, g)
    assert_unrounded(gradients[id(layer.embeddings)], expected)


def test_several_uses(policy):
    """A layer whose second input is its first output."""
    shared = keras.layers.Dense(4, "tanh", dtype=policy)
    inputs = keras.Input((4,))
    model = keras.Model(inputs, shared(shared(inputs)))
    tape, loss, gradients = taped(model, RNG.normal(size=(64, 4)))
    uses = zip(*cotangents(tape, loss, shared), strict=True)
    expected = sum(x.T @ g for x, g in uses)
    assert_unrounded(gradients[id(shared.kernel)], expected)


def test_uses_with_and_without_a_folded_batch(policy):
    """Their first axes differ."""
    shared = keras.layers.Dense(4, "tanh", dtype=policy)
    inputs = keras.Input((3, 4))
    hidden = keras.ops.reshape(
        shared(keras.ops.reshape(inputs, (-1, 4))), (-1, 12)
    )
    model = keras.Model(inputs, shared(hidden[:, :4]))
    tape, loss, gradients = taped(model, RNG.normal(size=(16, 3, 4)))
    uses = zip(*cotangents(tape, loss, shared), strict=True)
    expected = sum(x.T @ g for x, g in uses)
    assert_unrounded(gradients[id(shared.kernel)], expected)


def test_penalties_and_other_uses_stay(policy):
    model = dense_model(policy, kernel_regularizer=keras.regularizers.L2(0.1))
    first = model.layers[0]

    def extra():
        return model.losses[0] + tf.reduce_sum(first.kernel**3)

    inputs = RNG.normal(size=(64, 6))
    tape, loss, gradients = taped(model, inputs, extra)
    (x,), (g,) = cotangents(tape, loss, first)
    kernel = np.asarray(first.kernel, "float64")
    expected = x.T @ g + 0.2 * kernel + 3 * kernel**2
    assert_unrounded(gradients[id(first.kernel)], expected)


def test_frozen_variables(policy):
    model = dense_model(policy)
    model.layers[0].trainable = False
    tape, loss, gradients = taped(model, RNG.normal(size=(64, 6)))
    last = model.layers[1]
    assert set(gradients) == {id(last.kernel), id(last.bias)}
    (x,), (g,) = cotangents(tape, loss, last)
    assert_unrounded(gradients[id(last.kernel)], x.T @ g)


def test_other_layers_are_not_touched(policy):
    model = keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Dense(5, dtype=policy),
            keras.layers.Dense(4, dtype="float32"),
        ]
    )
    tape, loss, gradients = taped(model, RNG.normal(size=(64, 6)))
    plain = tape.gradient_tape.gradient(loss, model.trainable_variables)
    for variable, gradient in zip(
        model.trainable_variables[2:], plain[2:], strict=True
    ):
        np.testing.assert_array_equal(gradients[id(variable)], gradient)


@pytest.mark.slow
@pytest.mark.parametrize("jit_compile", [False, True])
def test_in_a_graph(policy, jit_compile):
    """As near to float32 as eagerly: fused operations round elsewhere."""
    model, single = dense_model(policy), dense_model("float32")
    single.set_weights(model.get_weights())
    inputs = np.random.default_rng(0).normal(size=(64, 6))
    inputs = tf.constant(inputs, tf.float32)
    optimizer = attached(model)

    def gradients(model, optimizer=None):
        found = taped(model, inputs, optimizer=optimizer)[2]
        return [found[id(v)] for v in model.trainable_variables]

    @tf.function(jit_compile=jit_compile)
    def in_a_graph():
        return gradients(model, optimizer)

    def flat(tensors):
        return np.concatenate([np.ravel(tensor) for tensor in tensors])

    expected = flat(gradients(single))
    lost = np.linalg.norm(flat(gradients(model)) - expected)
    found = np.linalg.norm(flat(in_a_graph()) - expected)
    unit = 2.0**-8 if "bfloat16" in policy else 2.0**-11
    assert 0.1 * unit < lost / np.linalg.norm(expected) < unit
    assert found < 1.2 * lost
