"""Optimizers that are attached again, late, or to something else."""

import keras
import numpy as np
import pytest

import keras_natgrad as kng
from tests.training.networks import assert_equal, compiled, data, mlp, weights

OPTIMIZERS = {
    "kfac": kng.KFAC,
    "natural_gradient": kng.NaturalGradient,
    "prong": kng.PRONG,
    "rngd": lambda: kng.RNGD(0.01),
}


def named():
    return keras.Sequential(
        [
            keras.Input((4,)),
            keras.layers.Dense(5, activation="tanh", name="hidden"),
            keras.layers.Dense(3, name="last"),
        ]
    )


def captured(optimizer):
    plan = optimizer.attachment.plan
    return {layer.path.split("/")[-1] for layer in plan.layers}


@pytest.mark.variants("kfac", "natural_gradient")
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_frozen_layers_need_a_new_optimizer(make):
    x, y = data()
    model = compiled(named(), make())
    model.train_on_batch(x, y)
    model.get_layer("hidden").trainable = False
    before = weights(model)
    model.compile(model.optimizer, model.loss, run_eagerly=True)
    message = r"built for are frozen now.*new optimizer.*hidden/kernel"
    with pytest.raises(ValueError, match=message):
        model.train_on_batch(x, y)
    assert_equal(weights(model), before)


@pytest.mark.variants("attach")
@pytest.mark.parametrize("again", ["attach", "callback"])
def test_attaching_again_keeps_what_was_given(again):
    x, y = data()
    model, head = named(), kng.heads.Categorical()
    optimizer = kng.KFAC().attach(model, head=head, exclude=["hidden"])
    loss = "sparse_categorical_crossentropy"
    model.compile(optimizer, loss, run_eagerly=True)
    callbacks = []
    if again == "attach":
        optimizer.attach(model)
    else:
        callbacks.append(kng.callbacks.Attach())
    with pytest.warns(UserWarning, match="hidden"):
        model.fit(x, y, verbose=0, callbacks=callbacks)
    assert captured(optimizer) == {"last"}
    assert optimizer.attached_head() is head


def test_another_model_starts_anew():
    optimizer = kng.KFAC().attach(
        named(), head=kng.heads.Normal(), exclude=["hidden"]
    )
    x, y = data()
    model = compiled(named(), optimizer)
    model.train_on_batch(x, y)
    assert captured(optimizer) == {"hidden", "last"}
    assert "Categorical" in optimizer.loss_rows()[0][1]


def test_the_callback_excludes():
    x, y = data()
    model = named()
    model.compile(kng.KFAC(), "mse", run_eagerly=True)
    attach = kng.callbacks.Attach(exclude=["last"])
    with pytest.warns(UserWarning, match="last"):
        model.fit(x, np.eye(3)[y], verbose=0, callbacks=[attach])
    assert captured(model.optimizer) == {"hidden"}


def test_a_head_that_comes_late_counts():
    x, y = data()
    # Two graphs are traced; those of a constant damping are small.
    optimizer = kng.KFAC(0.1, momentum=0.0, damping=0.1)
    model = compiled(named(), optimizer, "mse", run_eagerly=False)
    model.train_on_batch(x, np.eye(3)[y])
    assert "Normal" in model.optimizer.loss_rows()[0][1]
    model.optimizer.attach(model, head=kng.heads.Bernoulli())
    model.train_on_batch(x, np.eye(3)[y])
    assert "Bernoulli" in model.optimizer.loss_rows()[0][1]


def test_layers_that_are_excluded_late():
    x, y = data()
    model = compiled(named())
    model.train_on_batch(x, y)
    with pytest.raises(ValueError, match=r"before.*Received: exclude=\['last'"):
        model.optimizer.attach(model, exclude=["last"])
    model.optimizer.attach(model, exclude=[])
    model.train_on_batch(x, y)


@pytest.mark.variants("kfac")
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_another_model_with_the_same_optimizer(make):
    """`fit` says so; it does not speak of loops of one's own."""
    x, y = data()
    first, second = named(), mlp()
    optimizer = make().attach(first)
    second.compile(optimizer, "sparse_categorical_crossentropy")
    with pytest.raises(ValueError, match=r"attached to the model '.*another"):
        second.train_on_batch(x, y)


def test_the_model_that_was_attached_before():
    x, y = data()
    first, second = named(), named()
    optimizer = kng.KFAC().attach(first)
    optimizer.attach(second)
    first.compile(optimizer, "sparse_categorical_crossentropy")
    with pytest.raises(ValueError, match=r"attached to the model '.*another"):
        first.train_on_batch(x, y)
