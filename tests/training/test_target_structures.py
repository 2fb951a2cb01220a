"""Targets in every structure that Keras takes, and models without a loss."""

import keras
import numpy as np
import pytest

import keras_natgrad as kng
from tests.training.networks import assert_equal, weights

OPTIMIZERS = {
    "kfac": kng.KFAC,
    "natural_gradient": kng.NaturalGradient,
    "prong": kng.PRONG,
    "rngd": lambda: kng.RNGD(0.1),
}


def data():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(32, 3)).astype("float32")
    return x, x[:, :1] - x[:, 1:2], np.tanh(x[:, :2])


def network(structure):
    """A built model with the outputs "b" (one unit) and "a" (two)."""
    keras.utils.set_random_seed(0)
    x = keras.Input((3,))
    hidden = keras.layers.Dense(4, activation="tanh")(x)
    outputs = [
        keras.layers.Dense(units, name=name)(hidden)
        for name, units in (("b", 1), ("a", 2))
    ]
    return keras.Model(x, structure(*outputs))


def trained(structure, targets, loss, make=kng.KFAC):
    x, first, second = data()
    model = network(structure)
    model.compile(make().attach(model), loss, run_eagerly=True)
    for _ in range(2):
        model.train_on_batch(x, targets(first, second))
    return weights(model)


@pytest.fixture(scope="module")
def expected():
    """Weights with a list of targets, by the losses; trained once."""
    return {
        losses: trained(as_list, as_list, list(losses))
        for losses in (("mse", "huber"), ("mse", "mse"))
    }


def as_list(b, a):
    return [b, a]


def as_tuple(b, a):
    return (b, a)


def by_name(b, a):
    return {"a": a, "b": b}


def by_another_name(b, a):
    return {"first": b, "second": a}


LOSSES = ["mse", "huber"]
LOSSES_BY_NAME = {"b": "mse", "a": "huber"}


@pytest.mark.variants("kfac", "prong")
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_targets_by_name_for_a_list_of_outputs(make):
    found = trained(as_list, by_name, LOSSES_BY_NAME, make)
    assert_equal(found, trained(as_list, as_list, LOSSES, make))


@pytest.mark.parametrize(
    ("structure", "targets", "loss"),
    [
        (as_list, by_name, LOSSES),
        (as_list, as_tuple, LOSSES),
        (as_tuple, as_list, LOSSES),
        (
            by_another_name,
            as_list,
            {"first": "mse", "second": "huber"},
        ),
    ],
)
def test_other_structures(structure, targets, loss, expected):
    found = trained(structure, targets, loss)
    assert_equal(found, expected["mse", "huber"])


@pytest.mark.parametrize("targets", [by_name, as_tuple])
def test_one_loss_for_all_outputs(targets, expected):
    found = trained(as_list, targets, "mse")
    assert_equal(found, expected["mse", "mse"])


@pytest.mark.parametrize(
    "structure",
    [lambda a: a, lambda a: [a], lambda a: {"a": a}],
    ids=["alone", "list", "dictionary"],
)
@pytest.mark.parametrize(
    "targets",
    [lambda y: y, lambda y: [y]],
    ids=["alone", "list"],
)
def test_a_single_output(structure, targets):
    x, y, _ = data()
    found = []
    for wrap, targets_of in ((structure, targets), (lambda a: a, lambda y: y)):
        keras.utils.set_random_seed(0)
        inputs = keras.Input((3,))
        model = keras.Model(inputs, wrap(keras.layers.Dense(1)(inputs)))
        model.compile(kng.KFAC().attach(model), "mse", run_eagerly=True)
        model.train_on_batch(x, targets_of(y))
        found.append(weights(model))
    assert_equal(*found)


def test_only_the_targets_of_outputs_with_a_loss():
    with pytest.warns(UserWarning, match="Gradients do not exist"):
        found = trained(as_list, lambda b, a: [a], [None, "huber"])
    with pytest.warns(UserWarning, match="Gradients do not exist"):
        expected = trained(as_list, as_list, [None, "huber"])
    assert_equal(found, expected)


class OwnLoss(keras.Model):
    """Its loss is in `compute_loss`, as Keras's guides have it."""

    def __init__(self):
        super().__init__()
        self.dense = keras.layers.Dense(1)

    def call(self, x):
        return self.dense(x)

    def compute_loss(
        self, x=None, y=None, y_pred=None, sample_weight=None, training=True
    ):
        return keras.ops.mean(0.5 * keras.ops.square(y - y_pred))


class Penalised(keras.layers.Layer):
    """Adds the loss of a model that is compiled without one."""

    def call(self, values):
        outputs, targets = values
        self.add_loss(keras.ops.mean(0.5 * (outputs - targets) ** 2))
        return outputs


def with_own_loss():
    return OwnLoss(), data()[:2]


def with_added_loss():
    x, y = keras.Input((3,)), keras.Input((1,))
    model = keras.Model([x, y], Penalised()([keras.layers.Dense(1)(x), y]))
    return model, (list(data()[:2]),)


@pytest.mark.variants(
    "with_own_loss-kfac",
    "with_own_loss-prong",
    "with_added_loss-kfac",
    "with_added_loss-prong",
)
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("build", [with_own_loss, with_added_loss])
def test_no_compiled_loss(build, make):
    """The head says what the Fisher is; the gradient is that of the loss."""
    model, batch = build()
    optimizer = make().attach(model, head=kng.heads.Normal())
    model.compile(optimizer, run_eagerly=True)
    losses = [
        float(model.train_on_batch(*batch, return_dict=True)["loss"])
        for _ in range(6)
    ]
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("build", [with_own_loss, with_added_loss])
def test_no_compiled_loss_and_no_head(build):
    model, batch = build()
    model.compile(kng.KFAC().attach(model), run_eagerly=True)
    with pytest.raises(ValueError, match="attach\\(model, head="):
        model.train_on_batch(*batch)


def test_no_trainable_weights():
    """Nothing to train, and nothing to complain about, as in Keras."""
    x, y, _ = data()
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    model.trainable = False
    optimizer = kng.KFAC(log_statistics=True).attach(model)
    model.compile(optimizer, "mse", run_eagerly=True)
    before = weights(model)
    with pytest.warns(UserWarning, match="any trainable weights"):
        assert np.isfinite(model.train_on_batch(x, y))
    assert_equal(weights(model), before)
