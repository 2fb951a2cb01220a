"""RNGD: whole steps in NumPy, the authors' setting, arguments."""

import keras
import numpy as np
import pytest

import keras_natgrad as kng
from keras_natgrad.relative import curvature as curvature_relative
from tests.reference import fisher, relative
from tests.reference.bridge import dense_layers, matrix_of, network_of
from tests.reference.heads import Term
from tests.training.networks import (
    CLASSES,
    FEATURES,
    assert_close,
    assert_equal,
    compiled,
    data,
    state,
    weights,
)

FIT = {"batch_size": 8, "shuffle": False, "verbose": 0}
# Keras keeps it in float32; this is exact there.
PENALTY = 0.0625
AUTHORS = dict(
    ends="inputs",
    metric_decay=0.995,
    metric_update_period=1,
    refresh_growth=None,
    identity_start=True,
)


def network(*activations):
    penalty = keras.regularizers.L2(PENALTY / 2)
    model = keras.Sequential([keras.Input((FEATURES,))])
    for index, activation in enumerate(activations):
        units = CLASSES if index == len(activations) - 1 else 4
        model.add(
            keras.layers.Dense(units, activation, kernel_regularizer=penalty)
        )
    return model


def batches(x, y, count):
    for step in range(count):
        part = slice(8 * (step % 3), 8 * (step % 3) + 8)
        yield x[part], y[part]


class Reference:
    """A step in NumPy, with one dense solve per unit or layer.

    Args:
        model: Dense layers; the last one has the logits of a categorical.
        kinds: Per layer its activation, "inputs" or "output".
    """

    def __init__(self, model, kinds, decay, start, relative_damping):
        self.layers, self.kinds = dense_layers(model), kinds
        self.matrices = [matrix_of(layer) for layer in self.layers]
        self.decay, self.relative = decay, relative_damping
        self.identity = start
        self.averages, self.weight, self.inverse = None, 0.0, None

    def trace(self, x):
        network = network_of(self.layers)
        return network.with_matrices(self.matrices).trace(x)

    def gradients(self, x, y):
        term = Term(
            "categorical",
            np.full((len(x), 1), 1 / len(x)),
            np.eye(CLASSES)[y][:, np.newaxis],
        )
        trace = self.trace(x)
        found = []
        for index, matrix in enumerate(self.matrices):
            gradient = fisher.gradient(trace, [term], index)
            gradient[:-1] += PENALTY * matrix[:-1]
            found.append(gradient)
        return found

    def metrics(self, x):
        """Per layer `[k, n, n]`, or `[1, n m, n m]` for coupled units."""
        trace = self.trace(x)
        found = []
        for index, kind in enumerate(self.kinds):
            inputs = trace.inputs[index][:, 0]
            if kind == "inputs":
                nu = np.ones((len(x), 1))
            elif kind == "output":
                term = Term("categorical", np.full((len(x), 1), 1 / len(x)))
                found.append(fisher.block(trace, [term], index)[np.newaxis])
                continue
            elif kind == "diagonal":
                term = Term("categorical", np.full((len(x), 1), 1 / len(x)))
                block = fisher.block(trace, [term], index)
                columns = self.matrices[index].shape[1]
                rows = inputs.shape[1]
                found.append(relative.unit_blocks(block, rows, columns))
                continue
            else:
                nu = relative.INFORMATION[kind](inputs @ self.matrices[index])
            found.append(
                np.einsum("nj,na,nb->jab", nu, inputs, inputs) / len(x)
            )
        return found

    def update(self, x):
        new = self.metrics(x)
        if self.averages is None:
            zero = [np.zeros_like(each) for each in new]
            eye = [np.zeros_like(m) + np.eye(m.shape[-1]) for m in new]
            self.averages = eye if self.identity else zero
            self.weight = float(self.identity)
        self.averages = [
            self.decay * old + (1 - self.decay) * each
            for old, each in zip(self.averages, new, strict=True)
        ]
        self.weight = self.decay * self.weight + 1 - self.decay

    def refresh(self):
        self.inverse = [
            np.linalg.inv(
                average
                + self.relative
                * np.trace(average, axis1=1, axis2=2)[:, None, None]
                * np.eye(average.shape[-1])
            )
            for average in (each / self.weight for each in self.averages)
        ]

    def move(self, gradients, rate):
        for index, gradient in enumerate(gradients):
            inverse = self.inverse[index]
            if inverse.shape[-1] == gradient.size:
                solved = (inverse[0] @ gradient.ravel()).reshape(gradient.shape)
            else:
                solved = np.einsum(
                    "jab,bj->aj",
                    np.broadcast_to(
                        inverse, (gradient.shape[1], *inverse.shape[1:])
                    ),
                    gradient,
                )
            self.matrices[index] = self.matrices[index] - rate * solved


def assert_same_weights(model, reference, rtol=1e-9, atol=1e-11):
    for layer, matrix in zip(
        dense_layers(model), reference.matrices, strict=True
    ):
        np.testing.assert_allclose(
            matrix_of(layer), matrix, rtol=rtol, atol=atol
        )


@pytest.mark.parametrize("activation", ["tanh", "relu"])
def test_steps_equal_dense_solves(activation, float64):
    """Updates every 2nd and inversions every 3rd step."""
    x, y = data()
    optimizer = kng.RNGD(
        0.0625,
        relative_damping=1e-2,
        metric_decay=0.9,
        metric_update_period=2,
        inverse_update_period=3,
        refresh_growth=None,
    )
    model = compiled(network(activation, activation, "linear"), optimizer)
    kinds = [activation, activation, "output"]
    reference = Reference(model, kinds, 0.9, False, 1e-2)
    for step, (own_x, own_y) in enumerate(batches(x, y, 7)):
        gradients = reference.gradients(own_x, own_y)
        # The inverse knows earlier batches only, but for the first one.
        if step and step % 3 == 0:
            reference.refresh()
        if step % 2 == 0:
            reference.update(own_x)
        if step == 0:
            reference.refresh()
        reference.move(gradients, 0.0625)
        model.train_on_batch(own_x, own_y)
        assert_same_weights(model, reference)
    assert optimizer.statistics["refreshes"] == 3
    assert optimizer.statistics["curvature_updates"] == 4
    assert optimizer.statistics["failures"] == 0


class EigenReference(Reference):
    """The same with one eigenbasis for the units of a layer.

    `averages` has pairs: the mean metric, and a row of diagonals per unit.
    """

    def update(self, x):
        new = self.metrics(x)
        if self.averages is None:
            eyes = [np.eye(each.shape[-1]) for each in new]
            self.bases = eyes
            self.averages = [
                (np.zeros_like(each[0]), np.zeros(each.shape[:2]))
                for each in new
            ]
        rest = 1 - self.decay
        self.averages = [
            (
                self.decay * mean + rest * metric.mean(axis=0),
                self.decay * rows
                + rest * np.einsum("ba,jbc,ca->ja", basis, metric, basis),
            )
            for (mean, rows), metric, basis in zip(
                self.averages, new, self.bases, strict=True
            )
        ]
        self.weight = self.decay * self.weight + rest

    def refresh(self):
        self.inverse = []
        for index, (mean, rows) in enumerate(self.averages):
            values, basis = np.linalg.eigh(mean)
            rows = rows @ np.square(basis.T @ self.bases[index]).T
            rows *= np.maximum(values, 0.0) / rows.mean(axis=0)
            self.bases[index], self.averages[index] = basis, (mean, rows)
            rows = rows / self.weight
            damped = rows + self.relative * rows.sum(axis=1, keepdims=True)
            self.inverse.append(
                np.einsum("ba,ja,ca->jbc", basis, 1 / damped, basis)
            )


@pytest.mark.variants("eager")
@pytest.mark.parametrize(
    "mode", ["eager", "graph", pytest.param("xla", marks=pytest.mark.slow)]
)
def test_steps_with_a_shared_eigenbasis(mode, float64):
    """Every layer above the bound; the diagonals follow the basis."""
    x, y = data()
    optimizer = kng.RNGD(
        0.0625,
        relative_damping=1e-2,
        metric_decay=0.9,
        metric_update_period=2,
        inverse_update_period=3,
        refresh_growth=None,
        max_metric_elements=30,
        shared="eigen",
    )
    model = compiled(
        network("tanh", "relu", "linear"),
        optimizer,
        run_eagerly=mode == "eager",
        jit_compile=mode == "xla",
    )
    reference = EigenReference(
        model, ["tanh", "relu", "diagonal"], 0.9, False, 1e-2
    )
    # XLA iterates for eigenvectors, to about six digits; others to rounding.
    rtol = 1e-5 if mode == "xla" else 1e-9
    for step, (own_x, own_y) in enumerate(batches(x, y, 7)):
        gradients = reference.gradients(own_x, own_y)
        if step and step % 3 == 0:
            reference.refresh()
        if step % 2 == 0:
            reference.update(own_x)
        if step == 0:
            reference.refresh()
        reference.move(gradients, 0.0625)
        model.train_on_batch(own_x, own_y)
        assert_same_weights(model, reference, rtol, rtol / 100)
    lines = []
    optimizer.summary(print_fn=lines.append)
    assert "tanh, 5² basis for" in lines[0]


@pytest.mark.slow
def test_shared_eigenbasis_is_saved_and_continues(tmp_path):
    x, y = data()
    options = dict(max_metric_elements=30, shared="eigen")
    model = compiled(network("tanh", "linear"), kng.RNGD(0.1, **options))
    model.fit(x, y, **FIT)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    loaded.optimizer.attach(loaded)
    kinds = [spec["block"] for spec in loaded.optimizer.get_config()["metrics"]]
    assert kinds == ["eigen_shared"] * 2
    for each in (model, loaded):
        each.compile(each.optimizer, each.loss, run_eagerly=True)
        each.fit(x, y, epochs=2, **FIT)
    assert_equal(state(loaded), state(model))


def test_setting_of_the_authors(float64):
    """First inverse of the identity; the ends with their inputs' moment.

    The inverse is renewed before the step, the average after it.
    """
    x, y = data()
    optimizer = kng.RNGD(0.01, inverse_update_period=4, **AUTHORS)
    model = compiled(network("relu", "relu", "linear"), optimizer)
    reference = Reference(
        model, ["inputs", "relu", "inputs"], 0.995, True, 1e-4
    )
    sizes = [matrix.shape[0] for matrix in reference.matrices]
    for step, (own_x, own_y) in enumerate(batches(x, y, 9)):
        if step == 0:
            reference.inverse = [
                np.eye(size)[np.newaxis] / (1 + 1e-4 * size) for size in sizes
            ]
        elif step % 4 == 0:
            reference.refresh()
        reference.move(reference.gradients(own_x, own_y), 0.01)
        trained = reference.matrices
        # The statistics are of the pass before the step.
        reference.matrices = [matrix_of(layer) for layer in reference.layers]
        reference.update(own_x)
        reference.matrices = trained
        model.train_on_batch(own_x, own_y)
        assert_same_weights(model, reference)
    assert optimizer.statistics["refreshes"] == 3


@pytest.mark.variants("1048576-mode0")
@pytest.mark.parametrize(
    ("bound", "mode"),
    [
        (2**20, {"run_eagerly": False}),  # All units coupled.
        (100, {"run_eagerly": False}),  # A metric per unit.
        pytest.param(
            2**20,
            {"run_eagerly": False, "jit_compile": True},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_the_output_layer_needs_no_columns_in_a_graph(
    bound, mode, float64, monkeypatch
):
    """`V = c F_η` in a graph and under XLA, column by column eagerly."""
    x, y = data()
    weight = np.random.default_rng(2).uniform(size=len(x))
    weight[3] = 0.0
    sent_back, found = [], []
    original = curvature_relative._far_statistics
    monkeypatch.setattr(
        curvature_relative,
        "_far_statistics",
        lambda *args: sent_back.append(args) or original(*args),
    )
    start = network("tanh", "linear")
    for options in ({"run_eagerly": True}, mode):
        model = keras.models.clone_model(start)
        model.set_weights(start.get_weights())
        optimizer = kng.RNGD(
            0.0625, relative_damping=0.1, max_metric_elements=bound
        )
        compiled(model, optimizer, **options)
        sent_back.clear()
        for _ in range(3):
            model.train_on_batch(x, y, sample_weight=weight)
        assert bool(sent_back) == options["run_eagerly"]
        found.append(weights(model))
    assert_close(found[1], found[0], rtol=1e-9)


def test_full_horizon_is_the_exact_layerwise_natural_gradient(float64):
    x, y = data()
    optimizer = kng.RNGD(0.5, 0.0, 1e-2, horizon="full")
    model = compiled(network("tanh", "linear"), optimizer)
    reference = Reference(model, ["output", "output"], 0.0, False, 1e-2)
    gradients = reference.gradients(x, y)
    reference.update(x)
    reference.refresh()
    reference.move(gradients, 0.5)
    model.train_on_batch(x, y)
    assert_same_weights(model, reference)


def test_variables_without_a_layer_follow_their_gradient(float64):
    x, y = data()
    model = keras.Sequential(
        [
            keras.Input((FEATURES,)),
            keras.layers.LayerNormalization(),
            keras.layers.Dense(CLASSES),
        ]
    )
    other = keras.models.clone_model(model)
    other.set_weights(model.get_weights())
    with pytest.warns(UserWarning, match="LayerNormalization"):
        compiled(model, kng.RNGD(0.1, momentum=0.5)).train_on_batch(x, y)
    compiled(other, keras.optimizers.SGD(0.1)).train_on_batch(x, y)
    for left, right in zip(weights(model)[:2], weights(other)[:2], strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-12)


@pytest.mark.slow
def test_batch_normalization():
    x, y = data(64)
    model = keras.Sequential(
        [
            keras.Input((FEATURES,)),
            keras.layers.Dense(5),
            keras.layers.BatchNormalization(),
            keras.layers.Activation("relu"),
            keras.layers.Dense(CLASSES),
        ]
    )
    with pytest.warns(UserWarning, match="BatchNormalization"):
        compiled(model, kng.RNGD(0.1), run_eagerly=False)
        before = model.evaluate(x, y, verbose=0)
        model.fit(x, y, epochs=10, **FIT)
    assert model.evaluate(x, y, verbose=0) < 0.7 * before


def test_summary_says_what_each_layer_got():
    x, y = data()
    lines = []
    optimizer = kng.RNGD(0.1, max_metric_elements=60)
    # The optimizer holds the model weakly.
    model = network("tanh", "relu", "linear")
    compiled(model, optimizer)
    optimizer.summary(print_fn=lines.append)
    for text in (
        "tanh, 5² per group of 2 units",
        "relu, 5² per group of 2 units",
        "network output, 5² per group of 2",
    ):
        assert text in lines[0]
    lines.clear()
    optimizer = kng.RNGD(0.1, horizon=2, ends="inputs")
    model = compiled(network("tanh", "relu", "relu", "linear"), optimizer)
    optimizer.summary(print_fn=lines.append)
    name = model.layers[2].name
    text = " ".join(lines[0].split())
    assert "inputs alone, 5² for all units" in text
    assert f"relu of {name}, 20² for the" in text


def test_config_of_the_metrics_rebuilds_the_state(tmp_path):
    x, y = data()
    options = dict(horizon=2, max_metric_elements=100, softness=0.5)
    model = compiled(
        network("tanh", "relu", "linear"), kng.RNGD(0.1, **options)
    )
    model.train_on_batch(x, y)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    for left, right in zip(state(loaded), state(model), strict=True):
        np.testing.assert_array_equal(left, right)
    config = loaded.optimizer.get_config()
    assert {key: config[key] for key in options} == options
    assert [spec["block"] for spec in config["metrics"]] == ["unitwise"] * 3


@pytest.mark.parametrize(
    ("horizon", "damping"), [(1, 0.0), (2, 0.01), ("full", 0.01)]
)
def test_damping_by_horizon(horizon, damping):
    """The Fisher of the output vanishes, the metric of a layer does not."""
    optimizer = kng.RNGD(horizon=horizon)
    assert optimizer.settings.damping == damping
    again = kng.RNGD.from_config(optimizer.get_config())
    assert again.settings.damping == damping
    other = kng.RNGD(damping=0.5, horizon=horizon)
    assert other.settings.damping == 0.5


BAD = {
    "damping": [-1.0, "none", True],
    "relative_damping": [-1e-4, None],
    "horizon": [0, -1, 1.5, "all", True],
    "ends": ["both"],
    "metric_decay": [1.0, -0.1, "x"],
    "metric_update_period": [0, 1.5],
    "inverse_update_period": [0],
    "refresh_growth": [0.0],
    "softness": [0.0, "x"],
    "noise_scale": [-1.0],
    "other_response": ["normal"],
    "max_metric_elements": [0],
    "shared": ["mean", None],
    "momentum": [1.0, "auto"],
}


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name, values in BAD.items() for value in values],
)
def test_bad_arguments(name, value):
    with pytest.raises(ValueError, match=f"{name}.*{name}={value!r}"):
        kng.RNGD(**{name: value})


def test_bad_networks_are_named_before_the_first_step():
    x, y = data()
    cases = {
        "horizon=4": (("tanh", "tanh", "linear"), {"horizon": 4}),
        "log_softmax": (("log_softmax", "linear"), {}),
        "softplus": (("softplus", "linear"), {"other_response": None}),
    }
    for message, (activations, kwargs) in cases.items():
        model = compiled(network(*activations), kng.RNGD(**kwargs))
        name = model.layers[0].name
        with pytest.raises(ValueError, match=f"{message}|'{name}'") as error:
            model.train_on_batch(x, y)
        assert name in str(error.value) and message in str(error.value)
