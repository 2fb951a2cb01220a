"""Small versions of well-known models, each with a batch it can learn.

Every function of `ZOO` returns a `Case`; larger arguments give the size that
the models are known for.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import numpy as np

layers = keras.layers
ops = keras.ops


class Case(NamedTuple):
    """A model and how to train it.

    Attributes:
        make: Function that returns the model.
        data: Function of the batch size that returns inputs and targets.
        loss: Argument of `compile`.
        share: The loss falls below this share of what it was at first.
        reasons: Why variables fall back, one entry per variable.
    """

    make: Callable[[], keras.Model]
    data: Callable[[int], tuple[Any, Any]]
    loss: Any
    share: float
    reasons: tuple[str, ...] = ()


def cross_entropy():
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def binary_cross_entropy():
    return keras.losses.BinaryCrossentropy(from_logits=True)


def images(size, side, channels, classes):
    """Noise with a bright stripe whose place is the class."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(size, side, side, channels))
    y = np.arange(size) % classes
    width = side // classes
    for image, label in zip(x, y, strict=True):
        image[width * label : width * (label + 1)] += 1
    return x.astype(keras.config.floatx()), y


# -- ResNet for CIFAR -----------------------------------------------------


def resnet(blocks=1, width=4, side=8, classes=4):
    """He et al. 2016: three stages; 3 blocks of width 16 are ResNet-20."""

    def normalised(x, filters, size, strides=1):
        x = layers.Conv2D(
            filters, size, strides, padding="same", use_bias=False
        )(x)
        return layers.BatchNormalization()(x)

    def block(x, filters, strides):
        y = layers.ReLU()(normalised(x, filters, 3, strides))
        y = normalised(y, filters, 3)
        if strides > 1:
            x = normalised(x, filters, 1, strides)
        return layers.ReLU()(layers.Add()([x, y]))

    def make():
        image = keras.Input((side, side, 3))
        x = layers.ReLU()(normalised(image, width, 3))
        for stage in range(3):
            for index in range(blocks):
                strides = 2 if stage and not index else 1
                x = block(x, width * 2**stage, strides)
        x = layers.GlobalAveragePooling2D()(x)
        return keras.Model(image, layers.Dense(classes)(x))

    return Case(
        make, lambda size: images(size, side, 3, classes), cross_entropy(), 0.5
    )


# -- Language models ------------------------------------------------------


def text(size, length, vocabulary):
    """Sequences that count upwards, each from its own start."""
    starts = np.arange(size)[:, np.newaxis]
    tokens = (starts + np.arange(length + 1)) % vocabulary
    return tokens[:, :-1].astype("int32"), tokens[:, 1:].astype("int32")


def gpt(depth=1, width=8, heads=2, length=6, vocabulary=11):
    """Radford et al. 2019: pre-norm, causal, output tied to the embedding."""

    def block(x):
        y = layers.LayerNormalization()(x)
        attention = layers.MultiHeadAttention(heads, width // heads)
        x = x + attention(y, y, use_causal_mask=True)
        y = layers.LayerNormalization()(x)
        y = layers.Dense(4 * width, activation="gelu")(y)
        return x + layers.Dense(width)(y)

    def make():
        ids = keras.Input((length,), dtype="int32")
        tokens = layers.ReversibleEmbedding(vocabulary, width)
        # Counted for every example, so that they have a batch axis.
        places = ops.cumsum(ops.ones_like(ids), axis=1) - 1
        x = tokens(ids) + layers.Embedding(length, width)(places)
        for _ in range(depth):
            x = block(x)
        x = layers.LayerNormalization()(x)
        return keras.Model(ids, tokens(x, reverse=True))

    return Case(
        make,
        lambda size: text(size, length, vocabulary),
        cross_entropy(),
        0.8,
    )


def lstm(depth=1, width=8, length=6, vocabulary=11):
    """Zaremba et al. 2014: embedding, LSTM layers, projection."""

    def make():
        return keras.Sequential(
            [
                keras.Input((length,), dtype="int32"),
                layers.Embedding(vocabulary, width),
                *(
                    layers.LSTM(width, return_sequences=True)
                    for _ in range(depth)
                ),
                layers.Dense(vocabulary),
            ]
        )

    return Case(
        make,
        lambda size: text(size, length, vocabulary),
        cross_entropy(),
        0.9,
        tuple(
            f"weights of a loop: LSTM 'lstm{suffix}'"
            for suffix in ["", *(f"_{i}" for i in range(1, depth))]
            for _ in ("kernel", "recurrent kernel", "bias")
        ),
    )


# -- U-Net ----------------------------------------------------------------


def unet(depth=1, width=4, side=8):
    """Ronneberger et al. 2015, with padding: a mask of bright pixels."""

    def twice(x, filters):
        for _ in range(2):
            x = layers.Conv2D(filters, 3, padding="same", activation="relu")(x)
        return x

    def make():
        image = keras.Input((side, side, 1))
        x, skips = image, []
        for level in range(depth):
            skips.append(twice(x, width * 2**level))
            x = layers.MaxPooling2D()(skips[-1])
        x = twice(x, width * 2**depth)
        for level in reversed(range(depth)):
            filters = width * 2**level
            x = layers.Conv2DTranspose(filters, 2, strides=2)(x)
            x = twice(layers.Concatenate()([skips[level], x]), filters)
        return keras.Model(image, layers.Conv2D(1, 1)(x))

    def data(size):
        x, _ = images(size, side, 1, 4)
        return x, (x > 0.5).astype(x.dtype)

    return Case(make, data, binary_cross_entropy(), 0.9)


# -- Variational autoencoder ----------------------------------------------


class Sampling(layers.Layer):
    """Draws z = μ + σ ε, and adds the divergence from N(0, I)."""

    def __init__(self, weight, **kwargs):
        super().__init__(**kwargs)
        self.weight = weight
        self.seed_generator = keras.random.SeedGenerator(0)

    def call(self, inputs):
        mean, log_variance = inputs
        terms = ops.square(mean) + ops.exp(log_variance) - log_variance - 1
        self.add_loss(0.5 * self.weight * ops.mean(ops.sum(terms, axis=-1)))
        noise = keras.random.normal(
            ops.shape(mean), dtype=mean.dtype, seed=self.seed_generator
        )
        return mean + ops.exp(0.5 * log_variance) * noise


class Autoencoder(keras.Model):
    """Kingma & Welling 2014: Bernoulli pixels, Gaussian code."""

    def __init__(self, pixels, hidden, code, **kwargs):
        super().__init__(**kwargs)
        self.encoder = layers.Dense(hidden, activation="tanh")
        self.mean = layers.Dense(code)
        self.log_variance = layers.Dense(code)
        # Keras's loss is a mean over the pixels, not their sum.
        self.sampling = Sampling(1 / pixels)
        self.decoder = layers.Dense(hidden, activation="tanh")
        self.pixels = layers.Dense(pixels)

    def call(self, x):
        hidden = self.encoder(x)
        code = self.sampling([self.mean(hidden), self.log_variance(hidden)])
        return self.pixels(self.decoder(code))


def stripes(size, side):
    """Binary images of one stripe, some pixels of which are flipped."""
    rng = np.random.default_rng(0)
    x = rng.uniform(size=(size, side, side)) < 0.05
    places = np.arange(size) % (side - 1)
    for image, place in zip(x, places, strict=True):
        image[place : place + 2] ^= True
    return x.astype(keras.config.floatx())


def autoencoder(side=6, hidden=10, code=2):
    def data(size):
        x = stripes(size, side).reshape(size, -1)
        return x, x

    return Case(
        lambda: Autoencoder(side * side, hidden, code),
        data,
        binary_cross_entropy(),
        0.9,
    )


# -- Two-tower recommender ------------------------------------------------


def two_towers(users=9, items=7, width=6):
    """Covington et al. 2016: one tower per side, scores by a product."""

    def tower(ids, count):
        x = layers.Embedding(count, width)(ids)
        x = layers.Dense(width, activation="relu")(x)
        return layers.Dense(width)(x)

    def make():
        user = keras.Input((), dtype="int32", name="user")
        item = keras.Input((), dtype="int32", name="item")
        score = layers.Dot(1)([tower(user, users), tower(item, items)])
        return keras.Model({"user": user, "item": item}, score)

    def data(size):
        rng = np.random.default_rng(0)
        user = rng.integers(users, size=size).astype("int32")
        item = rng.integers(items, size=size).astype("int32")
        likes = (user + item) % 2
        return {"user": user, "item": item}, likes[:, np.newaxis]

    return Case(make, data, binary_cross_entropy(), 0.5)


ZOO: dict[str, Callable[..., Case]] = {
    "resnet": resnet,
    "gpt": gpt,
    "lstm": lstm,
    "unet": unet,
    "autoencoder": autoencoder,
    "two_towers": two_towers,
}
# The sizes that the models are known for, or near them.
FULL: dict[str, dict[str, int]] = {
    "resnet": {"blocks": 3, "width": 16, "side": 32, "classes": 10},
    "gpt": {"depth": 4, "width": 64, "heads": 4, "length": 32},
    "lstm": {"depth": 2, "width": 64, "length": 20, "vocabulary": 50},
    "unet": {"depth": 3, "width": 16, "side": 32},
    "autoencoder": {"side": 28, "hidden": 200, "code": 8},
    "two_towers": {"users": 1000, "items": 500, "width": 32},
}
