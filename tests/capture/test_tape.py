"""The tape of custom training loops, as far as capture goes."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_natgrad as kng
from tests.reference.bridge import mlp

X = np.random.default_rng(0).normal(size=(4, 3)).astype("float32")


@pytest.fixture
def model():
    return mlp([3, 4, 2])


@pytest.fixture
def optimizer(model):
    return kng.KFAC().attach(model, head=kng.heads.Normal())


def test_gradient_is_the_plain_gradient(model, optimizer):
    with tf.GradientTape() as plain:
        loss = tf.reduce_sum(model(X) ** 2)
    expected = plain.gradient(loss, model.trainable_variables)
    with kng.CurvatureTape(optimizer) as tape:
        loss = tf.reduce_sum(model(X) ** 2)
    found = tape.gradient(loss, model.trainable_variables)
    for g, e in zip(found, expected, strict=True):
        np.testing.assert_array_equal(g, e)


def test_records_every_layer(model, optimizer):
    with kng.CurvatureTape(optimizer) as tape:
        outputs = model(X)
    for layer in model.layers:
        assert len(tape.taps.record(layer).preactivations) == 1
    np.testing.assert_array_equal(tape.model_outputs, outputs)


@pytest.mark.parametrize("raises", [False, True])
def test_nothing_remains(model, optimizer, raises):
    before = [set(vars(part)) for part in [model, *model.layers]]
    try:
        with kng.CurvatureTape(optimizer):
            model(X)
            if raises:
                raise RuntimeError
    except RuntimeError:
        pass
    after = [set(vars(part)) for part in [model, *model.layers]]
    assert after == before


def test_other_optimizer(model):
    with pytest.raises(ValueError, match="takes an optimizer of keras_natgrad"):
        kng.CurvatureTape(keras.optimizers.SGD())


def test_optimizer_without_a_model():
    with pytest.raises(ValueError, match="not attached"):
        kng.CurvatureTape(kng.KFAC())


def test_unknown_distribution(model):
    optimizer = kng.KFAC().attach(model)
    with kng.CurvatureTape(optimizer) as tape:
        loss = tf.reduce_sum(model(X) ** 2)
    with pytest.raises(ValueError, match="does not know what distribution"):
        tape.gradient(loss, model.trainable_variables)
