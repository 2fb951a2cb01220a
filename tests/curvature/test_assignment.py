"""Which block every layer gets."""

import keras
import numpy as np
import pytest

import keras_natgrad as kng

layers = keras.layers


def images():
    return keras.Sequential(
        [
            keras.Input((4, 4, 2)),
            layers.Conv2D(4, 3, padding="same"),
            layers.BatchNormalization(),
            layers.Conv2D(4, 3, groups=2),
            layers.GlobalAveragePooling2D(),
            layers.Dense(1),
        ]
    )


def tokens():
    source = keras.Input((3,), dtype="int32")
    embedding = layers.ReversibleEmbedding(5, 4)
    hidden = layers.Dense(4)(embedding(source))
    return keras.Model(source, embedding(hidden, reverse=True))


def kinds(optimizer):
    return [
        type(entry.block).kind
        for entry in optimizer.curvature.entries
        if entry.layer is not None
    ]


@pytest.mark.variants("input_factor")
@pytest.mark.parametrize("block", ["input_factor", "foof"])
def test_input_factors_of_a_convolutional_network(block):
    """One matrix of all inputs is not for layers with groups."""
    model = images()
    x = np.random.default_rng(0).normal(size=(6, 4, 4, 2))
    optimizer = kng.KFAC(0.1, momentum=0.9, damping=0.1, block=block)
    model.compile(optimizer.attach(model), "mse", jit_compile=False)
    model.train_on_batch(x, np.zeros((6, 1)))
    own, other = "input_factor", "kronecker"
    assert kinds(optimizer) == [own, "full", other, own]
    assert all(np.all(np.isfinite(w)) for w in model.get_weights())


def test_input_factors_of_a_tied_embedding():
    model = tokens()
    optimizer = kng.KFAC(block="input_factor").attach(model)
    optimizer.build(model.trainable_variables)
    assert kinds(optimizer) == ["tied", "input_factor"]


@pytest.mark.parametrize("block", ["input_factor", "unitwise", "coupled"])
def test_a_block_that_was_chosen_for_a_layer_is_never_replaced(block):
    model = images()
    optimizer = kng.KFAC(block={"batch_norm*": block}).attach(model)
    with pytest.raises(ValueError, match=f"{block}' is not for a layer with g"):
        optimizer.build(model.trainable_variables)
