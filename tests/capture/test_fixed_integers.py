"""Embeddings of single integers, and of integers of no example."""

import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_natgrad as kng
from keras_natgrad.capture import make_plan, match_layers

from .conftest import check_both

pytestmark = pytest.mark.usefixtures("float64")

layers = keras.layers
DEPTH, FEATURES = 5, 3


def tokens(*shape):
    return np.random.default_rng(0).integers(0, DEPTH, size=shape)


class Recommender(keras.Model):
    """Embeddings of single integers, as of a user and a product."""

    def __init__(self, steps=0):
        super().__init__()
        self.user = layers.Embedding(DEPTH, FEATURES)
        self.item = layers.Embedding(DEPTH, FEATURES)
        self.score = layers.Dense(1)
        self.positions = layers.Embedding(12, FEATURES) if steps else None
        self.steps = steps

    def call(self, ids):
        if isinstance(ids, dict):
            user, item = self.user(ids["user"]), self.item(ids["item"])
        else:
            user, item = self.user(ids[:, 0]), self.item(ids[:, 1])
        if self.positions is not None:
            steps = self.positions(keras.ops.arange(self.steps))
            user += keras.ops.sum(steps, axis=0)
        return self.score(user * item)


def as_dictionary(ids):
    return {"user": ids[:, 0], "item": ids[:, 1]}


def nested(model):
    return keras.Sequential([model])


@pytest.mark.parametrize("wrap", [lambda model: model, nested])
@pytest.mark.parametrize("make", [lambda ids: ids, as_dictionary])
def test_single_integers_of_a_known_batch(make, wrap):
    """The layer is built on `(batch,)`, which is not a list of positions."""
    model = wrap(Recommender())
    ids = make(tokens(8, 2))
    model(ids)
    plan = make_plan(model, model.trainable_variables)
    assert len(plan.layers) == 3 and plan.reasons == ()
    embeddings = [
        layer
        for layer, _ in match_layers(plan, model, model.trainable_variables)
    ]
    if make is not as_dictionary:
        check_both(model, embeddings[:2], ids)


def test_single_integers_in_fit():
    """Batches of a known size, from the first step on."""
    model = Recommender()
    optimizer = kng.KFAC(0.1, momentum=0.9, damping=0.1).attach(model)
    model.compile(optimizer, "mse", jit_compile=False)
    data = tf.data.Dataset.from_tensor_slices((tokens(16, 2), np.ones((16, 1))))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.fit(data.batch(8, drop_remainder=True), shuffle=False, verbose=0)
    kinds = [type(e.block).kind for e in optimizer.curvature.entries]
    assert kinds == ["kronecker"] * 3
    assert all(float(e.block.trace()) > 0 for e in optimizer.curvature.entries)


@pytest.mark.parametrize("steps", [6, 12])
def test_positions_beside_single_integers_fall_back(steps):
    """Twelve of a batch of twelve are all that there are."""
    model = Recommender(steps)
    model(tokens(12, 2))
    plan = make_plan(model, model.trainable_variables)
    assert len(plan.layers) == 3
    assert plan.reasons == (
        "Embedding: looked up by integers without a batch axis",
    )


def test_as_many_positions_as_examples():
    """A graph shows that these integers are the same for all examples."""
    model = Recommender(steps=6)
    model(tokens(6, 2))
    optimizer = kng.KFAC().attach(model)
    model.compile(optimizer, "mse", jit_compile=False)
    data = tf.data.Dataset.from_tensor_slices((tokens(12, 2), np.ones((12, 1))))
    with pytest.raises(ValueError, match="without the batch axis"):
        model.fit(data.batch(6, drop_remainder=True), verbose=0)


class Weight(layers.Layer):
    """A layer that nobody described."""

    def build(self, shape):
        self.w = self.add_weight(shape=(shape[-1],), name="w")

    def call(self, x):
        return x * self.w


@pytest.mark.parametrize(
    ("make", "advised"), [(Weight, True), (lambda: layers.GRU(2), False)]
)
def test_advice_for_layers_of_unknown_classes(make, advised):
    source = keras.Input((4,), dtype="int32")
    model = keras.Model(source, make()(layers.Embedding(DEPTH, 3)(source)))
    with pytest.warns(UserWarning, match="get the fallback block") as caught:
        kng.KFAC().attach(model).build(model.trainable_variables)
    assert ("register_layer" in str(caught[0].message)) == advised


def test_no_advice_for_layers_that_are_known():
    model = Recommender(steps=6)
    model(tokens(8, 2))
    with pytest.warns(UserWarning, match=r"a batch axis\)\.$"):
        kng.KFAC().attach(model).build(model.trainable_variables)
