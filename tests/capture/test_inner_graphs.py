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


class Hidden(keras.Model):
    """Calls its first layer in some way of its own; its layers are built."""

    def __init__(self):
        super().__init__()
        self.hidden = self.make_hidden()
        self.last = keras.layers.Dense(1)
        self.hidden.build((None, 2))

    def make_hidden(self):
        return keras.layers.Dense(3, activation="tanh")

    def call(self, x):
        return self.last(self.run(x))


class TracedBefore(Hidden):
    """The `tf.function` was traced before the model was attached."""

    @tf.function
    def run(self, x):
        return self.hidden(x)


class Recomputed(Hidden):
    """The forward pass is made again in the backward pass."""

    def run(self, x):
        return tf.recompute_grad(lambda x: self.hidden(x))(x)


class RecomputedOnce(Recomputed):
    """The same layer is called in the open too."""

    def run(self, x):
        return super().run(x) + self.hidden(2 * x)


class Rematerialised(Hidden):
    """The same, by Keras."""

    def make_hidden(self):
        with keras.RematScope(mode="full"):
            return super().make_hidden()

    def run(self, x):
        return self.hidden(x)


class WeightsRead(Hidden):
    """The weights are read without a call."""

    def run(self, x):
        return tf.tanh(x @ self.hidden.kernel)


class Stopped(Hidden):
    """A second use is a target, which nothing is sent back to."""

    def run(self, x):
        target = tf.stop_gradient(self.hidden(2 * x))
        return self.hidden(x) + target


class Unused(Hidden):
    """The loss takes no part of one layer's output, and one is not called."""

    def __init__(self):
        super().__init__()
        self.idle = keras.layers.Dense(2)
        self.idle.build((None, 2))
        self.other = keras.layers.Dense(2)
        self.other.build((None, 2))

    def run(self, x):
        self.other(x)
        return self.hidden(x)


UNREACHED = r"cannot be reached there: \['dense'\]"
UNREACHABLE = [
    TracedBefore,
    Recomputed,
    RecomputedOnce,
    Rematerialised,
    WeightsRead,
]


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


@pytest.mark.variants("TracedInside-eager")
@pytest.mark.parametrize("eager", [True, False], ids=["eager", "graph"])
@pytest.mark.parametrize(
    "make",
    [TracedInside, TracedBefore, Rematerialised, recurrent, time_distributed],
)
def test_layer_in_an_inner_graph(make, eager):
    model = make()
    rng = np.random.default_rng(0)
    loops = make in (recurrent, time_distributed)
    shape = (BATCH, 4, 2) if loops else (BATCH, 2)
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


@pytest.mark.variants("TracedBefore", "RecomputedOnce")
@pytest.mark.parametrize("make", UNREACHABLE)
def test_what_to_write_instead(make):
    """The error names the layer, and the layer that is left out falls back.

    TensorFlow has no Jacobian-vector products of recomputed parts, which the
    quadratic model would take.
    """
    x = np.random.default_rng(0).normal(size=(BATCH, 2))

    def train(exclude):
        model = make()
        model(x)
        optimizer = kng.KFAC(0.1, momentum=0.9, damping=0.1)
        optimizer.attach(model, exclude=exclude)
        model.compile(optimizer, loss="mse", jit_compile=False)
        model.train_on_batch(x, x[:, :1])

    with pytest.raises(ValueError, match=UNREACHED):
        train([])
    keras.utils.clear_session(free_memory=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train(["dense"])


@pytest.mark.parametrize("make", [TracedBefore, Recomputed])
@pytest.mark.parametrize(
    "optimizer", [kng.NaturalGradient, lambda: kng.RNGD(horizon="full")]
)
def test_other_optimizers(make, optimizer):
    model = make()
    x = np.random.default_rng(0).normal(size=(BATCH, 2))
    model(x)
    model.compile(optimizer().attach(model), loss="mse", jit_compile=False)
    with pytest.raises(ValueError, match=UNREACHED):
        model.train_on_batch(x, x[:, :1])


@pytest.mark.parametrize("make", UNREACHABLE)
def test_fisher_of_unreachable_layers(make):
    model = make()
    x = np.random.default_rng(0).normal(size=(BATCH, 2))
    model(x)
    with pytest.raises(ValueError, match=UNREACHED):
        kng.fisher(model, x, kng.heads.Normal(), kind="sampled")


def test_fisher_in_an_inner_graph():
    """The `tf.function` is traced in the recorded pass."""
    model = TracedInside()
    model.hidden.build((None, 2))
    model.last.build((None, 3))
    model.built = True
    x = np.random.default_rng(0).normal(size=(BATCH, 2))
    with pytest.raises(ValueError, match=UNREACHED):
        kng.fisher(model, x, kng.heads.Normal())


def test_fisher_without_the_batch_axis():
    """Eight rows of weights for six examples."""

    class Latent(Hidden):
        def __init__(self):
            super().__init__()
            self.rows = self.add_weight(shape=(8, 2), name="rows")

        def run(self, x):
            return tf.reduce_mean(self.hidden(self.rows), 0) + x[:, :1]

    model = Latent()
    x = np.random.default_rng(0).normal(size=(BATCH, 2))
    model(x)
    with pytest.raises(ValueError, match=r"without the batch axis.*'dense'"):
        kng.fisher(model, x, kng.heads.Normal())


@pytest.mark.variants("Stopped-eager", "Unused-eager")
@pytest.mark.parametrize("eager", [True, False], ids=["eager", "graph"])
@pytest.mark.parametrize("make", [Stopped, Unused])
@pytest.mark.filterwarnings("ignore:Gradients do not exist")
def test_layers_that_the_loss_does_not_use(make, eager):
    """Nothing is sent back to them for a good reason."""
    model = make()
    x = np.random.default_rng(0).normal(size=(BATCH, 2))
    model(x)
    optimizer = kng.KFAC(0.1, momentum=0.9, damping=0.1).attach(model)
    model.compile(optimizer, loss="mse", run_eagerly=eager, jit_compile=False)
    model.train_on_batch(x, x[:, :1])
    traces = {
        entry.layer.path.split("/")[-1]: float(entry.block.trace())
        for entry in optimizer.curvature.entries
    }
    assert traces.pop("dense") > 0 and traces.pop("dense_1") > 0
    assert list(traces.values()) == ([0, 0] if make is Unused else [])
    assert kng.fisher(model, x, kng.heads.Normal())


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
