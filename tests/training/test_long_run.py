"""The defaults over many steps, down to where only noise is left."""

import keras
import numpy as np
import pytest
from sklearn.datasets import load_digits

import keras_natgrad as kng
from tests.training.networks import compiled

STEPS = 600
BATCH = 256


def classifier():
    return keras.Sequential(
        [
            keras.Input((64,)),
            keras.layers.Dense(32, activation="tanh"),
            keras.layers.Dense(10),
        ]
    )


@pytest.mark.slow
def test_defaults_on_digits():
    """Small losses tempt the damping down; one bad step there costs all."""
    x, y = load_digits(return_X_y=True)
    x = (x / 16.0).astype("float32")
    rng = np.random.default_rng(0)
    model = compiled(classifier(), kng.KFAC(), run_eagerly=False)
    initial = model.evaluate(x, y, verbose=0)
    losses = []
    for _ in range(STEPS):
        batch = rng.choice(len(x), BATCH, replace=False)
        # The logged loss is a mean since the last reset.
        model.reset_metrics()
        losses.append(float(model.train_on_batch(x[batch], y[batch])))
    final = model.evaluate(x, y, verbose=0)
    assert np.all(np.isfinite([*losses, final]))
    assert all(np.all(np.isfinite(v)) for v in model.trainable_variables)
    assert max(losses) <= 2 * initial
    assert final < 1e-2
    # It is not by skipping batches that the loss stays low.
    assert model.optimizer.statistics["skipped"] == 0
