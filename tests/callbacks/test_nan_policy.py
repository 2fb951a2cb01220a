"""What happens where the loss is not finite."""

import copy
import warnings

import keras
import numpy as np
import pytest

import keras_natgrad as kng
from keras_natgrad.callbacks import RaiseDamping
from tests.training.networks import (
    assert_equal,
    compiled,
    cross_entropy,
    data,
    mlp,
    state,
    weights,
)

FIT = {"batch_size": 8, "shuffle": False, "verbose": 0}


class Spoil(keras.callbacks.Callback):
    """Sets the weights to something bad before some batches."""

    def __init__(self, batches, value=np.nan):
        super().__init__()
        self.batches = set(batches)
        self.value = value
        self.seen = -1

    def on_train_batch_begin(self, batch, logs=None):
        self.seen += 1
        if self.seen in self.batches:
            variable = self.model.trainable_variables[0]
            variable.assign(np.full(variable.shape, self.value))


class Seen(keras.callbacks.Callback):
    """Notes state and statistics after every batch."""

    def on_train_begin(self, logs=None):
        self.states, self.damping, self.losses = [], [], []

    def on_train_batch_end(self, batch, logs=None):
        self.states.append(state(self.model))
        self.damping.append(self.model.optimizer.statistics["damping"])
        self.losses.append(logs["loss"])


def index_of(model, name):
    paths = [v.path for v in [*model.weights, *model.optimizer.variables]]
    return paths.index(f"{model.optimizer.name}/{name}")


def fit(model, callbacks, batches=6, **kwargs):
    """One epoch, with a warning for every return at most."""
    x, y = data(8 * batches)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The loss is not finite")
        return model.fit(x, y, callbacks=callbacks, **{**FIT, **kwargs})


@pytest.mark.parametrize("damping", [0.1, "auto"])
def test_goes_back_to_the_last_good_copy(damping):
    """All state is that before batch 2, but for a damping ten times as high."""
    model, seen = compiled(optimizer=kng.KFAC(damping=damping)), Seen()
    policy = RaiseDamping(keep_every=2)
    # In the order of the list: the copy is taken before the weights are bad.
    fit(model, [policy, Spoil([3]), seen], batches=4)
    assert policy.returns == [(4, 2)]
    found, expected = seen.states[3], seen.states[1]
    changed = {
        index_of(model, name): factor
        for name, factor in (
            ("damping", 10.0),
            ("damping_scale", 10.0),
            ("inverses_valid", 0.0),
        )
    }
    for index, (after, before) in enumerate(zip(found, expected, strict=True)):
        factor = changed.get(index, 1.0)
        if factor == 1.0:
            np.testing.assert_array_equal(after, before)
        else:
            np.testing.assert_allclose(after, factor * before, rtol=1e-6)


def test_goes_on_with_the_raised_damping():
    """A constant damping keeps the factor, an adaptive one adapts from it."""
    seen = Seen()
    model = compiled(optimizer=kng.KFAC(damping=0.1))
    fit(model, [RaiseDamping(5.0), Spoil([2]), seen])
    np.testing.assert_allclose(seen.damping, [0.1, 0.1, 0, 0.5, 0.5, 0.5])
    assert np.all(np.isfinite(weights(model)[0]))


def test_before_the_first_step():
    """An adaptive damping starts higher; there is no state to go back to."""
    rule = kng.LevenbergMarquardt(period=1000)
    plain, raised = (compiled(optimizer=kng.KFAC(damping=rule)) for _ in "ab")
    seen = Seen(), Seen()
    fit(plain, [seen[0]], batches=2)
    policy = RaiseDamping(100.0)
    # The second batch is the same as the first.
    x, y = (np.concatenate([each, each]) for each in data(8))
    with pytest.warns(UserWarning, match="iteration 0 are back.*100 times"):
        raised.fit(x, y, callbacks=[policy, Spoil([0]), seen[1]], **FIT)
    reference = compiled(optimizer=kng.KFAC(damping=rule))
    reference.optimizer.build(reference.trainable_variables)
    reference.optimizer.raise_damping(100.0)
    reference.train_on_batch(*data(8))
    # The random cotangents count batches, those that were bad too.
    found = raised.optimizer.statistics["damping"]
    assert found == reference.optimizer.statistics["damping"]
    assert found > 20 * seen[0].damping[0]


def diverging():
    """Least squares with steps that are far too long."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(64, 4)).astype("float32")
    y = x @ np.array([[1.0], [-2.0], [0.5], [3.0]], "float32")
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    optimizer = kng.KFAC(
        1e5, momentum=0.0, damping=1.0, block="full", factor_decay=0.0
    )
    compiled(model, optimizer, "mse", run_eagerly=False, jit_compile=False)
    return model, x, y


def test_diverging_training_recovers():
    model, x, y = diverging()
    arguments = {"batch_size": 64, "epochs": 60, "verbose": 0}
    model.fit(x, y, **arguments)
    assert not np.isfinite(model.evaluate(x, y, verbose=0))
    model, x, y = diverging()
    first = model.evaluate(x, y, verbose=0)
    policy = RaiseDamping(1000.0, keep_every=1000, tolerance=0)
    with pytest.warns(UserWarning, match="The loss is not finite"):
        model.fit(x, y, callbacks=[policy], **arguments)
    assert len(policy.returns) == 2
    assert model.optimizer.statistics["damping"] == pytest.approx(1e6)
    assert model.evaluate(x, y, verbose=0) < 1e-3 * first


def test_bad_data_is_left_to_the_optimizer():
    """One batch is skipped, as it is without the callback."""
    x, y = data(32)
    x[9, 0] = np.nan
    policy = RaiseDamping()
    models = compiled(), compiled()
    models[0].fit(x, y, callbacks=[policy], **FIT)
    models[1].fit(x, y, **FIT)
    assert_equal(state(models[0]), state(models[1]))
    assert policy.returns == []
    assert models[0].optimizer.statistics["skipped"] == 1


def test_an_adaptive_optimizer_helps_itself_first():
    """It takes its step back after the second batch; the third is good."""
    x, y = data(8)
    optimizer = kng.KFAC(0.1, momentum=0.5)
    model, policy, seen = compiled(optimizer=optimizer), RaiseDamping(), Seen()

    class LongStep(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            optimizer.learning_rate = 1e38 if batch == 2 else 0.1

    x, y = (np.concatenate([each] * 7) for each in (x, y))
    model.fit(x, y, callbacks=[policy, LongStep(), seen], **FIT)
    assert policy.returns == []
    assert optimizer.statistics["retracted"] == 1
    assert np.all(np.isfinite(seen.losses[-1]))


@pytest.mark.variants("0-1")
@pytest.mark.parametrize(("tolerance", "expected"), [(0, 1), (1, 2), (2, 3)])
def test_tolerance(tolerance, expected):
    """Finite weights whose loss overflows, and a damping that is constant."""
    model = compiled(
        keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)]),
        kng.KFAC(damping=0.1),
        "mse",
    )
    policy, seen = RaiseDamping(tolerance=tolerance), Seen()
    x, _ = data(48)
    with pytest.warns(UserWarning, match="are back"):
        model.fit(
            x, x[:, :3], callbacks=[policy, Spoil([1], 1e30), seen], **FIT
        )
    bad = [not np.isfinite(loss) for loss in seen.losses]
    assert bad == [False] + [True] * expected + [False] * (5 - expected)
    assert len(policy.returns) == 1


def test_metrics_start_anew():
    """The epoch's loss is the mean over the batches after the bad one."""
    x, y = data(32)
    x[9, 0] = np.nan
    model, losses = compiled(optimizer=kng.KFAC(0.0, damping=1.0)), []
    history = model.fit(x, y, callbacks=[RaiseDamping()], **FIT).history
    # A rate of zero: the weights stay as they are.
    losses = [
        model.evaluate(x[i : i + 8], y[i : i + 8], verbose=0) for i in (16, 24)
    ]
    np.testing.assert_allclose(history["loss"], [np.mean(losses)], rtol=1e-6)


def test_an_epoch_that_ends_badly_has_no_mean():
    """A loss of zero would be taken for the best epoch."""
    x, y = data(16)
    x[9, 0] = np.nan
    model = compiled()
    history = model.fit(
        x, y, epochs=2, callbacks=[RaiseDamping()], **FIT
    ).history
    assert np.all(np.isnan(history["loss"]))


def test_stops_after_patience():
    model, seen = compiled(optimizer=kng.KFAC(damping=0.1)), Seen()
    policy = RaiseDamping(patience=2)
    spoil = Spoil(range(1, 20))
    x, y = data(80)
    with pytest.warns(UserWarning) as caught:
        model.fit(x, y, callbacks=[policy, spoil, seen], **FIT)
    texts = [str(each.message) for each in caught]
    found = [text for text in texts if text.startswith("The loss")]
    assert len(found) == 3
    assert "10 times as high" in found[0]
    assert "100 times as high" in found[1]
    assert "was raised 2 times: training stops" in found[2]
    assert len(seen.states) == 4
    assert [to for _, to in policy.returns] == [0, 0, 0]
    # The last good copy, and the last damping.
    for variable, value in zip(
        weights(model), weights(compiled()), strict=True
    ):
        np.testing.assert_array_equal(variable, value)


def test_a_new_copy_ends_a_row():
    policy = RaiseDamping(keep_every=2, patience=1)
    model = compiled(optimizer=kng.KFAC(damping=0.1))
    fit(model, [policy, Spoil([3, 7])], batches=10)
    assert not model.stop_training
    assert [to for _, to in policy.returns] == [2, 4]
    assert model.optimizer.statistics["damping"] == pytest.approx(10.0)


def test_without_a_good_copy():
    """The model is not built before its first batch, which is bad."""
    model = keras.Sequential([keras.layers.Dense(3)])
    compiled(model, kng.KFAC(damping=0.1))
    x, y = data()
    policy = RaiseDamping(tolerance=0)
    with pytest.warns(UserWarning, match="no good copy"):
        model.fit(np.full_like(x, np.nan), y, callbacks=[policy], **FIT)
    assert model.stop_training
    assert policy.returns == []


@pytest.mark.slow
def test_the_learning_rate_is_not_put_back():
    model = compiled(optimizer=kng.KFAC(0.5, damping=0.1))
    schedule = keras.callbacks.LearningRateScheduler(
        lambda epoch, rate: 0.5 / (1 + epoch)
    )
    policy = RaiseDamping()
    fit(model, [schedule, policy, Spoil([7])], batches=6, epochs=2)
    assert policy.returns == [(8, 0)]
    assert float(model.optimizer.learning_rate.numpy()) == 0.25


def test_wrapped_optimizer():
    inner, model = kng.KFAC(damping=0.1), mlp()
    inner.attach(model)
    model.compile(
        keras.optimizers.LossScaleOptimizer(inner),
        loss=cross_entropy(),
        run_eagerly=True,
    )
    policy = RaiseDamping()
    fit(model, [policy, Spoil([2])])
    assert len(policy.returns) == 1
    assert inner.statistics["damping"] == pytest.approx(1.0)
    assert np.all(np.isfinite(weights(model)[0]))


@pytest.mark.slow
def test_on_replicas(mirrored_strategy):
    """Sums over replicas are put back as well."""
    with mirrored_strategy.scope():
        model = compiled(
            optimizer=kng.KFAC(damping=0.1),
            run_eagerly=False,
            jit_compile=False,
        )
    policy, seen = RaiseDamping(keep_every=2), Seen()
    fit(model, [policy, Spoil([3]), seen], batches=4)
    assert policy.returns == [(4, 2)]
    # Weights, and the averages of the factors.
    names = [f"{v.path}" for v in model.optimizer.variables]
    factors = [
        len(model.weights) + i for i, n in enumerate(names) if "factor" in n
    ]
    assert factors
    for index in [*range(len(model.weights)), *factors]:
        np.testing.assert_allclose(
            seen.states[3][index], seen.states[1][index], rtol=1e-6
        )


# -- Arguments -------------------------------------------------------------


def test_can_be_copied():
    policy = RaiseDamping(3.0, 4, 5, 6)
    assert vars(copy.deepcopy(policy)) == vars(policy)


@pytest.mark.parametrize(
    "arguments",
    [
        {"factor": 1.0},
        {"factor": "2"},
        {"keep_every": 0},
        {"patience": 0},
        {"patience": True},
        {"tolerance": -1},
    ],
)
def test_refused_arguments(arguments):
    (name,) = arguments
    with pytest.raises(ValueError, match=f"Received: {name}="):
        RaiseDamping(**arguments)


def test_refused_optimizers():
    x, y = data()
    model = mlp()
    model.compile("sgd", loss=cross_entropy())
    with pytest.raises(ValueError, match="keras_natgrad.KFAC"):
        model.fit(x, y, callbacks=[RaiseDamping()], **FIT)
    with pytest.raises(ValueError, match="damping=0.0"):
        compiled(optimizer=kng.RNGD()).fit(
            x, y, callbacks=[RaiseDamping()], **FIT
        )
