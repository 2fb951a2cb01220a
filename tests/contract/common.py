"""How the features of the contract make, train and compare models."""

import keras
import numpy as np

from tests.training.networks import (
    CLASSES,
    FEATURES,
    assert_close,
    cross_entropy,
    data,
    mlp,
    state,
    weights,
)

FIT = {"batch_size": 12, "shuffle": False, "verbose": 0}


def deep():
    """Three layers, one of which has a regularizer."""
    return keras.Sequential(
        [
            keras.Input((FEATURES,)),
            keras.layers.Dense(5, "tanh"),
            keras.layers.Dense(4, "tanh", kernel_regularizer="l2"),
            keras.layers.Dense(CLASSES),
        ]
    )


def compiled(optimizer, model=None, **kwargs):
    """Attaches and compiles, in graph mode unless told otherwise."""
    model = mlp() if model is None else model
    for inner in (optimizer, getattr(optimizer, "inner_optimizer", None)):
        if hasattr(inner, "attach"):
            inner.attach(model)
    kwargs.setdefault("loss", cross_entropy())
    model.compile(optimizer, **kwargs)
    return model


def eager(optimizer, model=None, **kwargs):
    """The same without tracing, which takes longer than a few steps."""
    return compiled(optimizer, model, run_eagerly=True, **kwargs)


def learns(model, epochs=3, x=None, y=None, share=1.0, **kwargs):
    """Trains; asserts that the loss fell and the weights are finite.

    To less than `share` of what it was, weighted as in training.
    """
    if x is None:
        x, y = data()
    evaluate = {"verbose": 0, "return_dict": True}
    if "sample_weight" in kwargs:
        evaluate["sample_weight"] = kwargs["sample_weight"]
    before = model.evaluate(x, y, **evaluate)["loss"]
    history = model.fit(x, y, epochs=epochs, **{**FIT, **kwargs})
    assert all(np.all(np.isfinite(value)) for value in weights(model))
    after = model.evaluate(x, y, **evaluate)["loss"]
    assert after < share * before
    return history.history


def distance(left, right):
    """Returns the largest difference between two lists of arrays."""
    return max(np.max(np.abs(a - b)) for a, b in zip(left, right, strict=True))


def agree(make, **kwargs):
    """Trains eagerly and as given, in float64; asserts equal weights.

    The last batch is smaller. Returns the model trained as given.
    """
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    x, y = data(28)
    models = [eager(make(), deep()), compiled(make(), deep(), **kwargs)]
    models[1].set_weights(models[0].get_weights())
    for model in models:
        model.fit(x, y, epochs=2, **FIT)
    assert all(np.all(np.isfinite(value)) for value in weights(models[0]))
    assert_close(state(models[0]), state(models[1]), 1e-6, 1e-9)
    return models[1]
