"""Two replicas of a `MirroredStrategy` are one device with the whole batch."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_natgrad as kng
from tests.training.networks import assert_close, cross_entropy, data, weights

FIT = {"batch_size": 16, "shuffle": False, "verbose": 0}

# Without random numbers: those of two replicas differ from those of one.
OPTIMIZERS = {
    "kfac": lambda: kng.KFAC(fisher="exact", quadratic_model="exact"),
    "fixed": lambda: kng.KFAC(
        0.05, 0.9, 0.1, fisher="exact", weight_decay=1e-3
    ),
    "full": lambda: kng.KFAC(0.05, 0.9, 0.1, block="full", fisher="exact"),
    "spring": lambda: kng.KFAC(
        0.05, kng.Spring(0.9), 0.1, fisher="empirical", fallback="plain"
    ),
    "rngd": lambda: kng.RNGD(0.05, relative_damping=0.1),
    "rngd_identity": lambda: kng.RNGD(0.01, identity_start=True, ends="inputs"),
    "prong": kng.PRONG,
}


def network():
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [
            keras.Input((4,)),
            keras.layers.Dense(6, "tanh"),
            keras.layers.Dense(5, "tanh", kernel_regularizer="l2"),
            keras.layers.Dense(3),
        ]
    )


def train(make, epochs=9, sample_weight=None, **kwargs):
    """Trains for six steps per epoch; returns the model."""
    x, y = data(96)
    model = network()
    model.compile(make().attach(model), cross_entropy(), **kwargs)
    model.fit(x, y, sample_weight=sample_weight, epochs=epochs, **FIT)
    return model


@pytest.mark.variants("kfac")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_two_replicas_equal_one(name, mirrored_strategy):
    one = train(OPTIMIZERS[name])
    with mirrored_strategy.scope():
        two = train(OPTIMIZERS[name])
    assert one.optimizer.statistics["refreshes"] > 10
    for count in ("batches", "curvature_updates", "refreshes", "retracted"):
        left, right = one.optimizer.statistics, two.optimizer.statistics
        assert left[count] == right[count]
    assert_close(weights(two), weights(one), 1e-5, 1e-5)
    for variable in two.trainable_variables:
        first, second = variable.value.values
        np.testing.assert_array_equal(first.numpy(), second.numpy())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["kfac", "rngd", "prong"])
def test_halves_of_unequal_weight(name, mirrored_strategy):
    """Every example counts as it does on one device."""
    weight = np.tile(np.linspace(0.0, 2.0, 16), 6)
    one = train(OPTIMIZERS[name], 2, weight)
    with mirrored_strategy.scope():
        two = train(OPTIMIZERS[name], 2, weight)
    assert_close(weights(two), weights(one), 1e-5, 1e-5)


@pytest.mark.slow
def test_rates_by_layer_where_replicas_have_unequal_parts(mirrored_strategy):
    """A last batch of five: three and two examples, and one step for all."""
    x, y = data(37)
    with mirrored_strategy.scope():
        model = network()
        model.compile(kng.KFAC().attach(model), cross_entropy())
    model.fit(x, y, epochs=3, **FIT)
    assert model.optimizer.settings.quadratic_model.by_layer
    assert model.optimizer.statistics["skipped"] == 0
    for variable in model.trainable_variables:
        first, second = variable.value.values
        np.testing.assert_array_equal(first.numpy(), second.numpy())


EIGENBASES = {
    "rngd": lambda: kng.RNGD(
        0.05, relative_damping=0.1, max_metric_elements=30, shared="eigen"
    ),
    "ekfac": lambda: kng.KFAC(0.05, 0.9, 0.1, block="ekfac", fisher="exact"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", EIGENBASES)
def test_an_eigenbasis(name, float64, mirrored_strategy):
    """A refresh turns the sums of both replicas into the new basis."""
    make = EIGENBASES[name]
    one = train(make, 3)
    with mirrored_strategy.scope():
        two = train(make, 3)
    assert one.optimizer.statistics["refreshes"] > 5
    assert_close(weights(two), weights(one), 1e-8, 1e-8)


@pytest.mark.slow
def test_default_arguments_learn(mirrored_strategy):
    x, y = data(96)
    with mirrored_strategy.scope():
        model = train(kng.KFAC)
    assert model.evaluate(x, y, verbose=0) < 0.2


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision(policy, mirrored_strategy):
    x, y = data(96)
    with mirrored_strategy.scope():
        keras.config.set_dtype_policy(policy)
        model = train(kng.KFAC)
        keras.config.set_dtype_policy("float32")
    assert model.evaluate(x, y, verbose=0) < 0.3


@pytest.mark.slow
def test_a_bad_batch_on_one_replica_is_skipped_by_both(mirrored_strategy):
    x, y = data(96)
    bad = x.copy()
    bad[15] = np.nan
    with mirrored_strategy.scope():
        model = train(OPTIMIZERS["kfac"], 1)
        before = weights(model)
        # The first of the six batches has the bad example.
        model.fit(bad[:16], y[:16], **FIT)
    assert_close(weights(model), before)
    assert model.optimizer.statistics["skipped"] == 1


@pytest.mark.slow
def test_saved_and_resumed(mirrored_strategy, tmp_path):
    """The sum of the replicas' statistics is saved, for any number of them."""
    x, y = data(96)

    def resume(model):
        model.optimizer.attach(model)
        model.fit(x, y, epochs=2, **FIT)
        return weights(model)

    with mirrored_strategy.scope():
        model = train(OPTIMIZERS["kfac"], 3)
        model.save(tmp_path / "model.keras")
        model.save_weights(tmp_path / "model.weights.h5")
        again = keras.saving.load_model(tmp_path / "model.keras")
        from_weights = train(OPTIMIZERS["kfac"], 1)
        from_weights.load_weights(tmp_path / "model.weights.h5")
        expected = resume(model)
        assert_close(resume(again), expected, 1e-5, 1e-6)
        assert_close(resume(from_weights), expected, 1e-5, 1e-6)
    alone = keras.saving.load_model(tmp_path / "model.keras")
    assert_close(resume(alone), expected, 1e-5, 1e-5)


@pytest.mark.slow
def test_eager(mirrored_strategy):
    one = train(OPTIMIZERS["kfac"], 1, run_eagerly=True)
    with mirrored_strategy.scope():
        two = train(OPTIMIZERS["kfac"], 1, run_eagerly=True)
    assert_close(weights(two), weights(one), 1e-5, 1e-5)


@pytest.mark.slow
def test_a_loss_that_surges_is_taken_back_by_both(mirrored_strategy):
    x, y = data(96)
    with mirrored_strategy.scope():
        model = train(OPTIMIZERS["kfac"], 2)
        before = model.evaluate(x, y, verbose=0)
        # As a step that went far astray leaves them.
        for variable, velocity in zip(
            model.trainable_variables,
            model.optimizer.engine.updates,
            strict=True,
        ):
            step = tf.fill(variable.shape, 5.0)
            velocity.assign(step)
            variable.assign(variable + step)
        model.fit(x[:16], y[:16], **FIT)
        assert model.optimizer.statistics["retracted"] == 1
        np.testing.assert_allclose(
            model.evaluate(x, y, verbose=0), before, rtol=1e-4
        )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (kng.NaturalGradient, "NaturalGradient with an exact solver"),
        (
            lambda: kng.KFAC(kng.LineSearch()),
            "KFAC with a LineSearch does not run on 2 replicas",
        ),
        (
            lambda: kng.KFAC(gradient_accumulation_steps=2),
            "does not support `gradient_accumulation_steps` under a strategy",
        ),
        (
            lambda: kng.RNGD(use_ema=True, ema_overwrite_frequency=2),
            "does not support `ema_overwrite_frequency` under a strategy",
        ),
    ],
)
def test_refusals(make, message, mirrored_strategy):
    with mirrored_strategy.scope(), pytest.raises(ValueError, match=message):
        train(make, 1)


@pytest.mark.slow
def test_custom_loop(mirrored_strategy):
    x, y = data(96)
    head = kng.heads.Categorical()
    with mirrored_strategy.scope():
        model = network()
        optimizer = OPTIMIZERS["kfac"]().attach(model, head=head)
        optimizer.build(model.trainable_variables)

    def replica_step(x, y):
        def objective():
            return tf.reduce_mean(-head.log_prob(model(x), y)) / 2

        with kng.CurvatureTape(optimizer, objective) as tape:
            loss = objective()
        variables = model.trainable_variables
        optimizer.apply(tape.gradient(loss, variables), variables)
        return loss

    @tf.function
    def step(batch):
        losses = mirrored_strategy.run(replica_step, batch)
        return mirrored_strategy.reduce("SUM", losses, axis=None)

    batches = mirrored_strategy.experimental_distribute_dataset(
        tf.data.Dataset.from_tensor_slices((x, y)).batch(96).repeat(10)
    )
    losses = [float(step(batch)) for batch in batches]
    assert losses[-1] < 0.3 * losses[0]
