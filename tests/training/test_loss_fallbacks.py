"""Training with losses that are no log-likelihood of a head."""

import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_natgrad as kng
from keras_natgrad import heads
from tests.training.networks import (
    FEATURES,
    assert_close,
    compiled,
    data,
    weights,
)

layers, losses = keras.layers, keras.losses
FALLBACK = "No head has these losses as its negative log-likelihood"
MODES = {
    "eager": {"run_eagerly": True},
    "graph": {"run_eagerly": False, "jit_compile": False},
    "xla": {"run_eagerly": False, "jit_compile": True},
}


class Power(losses.Loss):
    """Σ |y − μ|^1.5 of every example."""

    def call(self, y_true, y_pred):
        return keras.ops.sum(keras.ops.abs(y_true - y_pred) ** 1.5, axis=-1)


def power(y_true, y_pred):
    return tf.reduce_mean(tf.abs(y_true - y_pred) ** 1.5, axis=-1)


def one_number(y_true, y_pred):
    return tf.reduce_mean(tf.abs(y_true - y_pred) ** 1.5)


def squared(y_true, y_pred):
    return tf.reduce_mean((y_true - y_pred) ** 2, axis=-1)


# Loss, last activation and targets.
CASES = {
    "hinge": ("hinge", None, "binary"),
    "squared_hinge": ("squared_hinge", None, "signs"),
    "focal": (losses.BinaryFocalCrossentropy(), "sigmoid", "binary"),
    "dice": ("dice", "sigmoid", "binary"),
    "tversky": (losses.Tversky(axis=1), "sigmoid", "binary"),
    "categorical_focal": (
        losses.CategoricalFocalCrossentropy(from_logits=True),
        None,
        "one_hot",
    ),
    "categorical_hinge": ("categorical_hinge", None, "one_hot"),
    "mape": ("mape", None, "away"),
    "cosine": ("cosine_similarity", None, "real"),
    "class": (Power(), None, "real"),
    "function": (power, None, "real"),
    "one_number": (one_number, None, "real"),
}
EMPIRICAL = ("class", "function", "one_number")


def problem(targets):
    x, y = data()
    z = x[:, :3]
    return x, {
        "real": z,
        "away": z + np.sign(z),
        "binary": (z > 0).astype(x.dtype),
        "signs": np.sign(z),
        "one_hot": np.eye(3, dtype=x.dtype)[y],
    }[targets]


def network(activation=None, units=3):
    return keras.Sequential(
        [
            keras.Input((FEATURES,)),
            layers.Dense(
                6,
                activation="tanh",
                kernel_initializer=keras.initializers.GlorotNormal(seed=1),
            ),
            layers.Dense(
                units,
                activation=activation,
                kernel_initializer=keras.initializers.GlorotNormal(seed=2),
            ),
        ]
    )


def fallback_warnings(records):
    return [r for r in records if FALLBACK in str(r.message)]


@pytest.mark.variants("squared_hinge")
@pytest.mark.parametrize("name", CASES)
def test_training(name):
    """Twelve default steps, with exactly one warning that names the loss."""
    loss, activation, targets = CASES[name]
    x, y = problem(targets)
    model = network(activation)
    with warnings.catch_warnings(record=True) as records:
        warnings.simplefilter("always")
        compiled(model, loss=loss, **MODES["graph"])
        # The last batch is smaller: the batch size is dynamic.
        history = model.fit(x, y, batch_size=20, epochs=12, verbose=0)
    values = history.history["loss"]
    floor = -1.0 if name == "cosine" else 0.0
    assert np.all(np.isfinite(values))
    assert values[-1] - floor < 0.6 * (values[0] - floor)
    assert model.optimizer.statistics["skipped"] == 0
    (record,) = fallback_warnings(records)
    message = str(record.message)
    kind = "the empirical Fisher" if name in EMPIRICAL else "a surrogate"
    assert kind in message and "'output'" in message
    assert "head=keras_natgrad.heads.<Head>(...)" in message
    assert "register_loss" in message


def all_losses():
    """One output per loss, on one hidden layer."""
    inputs = keras.Input((FEATURES,))
    dense = [
        layers.Dense(
            3,
            activation=activation,
            kernel_initializer=keras.initializers.GlorotNormal(seed=seed),
        )
        for seed, (_, activation, _) in enumerate(CASES.values())
    ]
    hidden = layers.Dense(
        6,
        activation="tanh",
        kernel_initializer=keras.initializers.GlorotNormal(seed=99),
    )(inputs)
    return keras.Model(
        inputs,
        {name: own(hidden) for name, own in zip(CASES, dense, strict=True)},
    )


@pytest.mark.slow
def test_modes_agree():
    """All losses at once: eager steps, and XLA's, are those of the graph."""
    x, _ = data()
    targets = {name: problem(case[2])[1] for name, case in CASES.items()}
    found = {}
    for mode, options in MODES.items():
        model = compiled(
            all_losses(),
            loss={name: case[0] for name, case in CASES.items()},
            loss_weights={
                name: 0.01 if name == "mape" else 1.0 for name in CASES
            },
            **options,
        )
        with pytest.warns(UserWarning, match=FALLBACK):
            history = model.fit(x, targets, batch_size=24, epochs=6, verbose=0)
        values = history.history["loss"]
        assert np.all(np.isfinite(values)) and values[-1] < 0.8 * values[0]
        found[mode] = weights(model)
    assert_close(found["eager"], found["graph"], 5e-3, 5e-3)
    assert_close(found["xla"], found["graph"], 5e-3, 5e-3)


@pytest.mark.variants("eager")
@pytest.mark.parametrize("mode", MODES)
def test_ctc(mode):
    """Frames of a sequence; the time axis is dynamic in a graph."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(16, 6, FEATURES)).astype("float32")
    y = np.argmax(x[:, :2, :2], axis=-1) + 1
    model = keras.Sequential(
        [
            keras.Input((6 if mode == "xla" else None, FEATURES)),
            layers.Dense(8, activation="tanh"),
            layers.Dense(3),
        ]
    )
    with pytest.warns(UserWarning, match="'ctc'.*Categorical.*surrogate"):
        compiled(model, loss="ctc", **MODES[mode])
        history = model.fit(x, y, batch_size=16, epochs=12, verbose=0)
    values = history.history["loss"]
    assert values[-1] < 0.7 * values[0]


def test_no_warning_for_exact_heads_and_given_ones():
    x, y = problem("real")
    for loss, head in (
        ("huber", None),
        ("log_cosh", None),
        (power, heads.Laplace(1.0)),
        (kng.losses.NegativeLogLikelihood(heads.Normal(1.0)), None),
    ):
        with warnings.catch_warnings(record=True) as records:
            warnings.simplefilter("always")
            model = network()
            optimizer = kng.KFAC().attach(model, head=head)
            model.compile(optimizer, loss=loss, run_eagerly=True)
            model.train_on_batch(x, y)
        assert not fallback_warnings(records)


@pytest.fixture
def registry(monkeypatch):
    """Forget at the end of a test what it registered."""
    from keras_natgrad.heads import losses

    monkeypatch.setattr(losses, "_CONVERTERS", dict(losses._CONVERTERS))


@pytest.mark.parametrize(
    ("registered", "loss"),
    [
        (power, power),
        (Power, Power()),
        (losses.Hinge, "hinge"),
        (losses.hinge, "hinge"),
    ],
)
def test_a_registered_loss_comes_first(registry, registered, loss):
    def convert(loss):
        return heads.Laplace(2.0), heads.LossWeight(units="mean")

    kng.heads.register_loss(registered, convert)
    x, y = problem("signs")
    with warnings.catch_warnings(record=True) as records:
        warnings.simplefilter("always")
        model = compiled(network(), loss=loss)
        model.train_on_batch(x, y)
    assert not fallback_warnings(records)
    text = summary_of(model.optimizer)
    assert "Laplace(scale=2.0); exact, closed form" in text


@pytest.mark.variants("exact-exact", "estimated-exact")
@pytest.mark.parametrize("kind", ["exact", "propagated", "sampled"])
@pytest.mark.parametrize("model", ["exact", "estimated"])
def test_every_kind_of_fisher_is_the_empirical_one(kind, model, float64):
    """Of one unit, where `squared` has the scores of the built-in loss.

    The observed score is the only column of L, so that no kind differs from
    the built-in loss with `fisher="empirical"`.
    """
    x, y = problem("real")
    found = []
    for loss, fisher in ((squared, kind), ("mse", "empirical")):
        optimizer = kng.KFAC(
            learning_rate=0.3,
            momentum=0.0,
            damping=0.1,
            fisher=fisher,
            quadratic_model=model,
        )
        net = compiled(network(units=1), optimizer, loss)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for _ in range(4):
                net.train_on_batch(x, y[:, :1])
        found.append(weights(net))
    assert_close(*found, 1e-9, 1e-12)


@pytest.mark.parametrize("loss", [squared, "hinge"])
def test_the_empirical_fisher_is_no_fallback_where_it_is_asked_for(loss):
    x, y = problem("signs")
    with warnings.catch_warnings(record=True) as records:
        warnings.simplefilter("always")
        optimizer = kng.KFAC(fisher="empirical")
        model = compiled(network(), optimizer, loss)
        values = [model.train_on_batch(x, y) for _ in range(10)]
    assert not fallback_warnings(records)
    assert values[-1] < 0.6 * values[0]
    assert "empirical, at the observed targets" in summary_of(optimizer)


@pytest.mark.variants("power")
@pytest.mark.parametrize("loss", [power, one_number, "hinge", "mape"])
def test_the_scale_of_the_loss_does_not_matter(loss, float64):
    x, y = problem("away")
    found = []
    for scale in (1.0, 1000.0):
        model = compiled(network(), loss=loss, loss_weights=scale)
        with pytest.warns(UserWarning, match=FALLBACK):
            for _ in range(5):
                model.train_on_batch(x, y)
        found.append(weights(model))
    assert_close(*found, 1e-6, 1e-9)


@pytest.mark.parametrize("loss", [power, "hinge", losses.Tversky(axis=1)])
def test_an_example_of_weight_zero_is_absent(loss, float64):
    x, y = problem("binary")
    rest = np.where(np.arange(24) < 16, 1.5, 0.0)
    found = []
    for rows, weight in ((slice(None), rest), (slice(16), np.full(16, 1.0))):
        optimizer = kng.KFAC(
            learning_rate=0.1, momentum=0.0, damping=0.1, fisher="exact"
        )
        model = compiled(network("sigmoid"), optimizer, loss)
        with pytest.warns(UserWarning, match=FALLBACK):
            for _ in range(3):
                model.train_on_batch(x[rows], y[rows], sample_weight=weight)
        found.append(weights(model))
    assert_close(*found, 1e-8, 1e-10)


def two_outputs():
    x = keras.Input((FEATURES,))
    hidden = layers.Dense(6, activation="tanh")(x)
    return keras.Model(
        x,
        {
            "label": layers.Dense(3)(hidden),
            "margin": layers.Dense(3)(hidden),
            "value": layers.Dense(3)(hidden),
        },
    )


def summary_of(optimizer):
    lines = []
    optimizer.summary(print_fn=lines.append)
    return "\n".join(lines)


@pytest.mark.slow
def test_several_outputs_and_their_summary():
    x, y = data()
    targets = {"label": y, "margin": np.sign(x[:, :3]), "value": x[:, :3]}
    loss = {
        "label": losses.SparseCategoricalCrossentropy(from_logits=True),
        "margin": "hinge",
        "value": power,
    }
    model = two_outputs()
    optimizer = kng.KFAC().attach(model)
    assert "Fisher of" not in summary_of(optimizer)
    model.compile(optimizer, loss, loss_weights={k: 0.5 for k in loss})
    rows = [
        "label: Categorical(from_logits=True, sparse=True); exact, closed form",
        "margin: Bernoulli(from_logits=True); surrogate: Bernoulli for hinge",
        "value: power; empirical, at the observed targets",
    ]
    before = summary_of(optimizer)
    assert all(f"Fisher of {row}\n" in before for row in rows)
    with warnings.catch_warnings(record=True) as records:
        warnings.simplefilter("always")
        history = model.fit(x, targets, batch_size=24, epochs=10, verbose=0)
    (record,) = fallback_warnings(records)
    assert "'hinge' of 'margin'" in str(record.message)
    assert "'power' of 'value'" in str(record.message)
    assert "label" not in str(record.message)
    assert history.history["loss"][-1] < 0.6 * history.history["loss"][0]
    after = summary_of(optimizer)
    assert all(f"Fisher of {row}\n" in after for row in rows)


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("summation", "exact, summation over the support"),
        ("kl_divergence", "exact, Hessian of kl_divergence"),
        ("monte_carlo", "monte_carlo, 5 samples"),
    ],
)
def test_summary_says_the_method_of_a_distribution(method, expected):
    import tensorflow_probability as tfp

    def bernoulli(outputs):
        return tfp.distributions.Bernoulli(logits=outputs[..., 0])

    head = heads.Distribution(bernoulli, method=method, samples=5)
    assert head.describe_fisher(1) == expected
    assert heads.Distribution(bernoulli).describe_fisher().startswith("method")
    model = network(units=1)
    optimizer = kng.KFAC().attach(model)
    model.compile(optimizer, kng.losses.NegativeLogLikelihood(head))
    assert f"Fisher of output: Distribution(bernoulli); {expected}\n" in (
        summary_of(optimizer)
    )


def test_summary_of_a_subclassed_model():
    class Net(keras.Model):
        def __init__(self):
            super().__init__()
            self.last = layers.Dense(1)

        def call(self, x):
            return self.last(x)

    model = Net()
    model(np.zeros((1, FEATURES)))
    optimizer = kng.KFAC().attach(model)
    model.compile(optimizer, "crossentropy")
    assert "known after the first step" in summary_of(optimizer)
    model.compile(optimizer, "hinge", run_eagerly=True)
    assert "surrogate: Bernoulli for hinge" in summary_of(optimizer)


@pytest.mark.slow
def test_sequences_of_any_length_with_a_mask():
    """Values per position, masked as Keras masks them."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(8, 5, FEATURES)).astype("float32")
    x[:, 3:] = 0.0
    model = keras.Sequential(
        [
            keras.Input((None, FEATURES)),
            layers.Masking(),
            layers.Dense(8, activation="tanh"),
            layers.Dense(2),
        ]
    )
    with pytest.warns(UserWarning, match="the empirical Fisher"):
        compiled(model, loss=squared, run_eagerly=False)
        history = model.fit(x, x[..., :2], batch_size=8, epochs=12, verbose=0)
    assert history.history["loss"][-1] < 0.5 * history.history["loss"][0]
