"""What every optimizer of the package must do in Keras."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_natgrad as kng
from tests.training.networks import (
    FEATURES,
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

OPTIMIZERS = {
    "kfac": kng.KFAC,
    "kfac_search": lambda **kw: kng.KFAC(
        kng.LineSearch(), kng.Spring(0.5), 0.01, **kw
    ),
    "natural_gradient": kng.NaturalGradient,
    "kernel": lambda **kw: kng.NaturalGradient(0.5, 0.1, "kernel", 0.5, **kw),
    "cg": lambda **kw: kng.NaturalGradient(
        0.5,
        0.1,
        kng.solvers.ConjugateGradient(20, preconditioner="kronecker"),
        **kw,
    ),
    # Small networks and few steps ask for a larger rate than the default.
    "rngd": lambda **kw: kng.RNGD(0.3, relative_damping=0.01, **kw),
    "rngd_far": lambda **kw: kng.RNGD(
        0.3, 0.01, horizon=2, momentum=0.5, identity_start=True, **kw
    ),
    "line_search": lambda **kw: kng.NaturalGradient(kng.LineSearch(), **kw),
    "prong": lambda **kw: kng.PRONG(**{"learning_rate": 0.3, **kw}),
    "prong_momentum": lambda **kw: kng.PRONG(
        0.2, 0.5, 0.1, False, curvature_update_period=1, **kw
    ),
}


# Other arguments of the same optimizers: their compilation takes long.
VARIANTS = ("kfac_search", "cg", "rngd_far", "line_search", "prong_momentum")


@pytest.fixture(
    params=[
        pytest.param(name, marks=pytest.mark.slow) if name in VARIANTS else name
        for name in OPTIMIZERS
    ]
)
def make(request):
    return OPTIMIZERS[request.param]


def deep():
    return keras.Sequential(
        [
            keras.Input((FEATURES,)),
            keras.layers.Dense(5, "tanh"),
            keras.layers.Dense(4, "tanh", kernel_regularizer="l2"),
            keras.layers.Dense(3),
        ]
    )


@pytest.mark.variants("kfac")
def test_learns_with_default_arguments(make):
    x, y = data(64)
    model = compiled(optimizer=make(), run_eagerly=False)
    before = model.evaluate(x, y, verbose=0)
    model.fit(x, y, epochs=10, batch_size=64, verbose=0)
    assert model.evaluate(x, y, verbose=0) < 0.5 * before


@pytest.mark.variants("kernel-xla")
@pytest.mark.parametrize("mode", ["graph", "xla", "many"])
def test_modes_agree(make, mode, float64):
    x, y = data()
    kwargs = {
        "graph": {"run_eagerly": False},
        "xla": {"run_eagerly": False, "jit_compile": True},
        "many": {"run_eagerly": False, "steps_per_execution": 3},
    }[mode]
    left, right = compiled(deep(), make()), None
    keras.utils.set_random_seed(0)
    right = deep()
    right.set_weights(left.get_weights())
    right = compiled(right, make(), **kwargs)
    for model in (left, right):
        model.fit(x, y, epochs=2, **FIT)
    assert_close(weights(left), weights(right), 1e-6, 1e-9)


@pytest.mark.variants("kfac")
def test_saved_and_resumed_bit_for_bit(make, tmp_path):
    x, y = data()
    model = compiled(deep(), make(), run_eagerly=False)
    model.fit(x, y, epochs=2, **FIT)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert_equal(state(loaded), state(model))
    assert loaded.optimizer.get_config() == model.optimizer.get_config()
    loaded.optimizer.attach(loaded)
    for each in (model, loaded):
        each.fit(x, y, epochs=2, **FIT)
    assert_equal(state(loaded), state(model))


def test_config_round_trip(make):
    optimizer = make(weight_decay=0.01, clipnorm=1.0)
    copy = type(optimizer).from_config(optimizer.get_config())
    assert copy.get_config() == optimizer.get_config()
    through = keras.saving.deserialize_keras_object(
        keras.saving.serialize_keras_object(optimizer)
    )
    assert through.get_config() == optimizer.get_config()


@pytest.mark.parametrize(
    "kwargs",
    [
        {"weight_decay": 0.01},
        {"clipnorm": 0.05},
        {"clipvalue": 0.02},
        {"global_clipnorm": 0.1},
        {"use_ema": True, "ema_momentum": 0.5},
        {"gradient_accumulation_steps": 2},
        {"loss_scale_factor": 64.0},
    ],
    ids=lambda kwargs: next(iter(kwargs)),
)
@pytest.mark.slow
@pytest.mark.parametrize("name", ["kernel", "cg"])
def test_base_arguments(name, kwargs):
    """Those of the default arguments are in `tests/contract`."""
    make = OPTIMIZERS[name]
    x, y = data()
    model = compiled(mlp(), make(**kwargs))
    before = weights(model)
    model.fit(x, y, epochs=2, **FIT)
    after = weights(model)
    assert all(np.all(np.isfinite(value)) for value in after)
    assert any(np.any(a != b) for a, b in zip(before, after, strict=True))


@pytest.mark.variants("kfac")
def test_loss_scale_changes_nothing(make, float64):
    x, y = data()
    results = []
    for factor in (None, 64.0):
        model = compiled(mlp(), make(loss_scale_factor=factor))
        model.fit(x, y, epochs=2, **FIT)
        results.append(weights(model))
    assert_close(*results, 1e-9, 1e-12)


@pytest.mark.variants("natural_gradient")
def test_partial_batches_and_sample_weights(make):
    x, y = data(21)
    sample_weight = np.linspace(0, 1, 21)
    model = compiled(mlp(), make(), run_eagerly=False)
    first = model.evaluate(x, y, sample_weight=sample_weight, verbose=0)
    model.fit(x, y, sample_weight=sample_weight, epochs=5, **FIT)
    last = model.evaluate(x, y, sample_weight=sample_weight, verbose=0)
    assert last < first


@pytest.mark.variants("kfac-True", "natural_gradient-False", "rngd-True")
@pytest.mark.parametrize("eager", [True, False])
def test_bad_data_is_skipped_and_counted(make, eager):
    x, y = data()
    model = compiled(mlp(), make(), run_eagerly=eager)
    model.train_on_batch(x, y)
    before = weights(model)
    bad = x.copy()
    bad[3] = np.nan
    model.train_on_batch(bad, y)
    assert_equal(weights(model), before)
    assert model.optimizer.statistics["skipped"] == 1
    model.train_on_batch(x, y)
    assert all(np.all(np.isfinite(value)) for value in weights(model))


def test_unattached(make):
    x, y = data()
    model = mlp()
    model.compile(make(), loss=cross_entropy())
    with pytest.raises(ValueError, match="not attached to a model"):
        model.fit(x, y, **FIT)


@pytest.mark.variants("kfac", "kernel")
def test_summary_and_statistics(make):
    x, y = data()
    model = compiled(mlp(), make(log_statistics=True))
    lines = []
    model.optimizer.summary(print_fn=lines.append)
    assert "5 × 5" in lines[0] and "Categorical" in lines[0]
    history = model.fit(x, y, **FIT).history
    assert history[f"{model.optimizer.name}_batches"] == [3.0]
    assert model.optimizer.statistics["batches"] == 3


@pytest.mark.slow
def test_custom_loop(make):
    x, y = data()
    model = mlp()
    head = kng.heads.Categorical()
    optimizer = make().attach(model, head=head)

    def objective():
        return -tf.reduce_mean(head.log_prob(model(x), y))

    @tf.function
    def step():
        with kng.CurvatureTape(optimizer, objective) as tape:
            loss = objective()
        variables = model.trainable_variables
        optimizer.apply(tape.gradient(loss, variables), variables)
        return loss

    losses = [float(step()) for _ in range(10)]
    assert losses[-1] < 0.7 * losses[0]
