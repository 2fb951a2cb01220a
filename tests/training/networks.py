"""Small models and data that the tests of training share."""

import keras
import numpy as np

import keras_natgrad as kng

CLASSES = 3
FEATURES = 4

# With this damping the Fisher is negligible: K-FAC is gradient descent.
HUGE = 1e10


def data(size=24, seed=0):
    """Inputs and labels that a small network can learn."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(size, FEATURES)).astype(keras.config.floatx())
    return x, np.argmax(x[:, :CLASSES], axis=-1)


def mlp(units=5, **kwargs):
    """A built classifier; the same seed gives the same weights."""
    return keras.Sequential(
        [
            keras.Input((FEATURES,)),
            keras.layers.Dense(
                units,
                activation="tanh",
                kernel_initializer=keras.initializers.GlorotNormal(seed=1),
                **kwargs,
            ),
            keras.layers.Dense(
                CLASSES,
                kernel_initializer=keras.initializers.GlorotNormal(seed=2),
            ),
        ]
    )


def cross_entropy(**kwargs):
    return keras.losses.SparseCategoricalCrossentropy(
        from_logits=True, **kwargs
    )


def compiled(model=None, optimizer=None, loss=None, **kwargs):
    """Attaches and compiles; eager unless told otherwise, as tracing costs
    more than the few steps of a test."""
    model = mlp() if model is None else model
    optimizer = kng.KFAC() if optimizer is None else optimizer
    if hasattr(optimizer, "attach"):
        optimizer.attach(model)
    kwargs.setdefault("run_eagerly", True)
    model.compile(
        optimizer, loss=cross_entropy() if loss is None else loss, **kwargs
    )
    return model


def like_sgd(learning_rate=0.1, **kwargs):
    """K-FAC whose damping makes it equal to gradient descent."""
    kwargs = {"momentum": 0.0, "block": "kronecker", **kwargs}
    return kng.KFAC(HUGE * learning_rate, damping=HUGE, **kwargs)


def state(model):
    """All weights and optimizer variables, as arrays."""
    variables = [*model.weights, *model.optimizer.variables]
    return [variable.numpy() for variable in variables]


def weights(model):
    """All weights of the model, as arrays."""
    return [variable.numpy() for variable in model.weights]


def assert_equal(left, right):
    """Asserts that two lists of arrays are the same bit for bit."""
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        np.testing.assert_array_equal(a, b)


def assert_close(left, right, rtol=1e-7, atol=0.0):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol)
