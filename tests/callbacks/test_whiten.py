"""When `Whiten` whitens, and what it refuses."""

import keras
import numpy as np
import pytest

import keras_natgrad as kng
from tests.training.networks import cross_entropy, data, mlp


class Counted(kng.callbacks.Whiten):
    """Notes the steps at which it whitens."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.steps = []

    def whiten(self):
        self.steps.append(int(self.model.optimizer.iterations))
        super().whiten()


def compiled_whitened(optimizer=None, **kwargs):
    model = kng.layers.whitened(mlp())
    optimizer = optimizer or keras.optimizers.SGD(0.1)
    model.compile(optimizer, loss=cross_entropy(), **kwargs)
    return model


@pytest.mark.parametrize(
    ("per_execution", "expected"), [(1, [0, 4, 8]), (3, [0, 6, 9])]
)
def test_period(per_execution, expected):
    """Steps that run as one are not interrupted."""
    x, y = data()
    model = compiled_whitened(steps_per_execution=per_execution)
    whiten = Counted(x, period=4)
    model.fit(x, y, batch_size=8, epochs=4, verbose=0, callbacks=[whiten])
    assert whiten.steps == expected


def test_a_second_call_of_fit_goes_on_counting():
    x, y = data()
    model = compiled_whitened()
    found = []
    for _ in range(2):
        whiten = Counted(x, period=4)
        model.fit(x, y, batch_size=8, epochs=2, verbose=0, callbacks=[whiten])
        found += whiten.steps
    assert found == [0, 4, 8]


def test_trains():
    x, y = data(64)
    model = compiled_whitened(keras.optimizers.SGD(0.3))
    first = model.evaluate(x, y, verbose=0)
    whiten = kng.callbacks.Whiten(x, 10)
    model.fit(x, y, batch_size=64, epochs=20, verbose=0, callbacks=[whiten])
    assert model.evaluate(x, y, verbose=0) < 0.5 * first


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"period": 0}, "period=0"),
        ({"period": 2.0}, "period=2.0"),
        ({"damping": -1.0}, "damping=-1.0"),
        ({"damping": "auto"}, "damping='auto'"),
        ({"x": np.zeros((0, 4))}, "an empty x"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        kng.callbacks.Whiten(**{"x": np.zeros((3, 4)), **kwargs})


def test_model_without_whitened_layers():
    x, y = data()
    model = mlp()
    model.compile("sgd", loss=cross_entropy())
    with pytest.raises(ValueError, match="nothing to whiten.*'sequential"):
        model.fit(x, y, verbose=0, callbacks=[kng.callbacks.Whiten(x)])


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (keras.optimizers.Adam(), "optimizer=.*Adam"),
        (keras.optimizers.SGD(0.1, use_ema=True), "use_ema=True"),
        (
            keras.optimizers.SGD(0.1, gradient_accumulation_steps=2),
            "gradient_accumulation_steps=2",
        ),
    ],
)
def test_optimizers_whose_state_cannot_be_mapped(optimizer, message):
    x, y = data()
    model = compiled_whitened(optimizer)
    with pytest.raises(ValueError, match=message):
        model.fit(x, y, verbose=0, callbacks=[kng.callbacks.Whiten(x)])
