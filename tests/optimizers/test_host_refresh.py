"""Inverses refreshed between steps, and while the next steps run."""

import threading
import time

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_natgrad as kng
from keras_natgrad.optimizers import host_refresh
from tests.training.networks import (
    assert_close,
    assert_equal,
    compiled,
    cross_entropy,
    data,
    mlp,
    state,
    weights,
)

FIT = {"batch_size": 8, "shuffle": False, "verbose": 0}


@pytest.mark.slow
@pytest.mark.parametrize("run_eagerly", [True, False])
@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"block": "full"},
        {"block": "diagonal", "damping": 0.1},
        {"block": "ekfac"},
        {"momentum": kng.Spring(0.5)},
    ],
)
def test_host_equals_graph(run_eagerly, kwargs, float64):
    """The same inverses at the same steps, whoever computes them."""
    models = []
    for where in ("graph", "host"):
        model = compiled(
            mlp(),
            kng.KFAC(refresh_where=where, **kwargs),
            run_eagerly=run_eagerly,
        )
        model.fit(*data(), epochs=4, **FIT)
        models.append(model)
    left, right = (model.optimizer.statistics for model in models)
    assert left["refreshes"] == right["refreshes"] > 5
    assert_close(weights(models[1]), weights(models[0]), 1e-9, 1e-12)


def test_saved_and_resumed_bit_for_bit(tmp_path):
    model = compiled(mlp(), kng.KFAC(refresh_where="host"))
    model.fit(*data(), epochs=2, **FIT)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.optimizer.settings.refresh_where == "host"
    loaded.optimizer.attach(loaded)
    loaded.run_eagerly = True
    for each in (model, loaded):
        each.fit(*data(), epochs=2, **FIT)
    assert_equal(state(loaded), state(model))


@pytest.mark.slow
def test_async_learns_and_counts():
    x, y = data(64)
    model = compiled(mlp(), kng.KFAC(refresh_where="async"), run_eagerly=False)
    before = model.evaluate(x, y, verbose=0)
    model.fit(x, y, epochs=12, **FIT)
    assert model.evaluate(x, y, verbose=0) < 0.5 * before
    assert model.optimizer.statistics["refreshes"] > 10


class Held:
    """A refresh that waits until it is let go."""

    def __init__(self, monkeypatch, optimizer):
        self.go = threading.Event()
        self.started = threading.Event()
        host = optimizer.engine.refreshing.host
        refresh = host._refresh

        def wait(damping):
            self.started.set()
            assert self.go.wait(60)
            return refresh(damping)

        monkeypatch.setattr(host, "_refresh", wait)


def inverses(optimizer):
    return [
        variable.numpy()
        for entry in optimizer.curvature.entries
        for variable in entry.block._caches.values()
    ]


def trained(**kwargs):
    """A model of which a batch is all data; every tenth step is due."""
    x, y = data(8)
    model = compiled(
        mlp(),
        kng.KFAC(
            refresh_where="async",
            inverse_update_period=10,
            curvature_update_period=1,
            refresh_growth=None,
            **kwargs,
        ),
    )

    def steps(count):
        for _ in range(count):
            model.train_on_batch(x, y)

    steps(1)
    return model, steps


def test_training_goes_on_with_the_old_inverses(monkeypatch):
    model, steps = trained()
    optimizer = model.optimizer
    held = Held(monkeypatch, optimizer)
    steps(9)
    before = inverses(optimizer)
    moved = weights(model)
    steps(1)  # The eleventh step asks.
    assert held.started.wait(60)
    steps(3)
    assert_equal(inverses(optimizer), before)
    assert any(
        np.any(a != b) for a, b in zip(weights(model), moved, strict=True)
    )
    held.go.set()
    optimizer.engine.refreshing.host._running.result(60)
    steps(1)
    after = inverses(optimizer)
    assert any(np.any(a != b) for a, b in zip(after, before, strict=True))


@pytest.mark.slow
def test_staleness_is_bounded(monkeypatch):
    """The step that would be the eleventh without new inverses waits."""
    model, steps = trained()
    held = Held(monkeypatch, model.optimizer)
    steps(10)
    assert held.started.wait(60)
    steps(9)
    assert model.optimizer.engine.refreshing.host._running is not None
    threading.Timer(0.2, held.go.set).start()
    refreshes = model.optimizer.statistics["refreshes"]
    steps(1)
    assert model.optimizer.statistics["refreshes"] == refreshes + 1


def test_what_the_graph_refreshed_since_is_kept(monkeypatch):
    """After a step taken back, inverses of an older damping are dropped."""
    model, steps = trained()
    optimizer = model.optimizer
    held = Held(monkeypatch, optimizer)
    steps(10)
    assert held.started.wait(60)
    optimizer.state.mark_inverses(True)  # As a step taken back does.
    steps(1)
    before = inverses(optimizer)
    held.go.set()
    optimizer.engine.refreshing.host._running.result(60)
    optimizer.engine.refreshing.host.finish()
    assert_equal(inverses(optimizer), before)


def test_a_failed_refresh_keeps_the_inverse_and_is_counted():
    model, steps = trained()
    optimizer = model.optimizer
    steps(9)
    before = inverses(optimizer)
    for entry in optimizer.curvature.entries:
        for average in entry.block._averages.values():
            average.assign(tf.fill(average.shape, np.nan))
    optimizer.state.refresh_asked.assign(1)
    optimizer.engine.refreshing.host.after_step()
    optimizer.engine.refreshing.host.finish()
    assert_equal(inverses(optimizer), before)
    assert optimizer.statistics["failures"] > 0


@pytest.mark.slow
def test_custom_loop():
    x, y = data()
    head = kng.heads.Categorical()
    results = []
    for where in ("graph", "host"):
        model = mlp()
        optimizer = kng.KFAC(refresh_where=where).attach(model, head=head)
        variables = model.trainable_variables

        def objective(model=model):
            return tf.reduce_mean(-head.log_prob(model(x), y))

        for _ in range(8):
            with kng.CurvatureTape(optimizer, objective) as tape:
                loss = objective()
            optimizer.apply(tape.gradient(loss, variables), variables)
            optimizer.after_step()
        results.append(weights(model))
    assert_close(*results, 1e-4, 1e-5)


def test_another_optimizer_afterwards():
    """The hook leaves a model that is compiled with another one alone."""
    optimizer = kng.KFAC(refresh_where="host")
    model = compiled(mlp(), optimizer)
    model.fit(*data(), **FIT)
    before = [variable.numpy() for variable in optimizer.variables]
    model.compile(keras.optimizers.SGD(0.1), loss=cross_entropy())
    plain = mlp()
    plain.set_weights(model.get_weights())
    plain.compile(keras.optimizers.SGD(0.1), loss=cross_entropy())
    for each in (model, plain):
        each.fit(*data(), **FIT)
    assert_equal(weights(model), weights(plain))
    assert_equal([v.numpy() for v in optimizer.variables], before)


def test_bad_place():
    with pytest.raises(ValueError, match="`refresh_where` must be one of"):
        kng.KFAC(refresh_where="gpu")


def test_refused_on_several_replicas(mirrored_strategy):
    message = "KFAC with refresh_where='host' does not run on 2 replicas"
    with mirrored_strategy.scope(), pytest.raises(ValueError, match=message):
        model = compiled(
            mlp(), kng.KFAC(refresh_where="host"), run_eagerly=False
        )
        model.fit(*data(), **FIT)


def test_a_step_that_waits_ends_the_pauses(monkeypatch):
    """Pauses of a minute do not hold up who waits for the inverses."""
    for name, value in (("_REST", 1e9), ("_LONGEST_PAUSE", 60), ("_FELT", 0)):
        monkeypatch.setattr(host_refresh, name, value)
    model, steps = trained()
    steps(10)  # The eleventh step in all asks.
    refreshes = model.optimizer.statistics["refreshes"]
    started = time.monotonic()
    model.optimizer.engine.refreshing.host.finish()
    assert time.monotonic() - started < 30
    assert model.optimizer.statistics["refreshes"] == refreshes + 1
