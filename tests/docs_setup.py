"""What the code of the documentation presupposes, and what it should do.

An example shows what it is about, and takes data and model for granted. Here is
what they are when the examples are run.
"""

import keras
import numpy as np
import pytest
import tensorflow as tf
import tensorflow_probability as tfp
import tf_keras

import keras_natgrad

# Imported here to register its layers before a test isolates the registry.
import keras_natgrad.integrations.tf_keras  # noqa: F401
from tests.distribution.strategy import two_replicas

# Every example may use these without an import.
IMPORTS = {
    "keras": keras,
    "keras_natgrad": keras_natgrad,
    "kng": keras_natgrad,
    "np": np,
    "tf": tf,
    "tfd": tfp.distributions,
    "tfp": tfp,
}


def _inputs(examples=48):
    return np.random.default_rng(0).normal(size=(examples, 4)).astype("float32")


def _network(outputs, activation=None):
    return keras.Sequential(
        [
            keras.Input((4,)),
            keras.layers.Dense(3, activation="tanh", name="dense"),
            keras.layers.Dense(outputs, activation=activation, name="logits"),
        ],
        name="sequential",
    )


def classifier():
    """Three classes, from probabilities."""
    x = _inputs()
    return {
        "model": _network(3, "softmax"),
        "x": x,
        "y": np.argmax(x[:, :3], axis=-1),
        "loss": "sparse_categorical_crossentropy",
    }


class _Tensorflow:
    """TensorFlow with the strategy that all tests of a process share."""

    class distribute:
        MirroredStrategy = staticmethod(two_replicas)

    def __getattr__(self, name):
        return getattr(tf, name)


def distributed():
    """A classifier that is made in the scope of a strategy."""
    return {
        **classifier(),
        "tf": _Tensorflow(),
        "build_model": lambda: _network(3, "softmax"),
    }


def heads_loop():
    """Logits, and the head that reads them."""
    return {
        "build_model": lambda: _network(3),
        "head": keras_natgrad.heads.Categorical(),
    }


def regression():
    """One target; a head of unit variance."""
    x = _inputs()
    model = _network(1)
    return {
        "model": model,
        "network": model,
        "layers": model.layers,
        "x": x,
        "y": np.sin(x[:, :1]),
        "head": keras_natgrad.heads.Normal(),
        "loss": "mse",
        "optimizer": keras_natgrad.KFAC().attach(model),
    }


def compiled():
    """The same, compiled."""
    names = regression()
    names["model"].compile(names["optimizer"], loss="mse")
    return names


def built():
    """An optimizer with a damping."""
    names = compiled()
    names["optimizer"].build(names["model"].trainable_variables)
    names["optimizer"].state.damping.assign(0.5)
    return names


def two_outputs():
    """One target whose mean and scale are predicted."""
    names = regression()
    model = _network(2)
    optimizer = keras_natgrad.KFAC().attach(model)
    return {**names, "model": model, "optimizer": optimizer}


def predicted():
    """Two outputs per example, and the head that reads them."""
    return {**two_outputs(), "head": keras_natgrad.heads.Normal("softplus")}


def counts():
    """Counts with two predicted parameters."""
    names = two_outputs()
    return {**names, "y": np.round(np.exp(names["y"]))}


def whitened():
    """A classifier with whitened layers."""
    names = classifier()
    names["model"] = keras_natgrad.layers.whitened(names["model"])
    return names


def custom_loop():
    """A model with a head, and its loss as a function."""
    names = regression()
    loss = keras_natgrad.losses.NegativeLogLikelihood(names["head"])
    return {**names, "loss_fn": loss}


def digits():
    """Images as vectors."""
    x = np.random.default_rng(0).uniform(size=(64, 64)).astype("float32")
    y = np.arange(64) % 10
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    return {"x": x, "y": y, "loss": loss}


def digit_images():
    """Images of one channel."""
    names = digits()
    names["x"] = names["x"].reshape(64, 8, 8, 1)
    return names


def tunable():
    """A function that builds models, and Keras Tuner."""
    keras_tuner = pytest.importorskip("keras_tuner")

    def build(hp):
        model = _network(1)
        model.compile("adam", loss="mse")
        return model

    return {**regression(), "keras_tuner": keras_tuner, "build": build}


def has_tuner():
    """Keras Tuner is there."""
    pytest.importorskip("keras_tuner")
    return {}


def wide_inputs():
    """Sixty-four features, ten classes."""
    x = np.random.default_rng(0).normal(size=(320, 64)).astype("float32")
    return {"x": x, "y": np.argmax(x[:, :10], axis=-1)}


def my_dense():
    """A layer that nobody has described."""

    class MyDense(keras.layers.Layer):
        def build(self, shape):
            self.w = self.add_weight(shape=(shape[-1], 2), name="w")

        def call(self, x):
            return x @ self.w

    return {"MyDense": MyDense}


def residuals():
    """Residuals inside and on the boundary."""
    model = keras.Sequential(
        [
            keras.Input((1,)),
            keras.layers.Dense(4, activation="tanh"),
            keras.layers.Dense(1),
        ]
    )
    return {
        "model": model,
        "network": model,
        "interior": lambda x: model(x)[:, 0] - tf.sin(x[:, 0]),
        "boundary": lambda x: model(x)[:, 0],
        "x": tf.random.uniform([16, 1]),
        "x_edge": tf.zeros([1, 1]),
    }


# ---- What has to be true afterwards ----------------------------------------


def trained(names):
    """Steps were made, and all weights are finite."""
    assert int(names["model"].optimizer.iterations) > 0
    for weight in names["model"].trainable_variables:
        assert np.all(np.isfinite(weight.numpy()))


def learned(names):
    """Most of the classes are right."""
    predicted = np.argmax(names["model"].predict(names["x"]), axis=-1)
    assert np.mean(predicted == names["y"]) > 0.7


def band(names):
    """The band of 90 % holds about that share of the targets."""
    trained(names)
    low, high = names["low"], names["high"]
    inside = (names["targets"] >= low) & (names["targets"] <= high)
    assert 0.8 < np.mean(inside) < 1.0


def resumed(names):
    """The counters went on from where they were."""
    assert int(names["model"].optimizer.iterations) == 5 * 4 + 4


def loop_learned(names):
    """The last loss of the loop is below that of constant predictions."""
    head = keras_natgrad.heads.Normal(scale=float(np.std(names["targets"])))
    targets = tf.constant(names["targets"][:256], tf.float32)
    constant = -np.mean(head.log_prob(tf.zeros_like(targets), targets))
    assert float(names["loss"]) < constant


def compiled_step_runs(names):
    """Steps of the function that the example defines lower the loss."""
    step, x, y = names["train_step"], names["x"], names["y"]
    losses = [float(step(x, y)) for _ in range(6)]
    assert losses[-1] < losses[0]


def replicas_step(names):
    """Steps of the strategy lower the loss."""
    losses = [float(names["step"](names["x"], names["y"])) for _ in range(6)]
    assert losses[-1] < losses[0]


def residual_steps_run(names):
    """So do steps on residuals."""
    losses = [float(names["step"]()) for _ in range(4)]
    assert losses[-1] < losses[0]


def solved(names):
    """The loop ends at the solution exp(−x)."""
    x = names["x"].numpy()
    np.testing.assert_allclose(names["model"](x), np.exp(-x), atol=1e-5)


def raised(names):
    """The damping is ten times what it was."""
    assert names["optimizer"].statistics["damping"] == 5.0


def attached(names):
    """The model has this package's training step and loses nothing by it."""
    assert "train_step" in vars(names["model"])
    assert names["optimizer"].attached_model() is names["model"]


def excluded(names):
    """The named layer falls back, and no other."""
    optimizer = names["optimizer"]
    with pytest.warns(UserWarning, match="sequential/logits/kernel"):
        optimizer.build(names["model"].trainable_variables)
    assert [e.path for e in optimizer.curvature.plan.layers] == [
        "sequential/dense"
    ]


def operator(names):
    """A symmetric operator on all parameters."""
    fisher, model = names["fisher"], names["model"]
    assert fisher.shape == (model.count_params(),) * 2
    dense = fisher.to_dense().numpy()
    np.testing.assert_allclose(dense, dense.T, atol=1e-6)


def per_layer(names):
    """One operator per layer, each with its bias."""
    shape = names["operators"]["sequential/dense"].shape
    assert shape == (15, 15) and len(names["operators"]) == 2


def own_block(names):
    """The pattern gives the layer the new block."""
    optimizer = names["optimizer"].attach(_network(3))
    optimizer.build(optimizer.attached_model().trainable_variables)
    kinds = [type(e.block).__name__ for e in optimizer.curvature.entries]
    assert kinds == ["FeatureScaledBlock", "MyBlock"]


def own_layer(names):
    """Nothing of a model with the layer falls back."""
    model = keras.Sequential([keras.Input((4,)), names["MyDense"]()])
    optimizer = keras_natgrad.KFAC().attach(model)
    optimizer.build(model.trainable_variables)
    assert optimizer.curvature.plan.fallback == ()


def recorded(names):
    """The first layer was used once."""
    record = names["taps"].record(names["layers"][0])
    assert len(record.preactivations) == 1


def _score_moment(head, outputs, targets):
    """`E[s²]` of a density of positive numbers, by the trapezoidal rule."""
    outputs = tf.fill([len(targets), 1], tf.constant(outputs, tf.float64))
    with tf.GradientTape() as tape:
        tape.watch(outputs)
        log_prob = head.log_prob(outputs, targets[:, np.newaxis])
    score = tape.gradient(log_prob, outputs).numpy()[:, 0]
    return np.trapezoid(np.exp(log_prob.numpy()) * score**2, targets)


def own_head(names):
    """The Fisher is the second moment of the score."""
    head = names["Exponential"]()
    targets = np.linspace(0, 60, 400_001)
    np.testing.assert_allclose(
        head.fisher(tf.constant([[0.3]], tf.float64))[0],
        [[_score_moment(head, 0.3, targets)]],
        rtol=1e-6,
    )


def own_family(names):
    """The same, through the slope of the link."""
    head = names["HalfNormal"]("exp")
    targets = np.linspace(0, 60, 400_001)
    np.testing.assert_allclose(
        head.fisher(tf.constant([[0.3]], tf.float64))[0],
        [[_score_moment(head, 0.3, targets)]],
        rtol=1e-6,
    )


def own_distribution(names):
    """`Σ p′² / p` over the four classes."""

    def sigmoid(x):
        return 1 / (1 + np.exp(-x))

    cumulative = sigmoid(np.array([-1.0, 0.0, 1.0]) - 0.3)
    p = np.diff(cumulative, prepend=0, append=1)
    slope = -np.diff(cumulative * (1 - cumulative), prepend=0, append=0)
    found = names["head"].fisher(tf.constant([[0.3]], tf.float64))
    np.testing.assert_allclose(found[0, 0, 0], np.sum(slope**2 / p), rtol=1e-10)


def mixture_density(names):
    """The density of the mixture integrates to one."""
    targets = np.linspace(-40, 40, 20_001)[:, np.newaxis]
    outputs = tf.zeros([len(targets), 9], tf.float64)
    distribution = names["head"].distribution(outputs)
    density = np.exp(np.reshape(distribution.log_prob(targets[:, 0]), -1))
    np.testing.assert_allclose(
        np.trapezoid(density, targets[:, 0]), 1, rtol=1e-6
    )


def own_loss(names):
    """The converter is found by the loss."""
    head, _ = keras_natgrad.heads.from_loss(names["half_squared_error"])
    assert head == keras_natgrad.heads.Normal(scale=1.0)


def monitored(names):
    """A record every fourth step, in the logs at the ends of epochs."""
    assert len(names["history"].history["damping"]) == 10
    assert names["monitor"].history["step"] == list(range(4, 81, 4))
    assert names["monitor"].spectrum("sequential/hidden").size == 21 * 32


def recorded_state(names):
    """A record of a loop of one's own."""
    assert np.isfinite(names["record"]["damping"])


def has_patience(names):
    """The policy is the documented one."""
    assert names["policy"].patience == 3


def found(names):
    """The best model is trained by K-FAC, and has trained on."""
    searched(names)
    trained(names)


def searched(names):
    """The best model has the curvature of its trial."""
    optimizer = names["model"].optimizer
    assert isinstance(optimizer, keras_natgrad.KFAC)
    assert optimizer.statistics["refreshes"] > 0


def searchable(names):
    """The wrapped build makes a model with the optimizer's rate."""
    keras_tuner = pytest.importorskip("keras_tuner")
    space = keras_tuner.HyperParameters()
    model = names["hypermodel"].build(space)
    assert float(model.optimizer.learning_rate) == space.get("rate")


def wraps(names):
    """The wrapped build makes a model with an attached K-FAC."""
    keras_tuner = pytest.importorskip("keras_tuner")
    model = names["hypermodel"].build(keras_tuner.HyperParameters())
    assert isinstance(model.optimizer, keras_natgrad.KFAC)
    assert model.optimizer.attached_model() is model


def two_operators(names):
    """One operator per layer."""
    shapes = [each.shape[0] for each in names["fisher"].values()]
    assert shapes == [21 * 32, 33 * 2]


def same_function(names):
    """The plain model computes what the whitened one does."""
    expected = names["model"].predict(names["x"])
    found = names["plain"].predict(names["x"])
    np.testing.assert_allclose(found, expected, atol=1e-4)


def tf_keras_regression():
    """One target; a model of tf_keras."""
    x = _inputs()
    layers = [tf_keras.layers.Dense(3, "tanh"), tf_keras.layers.Dense(1)]
    model = tf_keras.Sequential([tf_keras.Input((4,)), *layers])
    return {"model": model, "x": x, "y": np.sin(x[:, :1])}


def tf_keras_trained(names):
    """Steps were made, with both layers captured."""
    optimizer = names["optimizer"]
    assert int(optimizer.iterations) > 0
    assert len(optimizer.engine.plan.layers) == 2
