"""Every way to make a Keras model."""

import keras
import numpy as np
import pytest

import keras_natgrad as kng
from tests.reference.unknown import Unknown
from tests.training.networks import (
    FEATURES,
    assert_close,
    compiled,
    data,
    weights,
)

layers = keras.layers


class Subclassed(keras.Model):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.hidden = layers.Dense(5, activation="tanh")
        self.last = layers.Dense(3)

    def call(self, x):
        return self.last(self.hidden(x))


class WithTraining(Subclassed):
    def call(self, x, training=None):
        assert training is not None
        return super().call(x)


def sequential():
    return keras.Sequential(
        [
            keras.Input((FEATURES,)),
            layers.Dense(5, activation="tanh"),
            layers.Dense(3),
        ]
    )


def unbuilt_sequential():
    return keras.Sequential(
        [layers.Dense(5, activation="tanh"), layers.Dense(3)]
    )


def functional():
    x = keras.Input((FEATURES,))
    hidden = layers.Dense(5, activation="tanh")(x)
    return keras.Model(x, layers.Dense(3)(layers.Add()([hidden, hidden])))


def nested():
    x = keras.Input((FEATURES,))
    inner = keras.Sequential([layers.Dense(5, activation="tanh")])
    return keras.Model(x, layers.Dense(3)(inner(x)))


def shared():
    """The same layer twice, on two halves of the input."""
    x = keras.Input((FEATURES,))
    half = layers.Dense(5, activation="tanh")
    parts = keras.ops.split(x, 2, axis=-1)
    merged = layers.Concatenate()([half(part) for part in parts])
    return keras.Model(x, layers.Dense(3)(merged))


def without_bias():
    return keras.Sequential(
        [
            keras.Input((FEATURES,)),
            layers.Dense(5, activation="tanh", use_bias=False),
            layers.Dense(3, use_bias=False),
        ]
    )


def einsum():
    return keras.Sequential(
        [
            keras.Input((FEATURES,)),
            layers.EinsumDense("ab,bc->ac", 5, bias_axes="c"),
            layers.Activation("tanh"),
            layers.EinsumDense("ab,bc->ac", 3),
        ]
    )


MODELS = [
    sequential,
    unbuilt_sequential,
    functional,
    nested,
    shared,
    without_bias,
    einsum,
    Subclassed,
    WithTraining,
]


@pytest.mark.variants("fit-sequential", "train_on_batch-sequential")
@pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
@pytest.mark.parametrize("how", ["fit", "train_on_batch"])
def test_trains(make, how, recwarn):
    x, y = data()
    optimizer = kng.KFAC()
    model = compiled(make(), optimizer)
    if how == "fit":
        history = model.fit(x, y, batch_size=24, epochs=8, verbose=0)
        losses = history.history["loss"]
    else:
        losses = [float(model.train_on_batch(x, y)) for _ in range(8)]
    assert losses[-1] < 0.6 * losses[0]
    assert optimizer.statistics["batches"] == 8
    assert not [w for w in recwarn if "fallback" in str(w.message)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "make", [unbuilt_sequential, WithTraining], ids=lambda make: make.__name__
)
def test_unbuilt_models_in_a_graph(make):
    """Keras builds them in a scratch graph whose tensors must not leak."""
    x, y = data()
    model = compiled(make(), run_eagerly=False)
    history = model.fit(x, y, batch_size=8, epochs=3, verbose=0).history
    assert history["loss"][-1] < 0.7 * history["loss"][0]


def test_frozen_layer():
    x, y = data()
    model = sequential()
    model.layers[0].trainable = False
    frozen = [v.numpy() for v in model.layers[0].weights]
    free = model.layers[1].kernel.numpy()
    optimizer = kng.KFAC()
    compiled(model, optimizer)
    losses = [float(model.train_on_batch(x, y)) for _ in range(4)]
    assert losses[-1] < losses[0]
    assert_close([v.numpy() for v in model.layers[0].weights], frozen)
    assert np.all(model.layers[1].kernel.numpy() != free)
    assert len(optimizer.curvature.entries) == 1


def test_freezing_and_recompiling_needs_a_new_optimizer():
    x, y = data()
    model = compiled(sequential())
    model.train_on_batch(x, y)
    model.layers[0].trainable = False
    frozen = model.layers[0].kernel.numpy()
    compiled(model, kng.KFAC())
    loss = [float(model.train_on_batch(x, y)) for _ in range(4)]
    assert loss[-1] < loss[0]
    np.testing.assert_array_equal(model.layers[0].kernel.numpy(), frozen)


def test_a_layer_that_takes_no_part():
    """Its gradient is None; Keras leaves it alone."""

    class Half(Subclassed):
        def __init__(self):
            super().__init__()
            self.unused = layers.Dense(2)
            self.unused.build((None, 2))

    x, y = data()
    model = compiled(Half())
    model.train_on_batch(x, y)
    before = [v.numpy() for v in model.unused.weights]
    with pytest.warns(UserWarning, match="Gradients do not exist"):
        losses = [float(model.train_on_batch(x, y)) for _ in range(5)]
    assert losses[-1] < losses[0]
    assert_close([v.numpy() for v in model.unused.weights], before)


def test_clone_with_a_new_optimizer():
    x, y = data()
    model = compiled(sequential())
    model.train_on_batch(x, y)
    before = weights(model)
    copy = keras.models.clone_model(model)
    copy.set_weights(model.get_weights())
    compiled(copy, kng.KFAC())
    losses = [float(copy.train_on_batch(x, y)) for _ in range(5)]
    assert losses[-1] < losses[0]
    assert_close(weights(model), before)
    model.train_on_batch(x, y)  # The old pair still works.


@pytest.mark.slow
def test_two_models_train_side_by_side():
    x, y = data()
    pairs = [compiled(sequential()) for _ in range(2)]
    alone = compiled(sequential())
    for model in pairs:
        model.set_weights(alone.get_weights())
    for _ in range(3):
        alone.train_on_batch(x, y)
        for model in pairs:
            model.train_on_batch(x, y)
    for model in pairs:
        assert_close(weights(model), weights(alone))


def unsupported():
    """Two layers without a captured linear map."""
    return keras.Sequential(
        [
            keras.Input((FEATURES,)),
            Unknown(name="first"),
            layers.Dense(5, activation="tanh"),
            Unknown(name="second"),
            layers.Dense(3),
        ]
    )


@pytest.mark.variants("diagonal")
@pytest.mark.parametrize("fallback", ["diagonal", "first_order"])
def test_unsupported_layers_fall_back_with_one_warning(fallback, recwarn):
    x, y = data()
    model = compiled(unsupported(), kng.KFAC(fallback=fallback))
    before = weights(model)
    losses = [float(model.train_on_batch(x, y)) for _ in range(12)]
    found = [str(w.message) for w in recwarn if "fallback" in str(w.message)]
    assert len(found) == 1
    assert "first" in found[0] and "second" in found[0]
    assert "dense" not in found[0]
    assert losses[-1] < 0.7 * losses[0]
    for old, new in zip(before, weights(model), strict=True):
        assert np.any(old != new)


@pytest.mark.slow
def test_unsupported_layers_in_a_graph_warn_once(recwarn):
    x, y = data()
    model = compiled(unsupported(), run_eagerly=False)
    model.fit(x, y, batch_size=8, epochs=2, verbose=0)
    found = [w for w in recwarn if "fallback" in str(w.message)]
    assert len(found) == 1
