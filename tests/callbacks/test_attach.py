"""The callback that attaches."""

import copy

import keras
import pytest

import keras_natgrad as kng
from tests.training.networks import (
    assert_equal,
    compiled,
    cross_entropy,
    data,
    mlp,
    state,
)


def unattached(optimizer=None, loss=None):
    model = mlp()
    model.compile(
        optimizer or kng.KFAC(),
        loss=loss or cross_entropy(),
        run_eagerly=True,
    )
    return model


@pytest.mark.slow
def test_equals_attach():
    x, y = data()
    arguments = {"epochs": 3, "shuffle": False, "verbose": 0}
    left, right = compiled(), unattached()
    left.fit(x, y, **arguments)
    right.fit(x, y, callbacks=[kng.callbacks.Attach()], **arguments)
    assert_equal(state(left), state(right))


@pytest.mark.slow
def test_in_a_graph_and_in_a_second_fit():
    x, y = data()
    model = unattached()
    model.run_eagerly = False
    for _ in range(2):
        model.fit(x, y, verbose=0, callbacks=[kng.callbacks.Attach()])
    assert model.optimizer.statistics["batches"] == 2


@pytest.mark.slow
def test_after_a_fit_with_another_optimizer():
    x, y = data()
    model = mlp()
    model.compile("sgd", loss=cross_entropy())
    model.fit(x, y, verbose=0)
    model.compile(kng.KFAC(), loss=cross_entropy())
    model.fit(x, y, verbose=0, callbacks=[kng.callbacks.Attach()])
    assert model.optimizer.statistics["batches"] == 1


def test_head():
    x, _ = data()
    model = unattached(loss=keras.losses.LogCosh())
    callback = kng.callbacks.Attach(head=kng.heads.Normal())
    model.fit(x, x[:, :3], verbose=0, callbacks=[callback])
    assert model.optimizer.attached_head() == kng.heads.Normal()


def test_finds_the_wrapped_optimizer():
    x, y = data()
    optimizer = keras.optimizers.LossScaleOptimizer(kng.KFAC())
    model = unattached(optimizer)
    model.fit(x, y, verbose=0, callbacks=[kng.callbacks.Attach()])
    assert optimizer.inner_optimizer.statistics["batches"] == 1


def test_another_optimizer():
    x, y = data()
    model = unattached(keras.optimizers.SGD())
    with pytest.raises(ValueError, match="keras_natgrad.KFAC"):
        model.fit(x, y, verbose=0, callbacks=[kng.callbacks.Attach()])


def test_evaluate_takes_it_as_well():
    x, y = data()
    model = unattached()
    model.evaluate(x, y, verbose=0, callbacks=[kng.callbacks.Attach()])
    model.train_on_batch(x, y)
    assert model.optimizer.statistics["batches"] == 1


def test_can_be_copied():
    """Tuners copy callbacks deeply, for every trial."""
    callback = kng.callbacks.Attach(head=kng.heads.Normal(scale=2.0))
    assert copy.deepcopy(callback).head == callback.head
