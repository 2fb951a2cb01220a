"""What the monitor records, against what it is a record of."""

import copy
import csv
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_natgrad as kng
from keras_natgrad.blocks import KroneckerBlock
from keras_natgrad.callbacks import CurvatureMonitor
from tests.training.networks import (
    FEATURES,
    assert_equal,
    compiled,
    cross_entropy,
    data,
    mlp,
    state,
    weights,
)

FIT = {"batch_size": 8, "shuffle": False, "verbose": 0}
OPTIMIZERS = {
    "kfac": kng.KFAC,
    "rngd": lambda: kng.RNGD(damping=1e-3),
    "prong": kng.PRONG,
    "natural_gradient": kng.NaturalGradient,
}
EAGER = {"run_eagerly": True}
GRAPH = {"run_eagerly": False, "jit_compile": False}
XLA = {"run_eagerly": False, "jit_compile": True}


class Weights(keras.callbacks.Callback):
    """Notes weights and statistics at the end of every call."""

    def on_train_begin(self, logs=None):
        self.weights = [weights(self.model)]
        self.statistics = []

    def on_train_batch_end(self, batch, logs=None):
        self.weights.append(weights(self.model))
        self.statistics.append(self.model.optimizer.statistics)

    def norm(self, before, after):
        pairs = zip(self.weights[before], self.weights[after], strict=True)
        return np.sqrt(sum(np.sum((b - a) ** 2.0) for a, b in pairs))


def layer_names(model):
    """Names under which the layers are recorded."""
    return [e.layer.path for e in model.optimizer.curvature.entries]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("every", "mode"),
    [("epoch", EAGER), (2, EAGER), ("epoch", GRAPH)],
    ids=["epoch", "steps", "graph"],
)
def test_statistics_and_norms_of_the_steps(every, mode, float64):
    x, y = data()  # Three batches.
    model, seen = compiled(**mode), Weights()
    monitor = CurvatureMonitor(every)
    model.fit(x, y, epochs=2, callbacks=[monitor, seen], **FIT)
    steps = [3, 6] if every == "epoch" else [2, 4, 6]
    assert monitor.history["step"] == steps
    names = {"learning_rate": "step_size"}
    for name in ("damping", "reduction_ratio", "learning_rate", "momentum"):
        found = monitor.history[names.get(name, name)]
        expected = [seen.statistics[step - 1][name] for step in steps]
        np.testing.assert_array_equal(found, expected)
    expected = [seen.norm(step - 1, step) for step in steps]
    np.testing.assert_allclose(
        monitor.history["update_norm"], expected, rtol=1e-12
    )


def test_a_generator_of_unknown_length(float64):
    """Keras begins one batch more than there are."""

    def batches():
        for start in range(0, 24, 8):
            yield x[start : start + 8], y[start : start + 8]

    x, y = data()
    model, seen, monitor = compiled(), Weights(), CurvatureMonitor()
    model.fit(batches(), verbose=0, callbacks=[monitor, seen])
    assert monitor.history["step"] == [3]
    np.testing.assert_allclose(
        monitor.history["update_norm"], [seen.norm(2, 3)], rtol=1e-12
    )
    assert seen.norm(2, 3) > 0


@pytest.mark.slow
@pytest.mark.parametrize("every", ["epoch", 2])
def test_steps_per_execution(every, float64):
    """The norm is that of all steps of a call."""
    x, y = data(32)
    model, seen = compiled(**GRAPH, steps_per_execution=2), Weights()
    monitor = CurvatureMonitor(every)
    model.fit(x, y, callbacks=[monitor, seen], **FIT)
    assert monitor.history["step"] == ([4] if every == "epoch" else [2, 4])
    assert monitor.history["update_norm"][-1] == pytest.approx(seen.norm(1, 2))


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_is_the_same(name):
    """Bit for bit, with every measurement."""
    x, y = data()
    inverses = name != "natural_gradient"
    monitored, plain = (compiled(optimizer=OPTIMIZERS[name]()) for _ in "ab")
    monitor = CurvatureMonitor(every=1, measure_refresh=inverses)
    monitored.fit(x, y, epochs=2, callbacks=[monitor], **FIT)
    plain.fit(x, y, epochs=2, **FIT)
    assert_equal(state(monitored), state(plain))
    assert len(monitor.history["damping"]) == 6
    assert ("refresh_seconds" in monitor.history) == inverses
    assert ("reduction_ratio" in monitor.history) == (
        name in ("kfac", "natural_gradient")
    )
    # The whole-network optimizer keeps no blocks.
    assert len(monitor.last_spectra) == (2 if inverses else 0)
    for value in monitor.history.values():
        assert np.all(np.isfinite(value))


@pytest.mark.variants("kfac")
@pytest.mark.parametrize("name", ["kfac", "rngd", "prong"])
def test_spectra_and_condition_numbers(name, float64):
    """Against dense matrices: the Fisher, and what preconditions."""
    x, y = data()
    model = compiled(optimizer=OPTIMIZERS[name]())
    monitor = CurvatureMonitor()
    model.fit(x, y, epochs=2, callbacks=[monitor], **FIT)
    worst = 0.0
    for entry in model.optimizer.curvature.entries:
        block, layer = entry.block, entry.layer.path
        fisher = np.linalg.eigvalsh(block.to_dense())
        found = monitor.spectrum(layer)
        np.testing.assert_allclose(found[::-1], fisher, rtol=1e-8, atol=1e-12)
        np.testing.assert_allclose(
            monitor.history[f"largest_eigenvalue/{layer}"][-1], fisher[-1]
        )
        np.testing.assert_allclose(
            monitor.history[f"smallest_eigenvalue/{layer}"][-1],
            max(fisher[0], 0.0),
            rtol=1e-6,
            atol=1e-12,
        )
        images = [
            np.ravel(block.precondition(e.reshape(block.shape.matrix)))
            for e in np.eye(block.shape.size)
        ]
        condition = np.linalg.cond(np.stack(images))
        worst = max(worst, condition)
        recorded = monitor.history[f"condition_number/{layer}"][-1]
        assert recorded == pytest.approx(condition, rel=1e-7)
    assert monitor.history["condition_number"][-1] == pytest.approx(worst)


def test_logs_reach_other_callbacks(tmp_path):
    """The history of Keras and a table, beside the metrics."""
    x, y = data()
    model = compiled(metrics=["accuracy"])
    monitor = CurvatureMonitor()
    table = keras.callbacks.CSVLogger(str(tmp_path / "log.csv"))
    history = model.fit(
        x, y, epochs=2, callbacks=[monitor, table], **FIT
    ).history
    names = {name for name in monitor.history if "/" not in name} - {"step"}
    assert set(history) == names | {"loss", "accuracy"}
    for name in names:
        assert history[name] == monitor.history[name]
    with open(tmp_path / "log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["damping"]) for row in rows] == history["damping"]


@pytest.mark.slow
def test_logs_of_batches():
    """They repeat the last record."""
    x, y = data()
    model, found = compiled(), []
    seen = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: found.append(logs)
    )
    monitor = CurvatureMonitor(every=2)
    model.fit(x, y, epochs=2, callbacks=[monitor, seen], **FIT)
    first, second, third = monitor.history["damping"]
    assert "damping" not in found[0]
    dampings = [logs["damping"] for logs in found[1:]]
    assert dampings == [first, first, second, second, third]


def test_fewer_steps_than_a_period():
    x, y = data()
    monitor = CurvatureMonitor(every=100)
    history = compiled().fit(x, y, epochs=2, callbacks=[monitor], **FIT).history
    assert monitor.history["step"] == [3]
    assert len(history["damping"]) == 2


@pytest.mark.slow
def test_a_second_fit_goes_on_and_another_model_starts_anew():
    x, y = data()
    model, monitor = compiled(), CurvatureMonitor()
    for _ in range(2):
        model.fit(x, y, callbacks=[monitor], **FIT)
    assert monitor.history["step"] == [3, 6]
    compiled().fit(x, y, callbacks=[monitor], **FIT)
    assert monitor.history["step"] == [3]


def test_finds_the_wrapped_optimizer():
    x, y = data()
    inner = kng.KFAC()
    model = mlp()
    inner.attach(model)
    model.compile(
        keras.optimizers.LossScaleOptimizer(inner),
        loss=cross_entropy(),
        run_eagerly=True,
    )
    monitor = CurvatureMonitor(every=1)
    model.fit(x, y, callbacks=[monitor], **FIT)
    assert monitor.history["damping"][-1] == inner.statistics["damping"]
    assert monitor.history["step"] == [1, 2, 3]


def test_fallback_variables_have_names():
    x, y = data()
    model = mlp()
    monitor = CurvatureMonitor()
    with pytest.warns(UserWarning, match="fallback"):
        optimizer = kng.KFAC().attach(model, exclude=["dense_1"])
        compiled_model = model
        model.compile(optimizer, loss=cross_entropy(), run_eagerly=True)
        model.fit(x, y, callbacks=[monitor], **FIT)
    names = {variable.path for variable in compiled_model.layers[1].weights}
    assert names < set(monitor.last_spectra)
    assert len(monitor.last_spectra) == 3


@pytest.mark.slow
def test_large_layers_are_left_out():
    x, y = data()
    model, monitor = compiled(), CurvatureMonitor(max_size=FEATURES)
    with pytest.warns(UserWarning, match="side 5 is larger than max_size=4"):
        model.fit(x, y, epochs=2, callbacks=[monitor], **FIT)
    first, second = layer_names(model)
    assert set(monitor.notes) == {first, second}
    assert monitor.last_spectra == {}
    with pytest.raises(ValueError, match="left out were"):
        monitor.spectrum(first)


def test_without_spectra():
    x, y = data()
    monitor = CurvatureMonitor(spectra=False)
    compiled().fit(x, y, callbacks=[monitor], **FIT)
    assert not any("/" in name for name in monitor.history)
    assert "condition_number" not in monitor.history


def test_before_the_first_refresh_nothing_is_known():
    """A first batch that is skipped leaves all inverses zero."""
    x, y = data(8)
    model, monitor = compiled(), CurvatureMonitor()
    model.fit(np.full_like(x, np.nan), y, callbacks=[monitor], **FIT)
    assert monitor.history["skipped"] == [1]
    assert monitor.history["update_norm"] == [0.0]
    assert np.isnan(monitor.history["condition_number"][0])


@pytest.mark.variants("eager")
@pytest.mark.parametrize("mode", [EAGER, XLA], ids=["eager", "xla"])
def test_refresh_is_timed_on_what_a_step_does(mode, monkeypatch):
    x, y = data()
    model = compiled(**mode)
    monitor = CurvatureMonitor(measure_refresh=True)
    calls = []
    original = KroneckerBlock.refresh

    def refresh(self, *args):
        calls.append(self)
        return original(self, *args)

    monkeypatch.setattr(KroneckerBlock, "refresh", refresh)
    model.fit(x, y, callbacks=[monitor], **FIT)
    assert monitor.history["refresh_seconds"][0] > 0
    assert len(calls) >= 2


def test_refresh_after_another_compile():
    """It is the new optimizer that is timed."""
    x, y = data()
    model = compiled()
    monitor = CurvatureMonitor(measure_refresh=True)
    model.fit(x, y, callbacks=[monitor], **FIT)
    old, new = model.optimizer, kng.PRONG()
    monitor.set_model(compiled(model, new))
    kept = [variable.numpy() for variable in old.variables]
    model.train_on_batch(x, y)
    assert monitor.record()["refresh_seconds"] > 0
    assert_equal([variable.numpy() for variable in old.variables], kept)


@pytest.mark.slow
def test_layers_of_all_kinds(float64):
    """Groups, one-hot inputs, patches and a block per channel."""
    rng = np.random.default_rng(0)
    tokens = keras.Input((6,), dtype="int32")
    hidden = keras.layers.Embedding(7, 4)(tokens)
    hidden = keras.layers.Conv1D(4, 3, groups=2)(hidden)
    hidden = keras.layers.BatchNormalization()(hidden)
    hidden = keras.layers.GlobalAveragePooling1D()(hidden)
    model = keras.Model(tokens, keras.layers.Dense(3)(hidden))
    compiled(model, kng.KFAC(max_factor_size=6))
    monitor = CurvatureMonitor()
    x = rng.integers(0, 7, size=(16, 6))
    model.fit(x, rng.integers(0, 3, size=16), callbacks=[monitor], **FIT)
    entries = model.optimizer.curvature.entries
    assert len(entries) == 4
    for entry in entries:
        expected = np.linalg.eigvalsh(entry.block.to_dense())[::-1]
        found = monitor.spectrum(entry.layer.path)
        np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-12)
    assert monitor.notes == {}


def test_custom_loop(float64):
    x, y = data()
    model = compiled()
    monitor = CurvatureMonitor()
    monitor.set_model(model)
    assert monitor.record() == {}
    model.train_on_batch(x, y)
    record = monitor.record()
    assert record["damping"] == model.optimizer.statistics["damping"]
    assert np.isnan(record["update_norm"])
    assert monitor.history["step"] == [1]


@pytest.mark.slow
def test_on_replicas(mirrored_strategy):
    """The averages are read as the sums of all replicas."""
    x, y = data(16)
    with mirrored_strategy.scope():
        model = compiled(run_eagerly=False, jit_compile=False)
    monitor = CurvatureMonitor()
    model.fit(x, y, callbacks=[monitor], **FIT)
    single = compiled()
    reference = CurvatureMonitor()
    single.fit(x, y, callbacks=[reference], **FIT)
    (mine, theirs) = (
        list(each.last_spectra.values())[0] for each in (monitor, reference)
    )
    # The inputs are those of one device; their second moments are too.
    np.testing.assert_allclose(mine["input"], theirs["input"], rtol=1e-4)
    refused = CurvatureMonitor(measure_refresh=True)
    with pytest.raises(ValueError, match="2 replicas"):
        model.fit(x, y, callbacks=[refused], **FIT)


# -- TensorBoard -----------------------------------------------------------


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    x, y = data()
    model = compiled()
    monitor = CurvatureMonitor(every=2, log_dir=tmp_path)
    model.fit(x, y, epochs=2, callbacks=[monitor], **FIT)
    (path,) = tmp_path.iterdir()
    scalars, histograms = {}, {}
    for event in tf.compat.v1.train.summary_iterator(str(path)):
        for value in event.summary.value:
            tensor = tf.make_ndarray(value.tensor)
            kind = scalars if tensor.ndim == 0 else histograms
            kind.setdefault(value.tag, {})[event.step] = tensor
    found = scalars["curvature/damping"]
    assert sorted(found) == [2, 4, 6]
    np.testing.assert_allclose(
        [found[step] for step in (2, 4, 6)],
        monitor.history["damping"],
        rtol=1e-6,
    )
    for layer in layer_names(model):
        assert f"curvature/condition_number/{layer}" in scalars
        # Rows of (left edge, right edge, count).
        rows = histograms[f"spectrum/{layer}"][6]
        positive = monitor.spectrum(layer)
        positive = positive[positive > 0]
        assert rows[:, 2].sum() == positive.size
        np.testing.assert_allclose(
            rows[-1, 1], np.log10(positive[0]), rtol=1e-5
        )


def test_without_tensorboard(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard.summary.v2", None)
    x, y = data()
    monitor = CurvatureMonitor(log_dir=tmp_path)
    with pytest.raises(ImportError, match=r"keras_natgrad\[tensorboard\]"):
        compiled().fit(x, y, callbacks=[monitor], **FIT)


# -- Figures ---------------------------------------------------------------


def test_plot(tmp_path):
    x, y = data()
    model, monitor = compiled(), CurvatureMonitor(every=1)
    model.fit(x, y, epochs=2, callbacks=[monitor], **FIT)
    figure = monitor.plot(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000
    damping, norms, conditions, spectra, ratio = figure.axes
    history = monitor.history

    def drawn(ax, index=0):
        return ax.get_lines()[index].get_ydata()

    np.testing.assert_array_equal(drawn(damping), history["damping"])
    np.testing.assert_array_equal(drawn(ratio), history["reduction_ratio"])
    np.testing.assert_array_equal(drawn(norms), history["update_norm"])
    for index, layer in enumerate(layer_names(model)):
        np.testing.assert_array_equal(
            drawn(conditions, index), history[f"condition_number/{layer}"]
        )
        values = monitor.spectrum(layer)
        found = drawn(spectra, index)
        np.testing.assert_array_equal(found, values[: len(found)])
    for ax in (damping, norms, conditions, spectra):
        assert ax.get_yscale() == "log"
    assert spectra.get_xscale() == "log"


@pytest.mark.variants("rngd")
@pytest.mark.parametrize("name", ["rngd", "prong", "natural_gradient"])
def test_plot_of_other_optimizers(name, tmp_path):
    x, y = data()
    monitor = CurvatureMonitor()
    model = compiled(optimizer=OPTIMIZERS[name]())
    model.fit(x, y, callbacks=[monitor], **FIT)
    adaptive = "reduction_ratio" in monitor.history
    figure = monitor.plot(tmp_path / "figure.png")
    assert len(figure.axes) == 4 + adaptive


def test_plot_of_nothing():
    with pytest.raises(ValueError, match="first record"):
        CurvatureMonitor().plot()


def test_plot_without_matplotlib(monkeypatch):
    x, y = data()
    monitor = CurvatureMonitor()
    compiled().fit(x, y, callbacks=[monitor], **FIT)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"keras_natgrad\[plots\]"):
        monitor.plot()


# -- Arguments -------------------------------------------------------------


def test_can_be_copied():
    """Tuners copy callbacks deeply, for every trial."""
    monitor = CurvatureMonitor(5, False, "logs", True, 7)
    again = copy.deepcopy(monitor)
    assert vars(again) == vars(monitor)


@pytest.mark.parametrize("every", [0, -1, 1.5, True, "step"])
def test_refused_periods(every):
    with pytest.raises(ValueError, match="Received: every="):
        CurvatureMonitor(every)


def test_refused_size():
    with pytest.raises(ValueError, match="Received: max_size=0"):
        CurvatureMonitor(max_size=0)


def test_refused_optimizers():
    x, y = data()
    model = mlp()
    model.compile("sgd", loss=cross_entropy())
    with pytest.raises(ValueError, match="keras_natgrad.KFAC"):
        model.fit(x, y, callbacks=[CurvatureMonitor()], **FIT)
    # Nothing to measure, and nothing to do, where nothing is trained.
    model.evaluate(x, y, verbose=0, callbacks=[CurvatureMonitor()])
    with pytest.raises(ValueError, match="keeps inverses"):
        compiled(optimizer=kng.NaturalGradient()).fit(
            x, y, callbacks=[CurvatureMonitor(measure_refresh=True)], **FIT
        )
