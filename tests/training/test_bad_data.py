"""Batches that cannot be learned from."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_natgrad as kng
from tests.training.networks import (
    FEATURES,
    assert_equal,
    compiled,
    data,
    mlp,
    state,
    weights,
)


def regression(**kwargs):
    return compiled(loss="mse", **kwargs)


@pytest.mark.variants("True-nan")
@pytest.mark.parametrize(
    ("run_eagerly", "value"),
    [(True, np.nan), (True, np.inf), (False, np.nan)],
)
def test_a_batch_that_is_not_finite_is_skipped(run_eagerly, value):
    x, y = data()
    bad = x.copy()
    bad[3, 1] = value
    model = compiled(run_eagerly=run_eagerly)
    optimizer = model.optimizer
    model.train_on_batch(x, y)
    before = weights(model), optimizer.statistics
    model.train_on_batch(bad, y)
    after = optimizer.statistics
    assert_equal(weights(model), before[0])
    assert after["skipped"] == before[1]["skipped"] + 1
    assert after["curvature_updates"] == before[1]["curvature_updates"]
    model.reset_metrics()
    losses = [float(model.train_on_batch(x, y)) for _ in range(4)]
    assert np.all(np.isfinite(losses)) and losses[-1] < losses[0]
    assert optimizer.statistics["skipped"] == 1
    assert all(np.all(np.isfinite(each)) for each in state(model))


def test_a_loss_that_is_not_finite_with_finite_gradients():
    """It must not reach the averages of the surge guard."""
    x, y = data()
    model = compiled()
    model.train_on_batch(x, y)
    before, optimizer = weights(model), model.optimizer
    with kng.CurvatureTape(optimizer) as tape:
        outputs = model(x, training=True)
        tape.observe(
            kng.training.terms.mean_terms(outputs, kng.heads.Categorical())
        )
        loss = model.compute_loss(x, y, outputs) + tf.constant(np.inf)
    gradients = tape.gradient(loss, model.trainable_variables)
    assert all(np.all(np.isfinite(each)) for each in gradients)
    optimizer.apply(gradients, model.trainable_variables)
    assert_equal(weights(model), before)
    assert optimizer.statistics["skipped"] == 1
    assert all(np.all(np.isfinite(each)) for each in state(model))


def test_a_bad_first_batch():
    x, y = data()
    model = compiled()
    before = weights(model)
    model.train_on_batch(np.full_like(x, np.nan), y)
    assert_equal(weights(model), before)
    model.reset_metrics()
    losses = [float(model.train_on_batch(x, y)) for _ in range(6)]
    assert losses[-1] < 0.7 * losses[0]
    assert model.optimizer.statistics["skipped"] == 1


def test_a_bad_batch_with_weight_decay():
    """Decoupled decay is part of the step, so it is skipped as well."""
    x, y = data()
    model = compiled(optimizer=kng.KFAC(weight_decay=0.1))
    model.train_on_batch(x, y)
    before = weights(model)
    model.train_on_batch(np.full_like(x, np.nan), y)
    assert_equal(weights(model), before)


@pytest.mark.variants("0")
@pytest.mark.parametrize("position", [0, 1])
def test_a_bad_batch_among_accumulated_ones(position):
    x, y = data()
    model = compiled(optimizer=kng.KFAC(gradient_accumulation_steps=2))
    for _ in range(2):
        model.train_on_batch(x, y)
    before = weights(model)
    for step in range(2):
        bad = np.full_like(x, np.nan) if step == position else x
        model.train_on_batch(bad, y)
    assert_equal(weights(model), before)
    assert model.optimizer.statistics["skipped"] == 1
    model.reset_metrics()
    losses = [float(model.train_on_batch(x, y)) for _ in range(8)]
    assert np.all(np.isfinite(losses)) and losses[-1] < losses[0]


@pytest.mark.slow
def test_nan_targets_in_a_graph():
    x, _ = data()
    y = x[:, :3].copy()
    model = regression(run_eagerly=False)
    model.train_on_batch(x, y)
    before = weights(model)
    bad = y.copy()
    bad[0, 0] = np.nan
    model.train_on_batch(x, bad)
    assert_equal(weights(model), before)
    assert model.optimizer.statistics["skipped"] == 1


def test_every_bad_batch_of_an_epoch_is_counted():
    x, y = data(32)
    x[8:16] = np.nan
    x[24:] = np.inf
    model = compiled()
    model.fit(x, y, batch_size=8, epochs=2, shuffle=False, verbose=0)
    assert model.optimizer.statistics["skipped"] == 4
    assert model.optimizer.statistics["batches"] == 8
    assert all(np.all(np.isfinite(each)) for each in weights(model))


def outside():
    """Targets outside the support of a Bernoulli variable."""
    x, _ = data()
    y = (x[:, :3] > 0).astype("float32")
    bad = y.copy()
    bad[0, 0] = 1.5
    return x, y, bad


def bernoulli(**kwargs):
    return compiled(
        loss=keras.losses.BinaryCrossentropy(from_logits=True), **kwargs
    )


def test_targets_outside_the_support_raise_eagerly():
    x, _, bad = outside()
    model = bernoulli()
    message = r"The targets for the head Bernoulli.* must be .*maximum 1\.5"
    with pytest.raises(ValueError, match=message):
        model.train_on_batch(x, bad)


@pytest.mark.slow
def test_targets_outside_the_support_are_skipped_in_a_graph():
    x, y, bad = outside()
    model = bernoulli(run_eagerly=False)
    model.train_on_batch(x, y)
    before = weights(model)
    model.train_on_batch(x, bad)
    assert_equal(weights(model), before)
    assert model.optimizer.statistics["skipped"] == 1
    model.train_on_batch(x, y)
    assert model.optimizer.statistics["skipped"] == 1


def test_labels_outside_the_classes_raise_eagerly():
    """TensorFlow's own check comes first, and says enough."""
    x, y = data()
    y = y.copy()
    y[0] = 7
    with pytest.raises(tf.errors.InvalidArgumentError, match="valid range"):
        compiled().train_on_batch(x, y)


def test_loss_without_a_head():
    """It trains with a surrogate; one warning says which, and what to do."""
    x, y = data()
    model = compiled(loss=keras.losses.Hinge())
    message = r"'hinge'.*Fisher of Bernoulli.*surrogate.*head="
    with pytest.warns(UserWarning, match=message):
        losses = [model.train_on_batch(x, np.eye(3)[y]) for _ in range(10)]
    assert losses[-1] < 0.5 * losses[0]


def test_loss_without_a_head_and_a_head_given():
    x, _ = data()
    model = mlp()
    optimizer = kng.KFAC().attach(model, head=kng.heads.Normal())
    model.compile(optimizer, loss=keras.losses.LogCosh(), run_eagerly=True)
    losses = [float(model.train_on_batch(x, x[:, :3])) for _ in range(10)]
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("given", [True, False])
def test_head_that_does_not_fit_the_output(given):
    x, y = data()
    model = keras.Sequential([keras.Input((FEATURES,)), keras.layers.Dense(1)])
    head = kng.heads.Categorical() if given else None
    optimizer = kng.KFAC().attach(model, head=head)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss="mse" if given else loss, run_eagerly=True)
    with pytest.raises(ValueError, match="at least two"):
        model.train_on_batch(x, np.zeros((24, 1)))


@pytest.mark.variants("2-nan")
@pytest.mark.parametrize("kind", ["nan", "weightless"])
@pytest.mark.parametrize("count", [2, 40])
def test_many_bad_batches_in_a_row(kind, count):
    """The last step is taken back once; the damping does not run away."""
    x, y = data()
    model = compiled()
    optimizer = model.optimizer
    for _ in range(6):
        model.train_on_batch(x, y)
    before = optimizer.statistics
    bad = np.full_like(x, np.nan) if kind == "nan" else x
    for _ in range(count):
        model.train_on_batch(bad, y, sample_weight=np.zeros(len(x)))
    after = optimizer.statistics
    taken_back = kind == "nan"
    assert after["retracted"] == taken_back
    assert after["skipped"] == (count - 1 if taken_back else 0)
    factor = 10 if taken_back else 1
    assert after["damping"] == pytest.approx(factor * before["damping"])
    for _ in range(10):
        model.train_on_batch(x, y)
    good = compiled()
    for _ in range(10):
        good.train_on_batch(x, y)
    losses = [each.evaluate(x, y, verbose=0) for each in (model, good)]
    assert losses[0] < 2 * losses[1]


def test_a_good_batch_between_bad_ones():
    """The damping stays finite where every step is taken back."""
    x, y = data()
    model = compiled()
    for _ in range(14):
        model.train_on_batch(x, y)
        for _ in range(2):
            model.train_on_batch(np.full_like(x, np.nan), y)
    assert model.optimizer.statistics["retracted"] > 10
    for _ in range(40):
        model.train_on_batch(x, y)
    assert all(np.all(np.isfinite(each)) for each in state(model))
    first = compiled().evaluate(x, y, verbose=0)
    assert model.evaluate(x, y, verbose=0) < 0.5 * first


@pytest.mark.variants("True")
@pytest.mark.parametrize("run_eagerly", [True, False])
def test_an_empty_batch(run_eagerly):
    x, y = data()
    model = compiled(run_eagerly=run_eagerly)
    model.train_on_batch(x, y)
    before = weights(model)
    model.train_on_batch(x[:0], y[:0])
    assert_equal(weights(model), before)
    model.train_on_batch(x, y)
    assert all(np.all(np.isfinite(each)) for each in state(model))
