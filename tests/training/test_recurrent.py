"""Models with loops over time train, continue, and agree in all modes."""

import warnings

import keras
import numpy as np
import pytest

import keras_natgrad as kng
from tests.training.networks import assert_equal, compiled, state

layers = keras.layers
STEPS, FEATURES = 4, 3
FIT = {"batch_size": 12, "shuffle": False, "verbose": 0}

BODIES = {
    "simple": lambda: [layers.SimpleRNN(3)],
    "gru": lambda: [layers.GRU(3)],
    "lstm": lambda: [layers.LSTM(3)],
    "bidirectional": lambda: [layers.Bidirectional(layers.SimpleRNN(2))],
    "masked": lambda: [layers.Masking(), layers.GRU(3)],
    "time_distributed": lambda: [
        layers.TimeDistributed(layers.Dense(4, "tanh")),
        layers.GlobalAveragePooling1D(),
    ],
}


def slow(*values):
    """Tracing the second derivative of a loop takes its time."""
    return pytest.param(*values, marks=pytest.mark.slow)


def data(size=24):
    """Is the sum of a sequence positive? The ends are padding."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(size, STEPS, FEATURES)).astype(keras.config.floatx())
    x[::3, -1] = 0
    return x, (x.sum((1, 2)) > 0).astype("int32")


def make(name, steps=STEPS, optimizer=None, **kwargs):
    keras.utils.set_random_seed(3)
    source = keras.Input((steps, FEATURES))
    model = keras.Sequential([source, *BODIES[name](), layers.Dense(2)])
    return compiled(model, optimizer, **kwargs)


def losses_of(model, steps=6):
    x, y = data()
    return [float(model.train_on_batch(x, y)) for _ in range(steps)]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:These variables")
@pytest.mark.parametrize(
    "name",
    [
        name if name in ("simple", "time_distributed") else slow(name)
        for name in BODIES
    ],
)
def test_trains_alike_eagerly_and_in_a_graph(name, float64):
    eager = losses_of(make(name))
    assert np.all(np.isfinite(eager)) and eager[-1] < 0.8 * eager[0]
    graph = losses_of(make(name, run_eagerly=False))
    np.testing.assert_allclose(graph, eager, rtol=1e-6)


@pytest.mark.variants("lstm")
@pytest.mark.filterwarnings("ignore:These variables")
@pytest.mark.parametrize("name", ["lstm", "bidirectional"])
def test_trains(name):
    losses = losses_of(make(name))
    assert np.all(np.isfinite(losses)) and losses[-1] < 0.8 * losses[0]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:These variables")
def test_compiles_under_xla(float64):
    """With the step's length given; the quadratic model compiles for long."""
    results = [
        losses_of(
            make("simple", optimizer=kng.KFAC(0.1, 0.0, 0.1), **kwargs), 4
        )
        for kwargs in ({}, {"run_eagerly": False, "jit_compile": True})
    ]
    np.testing.assert_allclose(*results, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:These variables")
def test_unknown_length(float64):
    """A TimeDistributed layer of any length is captured in a graph."""
    model = make("time_distributed", None, run_eagerly=False)
    expected = losses_of(make("time_distributed"))
    np.testing.assert_allclose(losses_of(model), expected, rtol=1e-6)
    assert model.optimizer.curvature.plan.fallback == ()


@pytest.mark.parametrize("name", ["lstm", "bidirectional"])
def test_one_warning_says_why(name):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        losses_of(make(name), 2)
    found = [str(w.message) for w in caught if "fallback" in str(w.message)]
    assert len(found) == 1
    assert "weights of a loop" in found[0]


@pytest.mark.filterwarnings("ignore:These variables")
def test_every_kernel_has_curvature():
    model = make("lstm")
    losses_of(model, 2)
    kinds = [entry.block.kind for entry in model.optimizer.curvature.entries]
    assert kinds == [
        *("kronecker", "gradient_kronecker", "gradient_kronecker"),
        "gradient_diagonal",
    ]
    for entry in model.optimizer.curvature.entries:
        assert float(entry.block.trace()) > 0


@pytest.mark.filterwarnings("ignore:These variables")
def test_stateful_layer_keeps_one_state(float64):
    """After a step the state is that of one pass, at the old weights."""
    gru = layers.GRU(3, stateful=True)
    source = keras.Input((STEPS, FEATURES), batch_size=24)
    model = compiled(keras.Sequential([source, gru, layers.Dense(2)]))
    x, y = data()
    model.train_on_batch(x, y)
    gru.reset_states()
    expected = gru(x).numpy()
    gru.reset_states()
    model.train_on_batch(x, y)
    assert model.optimizer.statistics["reduction_ratio"] != 0
    np.testing.assert_allclose(gru.states[0], expected, rtol=1e-10)


@pytest.mark.filterwarnings("ignore:These variables")
def test_saved_lstm_continues_bit_for_bit(tmp_path):
    x, y = data()
    model = make("lstm")
    model.fit(x, y, epochs=2, **FIT)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert_equal(state(loaded), state(model))
    loaded.optimizer.attach(loaded)
    loaded.run_eagerly = True
    for each in (model, loaded):
        each.fit(x, y, epochs=2, **FIT)
    assert_equal(state(loaded), state(model))


@pytest.mark.filterwarnings("ignore:These variables")
@pytest.mark.parametrize("how", ["lora", "quantized"])
def test_lora_and_quantised_layers_train(how):
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((STEPS * FEATURES,)),
            layers.Dense(5, "tanh"),
            layers.Dense(2),
        ]
    )
    if how == "lora":
        model.layers[0].enable_lora(2)
    else:
        model.layers[0].quantize("int8")
    compiled(model)
    x, y = data()
    x = x.reshape(len(x), -1)
    losses = [float(model.train_on_batch(x, y)) for _ in range(8)]
    assert np.all(np.isfinite(losses)) and losses[-1] < losses[0]
    lines = []
    model.optimizer.summary(print_fn=lines.append)
    reason = "LoRA enabled" if how == "lora" else "quantised to int8"
    assert reason in " ".join(lines[0].split())
