"""`raise_damping`: from the next step on, for every kind of damping."""

import keras
import numpy as np
import pytest

import keras_natgrad as kng
from tests.training.networks import (
    assert_close,
    assert_equal,
    compiled,
    data,
    state,
    weights,
)

RULES = {
    "kfac": lambda damping: kng.KFAC(damping=damping),
    "rngd": lambda damping: kng.RNGD(damping=damping, relative_damping=0.0),
    "prong": lambda damping: kng.PRONG(damping=damping),
    "natural_gradient": lambda damping: kng.NaturalGradient(damping=damping),
}
MODES = pytest.mark.parametrize(
    "mode",
    [
        {"run_eagerly": True},
        {"run_eagerly": False, "jit_compile": False},
        {"run_eagerly": False, "jit_compile": True},
    ],
    ids=["eager", "graph", "xla"],
)


def built(optimizer, **kwargs):
    model = compiled(optimizer=optimizer, **kwargs)
    optimizer.build(model.trainable_variables)
    return model


@pytest.mark.variants("kfac")
@pytest.mark.parametrize("name", RULES)
def test_constant_damping(name, float64):
    """Three steps are those of the raised damping, written out."""
    x, y = data()
    raised, written = built(RULES[name](0.02)), built(RULES[name](0.1))
    raised.optimizer.raise_damping(5.0)
    for _ in range(3):
        for model in (raised, written):
            model.train_on_batch(x, y)
    assert raised.optimizer.statistics["damping"] == pytest.approx(0.1)
    assert_close(weights(raised), weights(written), rtol=1e-9, atol=1e-12)


@pytest.mark.variants("eager")
@MODES
def test_between_steps(mode, float64):
    """The inverses in use are renewed, in the trace that there is."""
    x, y = data()
    optimizer = kng.KFAC(
        0.1,
        damping=0.5,
        momentum=0.0,
        inverse_update_period=1000,
        refresh_growth=None,
    )
    model = compiled(optimizer=optimizer, **mode)
    model.train_on_batch(x, y)
    refreshes = optimizer.statistics["refreshes"]
    optimizer.raise_damping(4.0)
    optimizer.raise_damping(2.0)
    model.train_on_batch(x, y)
    assert optimizer.statistics["refreshes"] == refreshes + 1
    assert optimizer.statistics["damping"] == pytest.approx(4.0)
    model.train_on_batch(x, y)
    assert optimizer.statistics["damping"] == pytest.approx(4.0)


@pytest.mark.parametrize("name", ["kfac", "prong", "natural_gradient"])
def test_schedule(name, float64):
    x, y = data()
    schedule = keras.optimizers.schedules.ExponentialDecay(0.4, 1, 0.5)
    model = built(RULES[name](schedule))
    model.optimizer.raise_damping(10.0)
    found = []
    for _ in range(3):
        model.train_on_batch(x, y)
        found.append(model.optimizer.statistics["damping"])
    np.testing.assert_allclose(found, [4.0, 2.0, 1.0], rtol=1e-6)


@pytest.mark.variants("0-kfac")
@pytest.mark.parametrize("name", ["kfac", "natural_gradient"])
@pytest.mark.parametrize("steps_before", [0, 2])
def test_adaptive_damping(name, steps_before, float64):
    """Where it starts, or as it is; it goes on adapting from there."""
    x, y = data()
    rule = kng.LevenbergMarquardt(period=1000)
    raised, plain = built(RULES[name](rule)), built(RULES[name](rule))
    for model in (raised, plain):
        for _ in range(steps_before):
            model.train_on_batch(x, y)
    raised.optimizer.raise_damping(10.0)
    for model in (raised, plain):
        model.train_on_batch(x, y)
    ratio = (
        raised.optimizer.statistics["damping"]
        / plain.optimizer.statistics["damping"]
    )
    if steps_before:
        assert ratio == pytest.approx(10.0)
    else:  # The first step adapts what it started with.
        assert 5 < ratio < 20


def test_is_saved(tmp_path):
    x, y = data()
    model = compiled(optimizer=kng.KFAC(damping=0.1))
    model.train_on_batch(x, y)
    model.optimizer.raise_damping(3.0)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    loaded.run_eagerly = True
    loaded.optimizer.attach(loaded)
    for each in (model, loaded):
        each.train_on_batch(x, y)
    assert_equal(state(loaded), state(model))
    assert loaded.optimizer.statistics["damping"] == pytest.approx(0.3)


def test_refused():
    with pytest.raises(ValueError, match="built.*factor=2.0"):
        kng.KFAC().raise_damping(2.0)
    with pytest.raises(ValueError, match="Received: factor=0"):
        built(kng.KFAC()).optimizer.raise_damping(0)


def test_refresh_inverses(float64):
    """The inverses of statistics that came in since."""
    x, y = data()
    optimizer = kng.KFAC(
        curvature_update_period=1,
        inverse_update_period=1000,
        refresh_growth=None,
    )
    model = compiled(optimizer=optimizer)
    for seed in range(3):
        model.train_on_batch(data(seed=seed)[0], y)
    block = optimizer.curvature.entries[1].block
    optimizer.refresh_inverses()
    found = block.inverse_spectra()
    before = optimizer.statistics["refreshes"]
    for name, values in block.spectra().items():
        # Only a multiple of the identity was added before inverting.
        added = 1 / found[name].numpy()[::-1] - values.numpy()
        np.testing.assert_allclose(added, np.full_like(added, added[0]))
    assert before == 2
