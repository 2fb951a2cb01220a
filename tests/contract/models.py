"""Kinds of models, losses and data."""

import keras
import numpy as np

import keras_natgrad as kng
from tests.contract.common import FIT, eager, learns
from tests.training.networks import (
    FEATURES,
    assert_close,
    assert_equal,
    cross_entropy,
    data,
    mlp,
    weights,
)


class _Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.first = keras.layers.Dense(5, "tanh")
        self.last = keras.layers.Dense(3)

    def call(self, inputs, training=False):
        return self.last(self.first(inputs))


def subclassed(make, folder):
    """Subclassed models, unbuilt when they are compiled"""
    x, y = data()
    model = _Subclassed()
    make_it = eager(make(), model)
    first = float(make_it.train_on_batch(x, y))
    for _ in range(5):
        last = float(make_it.train_on_batch(x, y))
    assert last < first


def frozen_layers(make, folder):
    """Layers with `trainable=False`"""
    model = mlp()
    model.layers[0].trainable = False
    before = model.layers[0].get_weights()
    learns(eager(make(), model))
    assert_equal(model.layers[0].get_weights(), before)


def shared_layers(make, folder):
    """A layer that is called twice"""
    shared = keras.layers.Dense(FEATURES, "tanh")
    inputs = keras.Input((FEATURES,))
    outputs = keras.layers.Dense(3)(shared(shared(inputs)))
    learns(eager(make(), keras.Model(inputs, outputs)))


def embeddings(make, folder):
    """Embeddings, whose gradients come as rows"""
    rng = np.random.default_rng(0)
    x = rng.integers(0, 7, (24, 2))
    y = x[:, 0] % 3
    model = keras.Sequential(
        [
            keras.Input((2,), dtype="int32"),
            keras.layers.Embedding(7, 3),
            keras.layers.Flatten(),
            keras.layers.Dense(3),
        ]
    )
    learns(eager(make(), model), 10, x, y, batch_size=24)


def weighted_examples(make, folder):
    """`sample_weight`, `class_weight`"""
    x, y = data()
    model = eager(make())
    learns(model, class_weight={0: 1.0, 1: 0.5, 2: 2.0})
    # Examples without weight are not there, in loss or Fisher. The default
    # K-FAC draws random numbers for them too.
    draws = isinstance(model.optimizer, kng.KFAC)
    exact = {"fisher": "exact", "quadratic_model": "exact"} if draws else {}
    half = np.arange(24) < 12
    left, right = eager(make(**exact)), eager(make(**exact))
    whole = {**FIT, "batch_size": 24, "epochs": 3}
    left.fit(x, y, sample_weight=half, **whole)
    right.fit(x[:12], y[:12], sample_weight=np.full(12, 0.5), **whole)
    assert_close(weights(left), weights(right), 1e-4, 1e-5)


def regularizers(make, folder):
    """Regularizers, constraints and `add_loss`"""
    model = mlp(kernel_regularizer="l2", bias_constraint="non_neg")
    learns(eager(make(), model))
    assert np.all(model.layers[0].bias.numpy() >= 0)


def reductions(make, folder):
    """Losses with `reduction="sum"`"""
    model = eager(make(), loss=cross_entropy(reduction="sum"))
    learns(model)


def low_rank(make, folder):
    """LoRA: `layer.enable_lora`"""
    model = mlp()
    model.layers[0].enable_lora(2)
    before = model.layers[0]._kernel.numpy()
    learns(eager(make(), model))
    np.testing.assert_array_equal(model.layers[0]._kernel.numpy(), before)
