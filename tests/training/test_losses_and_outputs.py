"""Several inputs and outputs, loss weights, penalties, scale of the loss."""

import keras
import numpy as np
import pytest

import keras_natgrad as kng
from tests.training.networks import (
    FEATURES,
    assert_close,
    compiled,
    cross_entropy,
    data,
    like_sgd,
    mlp,
    weights,
)

layers = keras.layers


def two_headed(named=True):
    """Two inputs, and an output for each of two losses."""
    left, right = (
        keras.Input((2,), name="left"),
        keras.Input((2,), name="right"),
    )
    hidden = layers.Dense(
        5,
        activation="tanh",
        kernel_initializer=keras.initializers.GlorotNormal(seed=3),
    )(layers.Concatenate()([left, right]))
    label = layers.Dense(
        3,
        name="label",
        kernel_initializer=keras.initializers.GlorotNormal(seed=4),
    )(hidden)
    value = layers.Dense(
        2,
        name="value",
        kernel_initializer=keras.initializers.GlorotNormal(seed=5),
    )(hidden)
    outputs = {"label": label, "value": value} if named else [label, value]
    return keras.Model({"left": left, "right": right}, outputs)


def two_headed_data():
    x, y = data()
    return (
        {"left": x[:, :2], "right": x[:, 2:]},
        {"label": y, "value": x[:, 1:3] ** 2},
    )


def losses_of(named=True):
    if named:
        return {"label": cross_entropy(), "value": "mse"}
    return [cross_entropy(), "mse"]


@pytest.mark.variants("False-True")
@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("weighted", [False, True])
def test_several_inputs_and_outputs(named, weighted):
    x, y = two_headed_data()
    loss_weights = {"label": 0.5, "value": 2.0} if weighted else None
    if not named:
        y = [y["label"], y["value"]]
        loss_weights = [0.5, 2.0] if weighted else None
    model = compiled(
        two_headed(named), loss=losses_of(named), loss_weights=loss_weights
    )
    history = [model.train_on_batch(x, y, return_dict=True) for _ in range(8)]
    assert history[-1]["loss"] < 0.6 * history[0]["loss"]


@pytest.mark.slow
def test_several_outputs_in_a_graph_with_metrics():
    x, y = two_headed_data()
    model = compiled(
        two_headed(),
        loss=losses_of(),
        metrics={"label": "accuracy", "value": "mae"},
        run_eagerly=False,
    )
    history = model.fit(x, y, batch_size=8, epochs=3, verbose=0).history
    assert {"label_accuracy", "value_mae", "label_loss"} <= set(history)
    assert history["loss"][-1] < history["loss"][0]


def test_an_output_of_weight_zero_is_absent(float64):
    """The trunk and the other output move as if it did not exist."""
    x, y = two_headed_data()
    arguments = {
        "learning_rate": 0.1,
        "damping": 0.1,
        "momentum": 0.0,
        "fisher": "exact",
    }
    both = compiled(
        two_headed(),
        kng.KFAC(**arguments),
        loss=losses_of(),
        loss_weights={"label": 1.0, "value": 0.0},
    )
    value = both.get_layer("value").kernel.numpy()
    whole = two_headed()
    one = compiled(
        keras.Model(whole.inputs, whole.get_layer("label").output),
        kng.KFAC(**arguments),
    )
    for _ in range(3):
        both.train_on_batch(x, y)
        one.train_on_batch([x["left"], x["right"]], y["label"])
    np.testing.assert_array_equal(both.get_layer("value").kernel, value)
    assert_close(
        [v.numpy() for v in both.get_layer("label").weights],
        [v.numpy() for v in one.get_layer("label").weights],
        1e-9,
    )


def test_an_output_without_a_loss():
    x, y = two_headed_data()
    model = compiled(two_headed(), loss={"label": cross_entropy()})
    before = model.get_layer("value").kernel.numpy()
    with pytest.warns(UserWarning, match="Gradients do not exist"):
        losses = [
            float(model.train_on_batch(x, {"label": y["label"]}))
            for _ in range(5)
        ]
    assert losses[-1] < 0.8 * losses[0]
    np.testing.assert_array_equal(model.get_layer("value").kernel, before)


def test_sample_weights_per_output():
    """Weight zero everywhere on one output equals loss weight zero."""
    x, y = two_headed_data()
    left, right = (
        compiled(
            two_headed(),
            kng.KFAC(damping=0.1),
            loss=losses_of(),
            loss_weights=loss_weights,
        )
        for loss_weights in (None, {"label": 1.0, "value": 0.0})
    )
    weight = {"label": np.ones(24), "value": np.zeros(24)}
    for _ in range(3):
        left.train_on_batch(x, y, sample_weight=weight)
        right.train_on_batch(x, y)
    assert_close(weights(left), weights(right), 1e-4, 1e-6)


class Penalised(layers.Layer):
    """Adds a loss of its activities."""

    def call(self, x):
        self.add_loss(0.3 * keras.ops.mean(x**2))
        return x


def with_penalties():
    def glorot(seed):
        return keras.initializers.GlorotNormal(seed=seed)

    return keras.Sequential(
        [
            keras.Input((FEATURES,)),
            layers.Dense(
                5,
                kernel_regularizer=keras.regularizers.L1L2(0.01, 0.02),
                activity_regularizer=keras.regularizers.L2(0.01),
                kernel_initializer=glorot(1),
            ),
            Penalised(),
            layers.Dense(3, kernel_initializer=glorot(2)),
        ]
    )


def test_penalties_are_in_the_gradient(float64):
    x, y = data()
    model = compiled(with_penalties(), like_sgd())
    reference = compiled(with_penalties(), keras.optimizers.SGD(0.1))
    for _ in range(3):
        assert model.train_on_batch(x, y) == pytest.approx(
            reference.train_on_batch(x, y), rel=1e-4
        )
    assert_close(weights(model), weights(reference), 1e-3, 1e-6)


@pytest.mark.slow
def test_penalties_with_default_arguments():
    x, y = data()
    model = compiled(with_penalties())
    losses = [float(model.train_on_batch(x, y)) for _ in range(10)]
    assert losses[-1] < 0.7 * losses[0]
    assert losses[-1] == pytest.approx(
        float(compiled_value(model, x, y)), rel=0.5
    )


def compiled_value(model, x, y):
    return model.evaluate(x, y, batch_size=24, verbose=0)


def test_l2_regularizer_shrinks_towards_zero():
    """Without a slope of the data, an L2 penalty alone drives the weights."""
    x, y = data()
    model = mlp(kernel_regularizer=keras.regularizers.L2(0.1))
    compiled(model, kng.KFAC(damping=0.01))
    norms = []
    for _ in range(8):
        norms.append(np.linalg.norm(model.layers[0].kernel))
        model.train_on_batch(x, y, sample_weight=np.full(24, 1e-6))
    assert norms[-1] < 0.2 * norms[0]


@pytest.mark.variants("mse-None-real")
@pytest.mark.parametrize(
    ("loss", "last", "targets"),
    [
        ("mse", None, "real"),
        ("binary_crossentropy", "sigmoid", "binary"),
        ("categorical_crossentropy", "softmax", "one_hot"),
        ("sparse_categorical_crossentropy", "softmax", "label"),
        (kng.losses.NegativeLogLikelihood("normal"), None, "real"),
    ],
)
def test_losses_by_name(loss, last, targets):
    x, y = data()
    model = keras.Sequential(
        [
            keras.Input((FEATURES,)),
            layers.Dense(5, activation="tanh"),
            layers.Dense(3, activation=last),
        ]
    )
    y = {
        "real": x[:, :3],
        "binary": (x[:, :3] > 0).astype("float32"),
        "one_hot": np.eye(3)[y],
        "label": y,
    }[targets]
    compiled(model, loss=loss)
    values = [float(model.train_on_batch(x, y)) for _ in range(8)]
    least = kng.heads.Normal().log_prob(x[:, :3], x[:, :3])
    floor = -float(np.mean(least)) if not isinstance(loss, str) else 0.0
    assert values[-1] - floor < 0.7 * (values[0] - floor)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["loss_weights", "sample_weight", "sum"])
def test_the_scale_of_the_loss_does_not_matter(how):
    """float32: up to rounding, over twenty steps with default arguments."""
    check_scale(how, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_the_scale_of_the_loss_does_not_matter_float64(float64):
    check_scale("loss_weights", rtol=1e-6, atol=1e-9)


def check_scale(how, rtol, atol):
    rng = np.random.default_rng(0)
    x, _ = data()
    # Labels with noise: the loss keeps away from zero.
    y = rng.integers(0, 3, size=24)
    plain = compiled()
    arguments, extra, loss = {}, {}, None
    if how == "loss_weights":
        arguments = {"loss_weights": 1000.0}
    elif how == "sum":
        loss = cross_entropy(reduction="sum")
    else:
        extra = {"sample_weight": np.full(24, 1000.0)}
    scaled = compiled(loss=loss, **arguments)
    for _ in range(20):
        plain.train_on_batch(x, y)
        scaled.train_on_batch(x, y, **extra)
    assert_close(weights(scaled), weights(plain), rtol, atol)
