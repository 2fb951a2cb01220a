"""One exact step of `NaturalGradient` solves a linear-Gaussian regression."""

import keras
import numpy as np
import pytest

import keras_natgrad as kng

pytestmark = pytest.mark.usefixtures("float64")


@pytest.mark.variants("kernel-40", "dense-40")
@pytest.mark.parametrize("examples", [40, 6, 4])
@pytest.mark.parametrize("solver", ["kernel", "dense"])
def test_one_step_solves_linear_regression(solver, examples):
    """More, as many, and fewer examples than the 6 rows of W̄.

    The step ends at the least-squares solution, with fewer examples at the
    one nearest to the start.
    """
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(examples, 5)), rng.normal(size=(examples, 2))
    model = keras.Sequential([keras.Input((5,)), keras.layers.Dense(2)])
    layer = model.layers[0]
    layer.bias.assign(rng.normal(size=2))
    before = np.vstack([layer.kernel, layer.bias])
    head = kng.heads.Normal(scale=0.3)
    optimizer = kng.NaturalGradient(1.0, damping=0.0, solver=solver)
    loss = kng.losses.NegativeLogLikelihood(head)
    model.compile(optimizer.attach(model), loss, run_eagerly=True)
    model.train_on_batch(x, y)
    extended = np.hstack([x, np.ones((examples, 1))])
    change, *_ = np.linalg.lstsq(extended, y - extended @ before, rcond=None)
    after = np.vstack([layer.kernel, layer.bias])
    np.testing.assert_allclose(after, before + change, rtol=0, atol=1e-12)
