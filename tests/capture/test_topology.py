"""What follows a layer."""

import keras
import pytest

from keras_natgrad.capture.topology import find_following

layers = keras.layers


def follow(model, layer):
    (found,) = find_following(model, [layer])
    return found


def test_a_chain():
    dense = [layers.Dense(2, "tanh"), layers.Dense(2), layers.Dense(2, "relu")]
    slope = layers.LeakyReLU(0.1)
    model = keras.Sequential(
        [
            keras.Input((3,)),
            dense[0],
            layers.Dropout(0.1),
            dense[1],
            slope,
            layers.Dense(1),
            layers.Flatten(),
            dense[2],
        ]
    )
    first, second, last = (follow(model, layer) for layer in dense)
    assert (first.activation, first.layer) == (
        keras.activations.tanh,
        dense[1],
    )
    assert second.activation is slope and second.layer is model.layers[4]
    assert last.activation is keras.activations.relu
    assert last.is_output and last.layer is None


def test_a_functional_model():
    x = keras.Input((3,))
    trunk, left, right = (layers.Dense(2) for _ in range(3))
    hidden = trunk(x)
    model = keras.Model(x, [left(hidden), keras.ops.exp(right(hidden))])
    assert "goes to 2 places" in follow(model, trunk).obstacle
    assert follow(model, left).is_output
    after = follow(model, right)
    assert not after.is_output and "Exp" in after.obstacle


def test_an_output_that_is_used_again():
    x = keras.Input((3,))
    first, second = layers.Dense(2), layers.Dense(2)
    hidden = first(x)
    model = keras.Model(x, [hidden, second(hidden)])
    found = follow(model, first)
    assert not found.is_output
    assert "goes to 2 places" in found.obstacle


@pytest.mark.parametrize(
    "between", [layers.BatchNormalization(), layers.Conv1D(1, 1)]
)
def test_layers_that_mix_or_weigh(between):
    dense = layers.Dense(2, "relu")
    model = keras.Sequential(
        [keras.Input((4, 3)), dense, between, layers.Dense(1)]
    )
    found = follow(model, dense)
    assert found.layer is None and not found.is_output
    assert between.name in found.obstacle
    assert found.activation is keras.activations.relu


class Net(keras.Model):
    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(2, "elu")

    def call(self, x):
        return self.dense(x)


def test_subclassed_and_nested_models():
    model = Net()
    model.build((None, 3))
    found = follow(model, model.dense)
    assert found.activation is keras.activations.elu
    assert "neither sequential nor functional" in found.obstacle
    inner = keras.Sequential([keras.Input((3,)), layers.Dense(2)])
    outer = keras.Sequential([keras.Input((3,)), inner, layers.Dense(1)])
    assert "inside another model" in follow(outer, inner.layers[0]).obstacle
