"""Well-known models, in small, train from the first step."""

import warnings

import keras
import numpy as np
import pytest

import keras_natgrad as kng
from tests.models.zoo import FULL, ZOO
from tests.training.networks import assert_close, weights

STEPS = 10
BATCH = 32
# Their loops compile for minutes under XLA.
LOOPS = ("lstm",)
# XLA draws other random numbers than TensorFlow's own kernels.
RANDOM = ("autoencoder",)


def compiled(case, **kwargs):
    """Returns the compiled model and its batch; eager unless told otherwise."""
    keras.utils.clear_session(free_memory=False)
    keras.utils.set_random_seed(1)
    model = case.make()
    x, y = case.data(BATCH)
    model(x)
    kwargs.setdefault("run_eagerly", True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer = kng.KFAC().attach(model)
        model.compile(optimizer, case.loss, **kwargs)
        optimizer.build(model.trainable_variables)
    warned = [w for w in caught if "fallback" in str(w.message)]
    assert len(warned) == bool(case.reasons)
    assert optimizer.curvature.plan.reasons == case.reasons
    return model, x, y


def losses_of(model, x, y, steps=STEPS):
    fit = {"batch_size": BATCH, "shuffle": False, "verbose": 0}
    return model.fit(x, y, epochs=steps, **fit).history["loss"]


@pytest.mark.variants("resnet")
@pytest.mark.parametrize("name", ZOO)
def test_trains(name):
    case = ZOO[name]()
    # A loss with random draws in it is still luck after ten steps.
    steps, share = (40, 0.5) if name in RANDOM else (STEPS, case.share)
    losses = losses_of(*compiled(case), steps=steps)
    assert np.all(np.isfinite(losses))
    assert losses[-1] < share * losses[0], losses


@pytest.mark.slow
@pytest.mark.parametrize("name", FULL)
def test_full_size_trains(name):
    case = ZOO[name](**FULL[name])
    losses = losses_of(*compiled(case))
    assert np.all(np.isfinite(losses))
    assert losses[-1] < case.share * losses[0], losses


@pytest.mark.slow
@pytest.mark.parametrize("jit_compile", [False, True])
@pytest.mark.parametrize("name", ZOO)
def test_graph_and_xla_agree_with_eager(name, jit_compile, float64):
    if jit_compile and name in LOOPS:
        pytest.skip("a loop that is differentiated twice compiles for minutes")
    runs = [{}, {"run_eagerly": False, "jit_compile": jit_compile}]
    models = [compiled(ZOO[name](), **kwargs) for kwargs in runs]
    eager, graph = (losses_of(*each, steps=4) for each in models)
    if jit_compile and name in RANDOM:
        assert np.all(np.isfinite(graph)) and graph[-1] < graph[0]
        return
    np.testing.assert_allclose(graph, eager, rtol=1e-6)
    assert_close(weights(models[1][0]), weights(models[0][0]), 1e-6, 1e-8)
