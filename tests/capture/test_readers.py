"""Which layers read the model's inputs."""

import keras

from keras_natgrad._compat import flatten_layers
from keras_natgrad.capture.topology import readers_of_inputs

layers = keras.layers


def names(model):
    found = readers_of_inputs(model)
    layers_of_model = flatten_layers(model)
    return {layer.name for layer in layers_of_model if id(layer) in found}


def test_the_first_dense_layer_of_a_sequential_model():
    model = keras.Sequential(
        [
            keras.Input((2, 3)),
            layers.Flatten(),
            layers.Dropout(0.1),
            layers.Dense(4, name="first"),
            layers.Dense(2, name="second"),
        ]
    )
    assert names(model) == {"first"}


def test_every_input_of_a_functional_model():
    a, b = keras.Input((3,)), keras.Input((2,))
    left = layers.Dense(4, name="left")(a)
    both = layers.Dense(4, name="both")(layers.Concatenate()([a, b]))
    mixed = layers.Concatenate()([left, both])
    model = keras.Model([a, b], layers.Dense(1, name="top")(mixed))
    assert names(model) == {"left", "both"}


def test_a_model_inside_a_model():
    inner = keras.Sequential(
        [keras.Input((3,)), layers.Dense(4, name="inner"), layers.Dense(4)]
    )
    x = keras.Input((3,))
    model = keras.Model(x, layers.Dense(1, name="top")(inner(x)))
    assert names(model) == {"inner"}


def test_hidden_features_have_no_units():
    for layer in (
        layers.Activation("exponential"),
        layers.Embedding(5, 2),
        layers.LayerNormalization(),
    ):
        x = keras.Input((3,))
        model = keras.Model(x, layers.Dense(1)(layer(x)))
        assert readers_of_inputs(model) == set()


def test_a_subclassed_model_does_not_say():
    class Model(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = layers.Dense(2)

        def call(self, x):
            return self.dense(x)

    model = Model()
    model(keras.ops.ones((1, 3)))
    assert readers_of_inputs(model) == set()


def test_classes_of_users_are_not_known_by_their_names():
    class Dense(layers.Layer):
        def call(self, x):
            return x

    class Own(layers.Dense):
        pass

    for layer, expected in (
        (Dense(name="a"), set()),
        (Own(2, name="b"), {"b"}),
    ):
        assert names(keras.Sequential([keras.Input((3,)), layer])) == expected
