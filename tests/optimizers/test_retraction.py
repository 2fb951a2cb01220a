"""A step that made the loss explode is taken back."""

import numpy as np
import pytest
import tensorflow as tf

import keras_natgrad as kng
from tests.training.networks import (
    assert_close,
    compiled,
    cross_entropy,
    data,
    weights,
)

RATE = 0.1


def exploded(mode, **kwargs):
    """A model after a step with an absurd learning rate.

    Returns:
        The model, its batch, the weights before that step, and the statistics
        after it.
    """
    x, y = data()
    settings = dict(
        momentum=0.5,
        # Not so high that the adaptation divides it by ten.
        damping=kng.LevenbergMarquardt(initial=0.01),
        # No refresh is due by itself after the first one.
        inverse_update_period=1000,
        refresh_growth=None,
    )
    optimizer = kng.KFAC(RATE, **{**settings, **kwargs})
    model = compiled(optimizer=optimizer, **mode)
    for _ in range(3):
        model.train_on_batch(x, y)
    before = weights(model)
    optimizer.learning_rate = 1e4
    model.train_on_batch(x, y)
    optimizer.learning_rate = RATE
    return model, (x, y), before, optimizer.statistics


def velocities(optimizer):
    found = [v for v in optimizer.variables if v.name.endswith("velocity")]
    assert found
    return [v.numpy() for v in found]


@pytest.mark.variants("eager")
@pytest.mark.parametrize(
    "mode",
    [
        {"run_eagerly": True},
        {"run_eagerly": False, "jit_compile": False},
        {"run_eagerly": False, "jit_compile": True},
    ],
    ids=["eager", "graph", "xla"],
)
def test_exploding_step_is_taken_back(mode, float64):
    model, batch, before, exploding = exploded(mode)
    assert exploding["retracted"] == exploding["skipped"] == 0
    assert exploding["refreshes"] == 1
    surged = model.evaluate(*batch, verbose=0)

    model.train_on_batch(*batch)

    found = model.optimizer.statistics
    assert found["retracted"] == 1
    # A step taken back is not a batch with bad data.
    assert found["skipped"] == 0
    assert found["refreshes"] == 1
    assert found["damping"] == pytest.approx(10 * exploding["damping"])
    for velocity in velocities(model.optimizer):
        np.testing.assert_array_equal(velocity, np.zeros_like(velocity))
    # The step was some thousands of units long: rounding is relative to that.
    assert_close(weights(model), before, rtol=0.0, atol=1e-10)
    assert model.evaluate(*batch, verbose=0) < 0.1 * surged

    refreshes = []
    for _ in range(2):
        model.train_on_batch(*batch)
        refreshes.append(model.optimizer.statistics["refreshes"])
    assert refreshes == [2, 2]
    assert model.optimizer.statistics["retracted"] == 1


def test_damping_rises_faster_after_surges_in_a_row(float64):
    model, batch, _, _ = exploded({"run_eagerly": True})
    optimizer = model.optimizer
    factors = []
    for rate in (1e8, 1e10, 1e12, RATE, RATE):
        damping = optimizer.statistics["damping"]
        model.train_on_batch(*batch)  # Takes the last step back.
        factors.append(optimizer.statistics["damping"] / damping)
        optimizer.learning_rate = rate
        model.train_on_batch(*batch)
    found = optimizer.statistics
    assert found["retracted"] == 4
    np.testing.assert_allclose(factors[:4], [10, 100, 1000, 1000], rtol=1e-6)
    # The fifth held: the next surge counts as the first again.
    optimizer.learning_rate = 1e12
    model.train_on_batch(*batch)
    damping = optimizer.statistics["damping"]
    model.train_on_batch(*batch)
    assert optimizer.statistics["retracted"] == 5
    assert optimizer.statistics["damping"] == pytest.approx(10 * damping)


def test_inverses_are_refreshed_before_the_next_step(float64):
    """That step is `−α P∇` with the new inverses and without momentum."""
    model, batch, _, _ = exploded({"run_eagerly": True})
    model.train_on_batch(*batch)
    x, y = batch
    with tf.GradientTape() as tape:
        loss = cross_entropy()(y, model(x))
    gradients = tape.gradient(loss, [v.value for v in model.trainable_weights])
    curvature = model.optimizer.curvature

    def step():
        solved = curvature.precondition(curvature.to_matrices(gradients))
        return [-RATE * d.numpy() for d in curvature.from_matrices(solved)]

    before, stale = weights(model), step()
    model.train_on_batch(*batch)
    moved = [a - b for a, b in zip(weights(model), before, strict=True)]

    assert_close(moved, step(), rtol=1e-9, atol=1e-14)
    # With the old damping the inverses would have led much further.
    assert np.linalg.norm(moved[0]) < 0.5 * np.linalg.norm(stale[0])


def test_constant_damping_takes_nothing_back(float64):
    """It could not be raised to make the next step a better one."""
    model, batch, _, _ = exploded({"run_eagerly": True}, damping=0.1)
    after = weights(model)
    model.train_on_batch(*batch)
    assert model.optimizer.statistics["retracted"] == 0
    assert any(
        np.any(a != b) for a, b in zip(weights(model), after, strict=True)
    )


def test_a_hard_batch_is_not_taken_for_a_bad_step():
    """Its loss was as high before the step: nothing is taken back."""
    x, y = data()
    model = compiled(optimizer=kng.KFAC())
    for _ in range(8):
        model.train_on_batch(x, y)
    # Labels that the model has learned to be wrong.
    hard = (y + 1) % 3
    loss = tf.constant(model.evaluate(x, hard, verbose=0))
    engine = model.optimizer.engine
    assert bool(engine.guard.is_surge(engine.losses, loss))
    damping = model.optimizer.statistics["damping"]
    model.train_on_batch(x, hard)
    found = model.optimizer.statistics
    assert found["retracted"] == found["skipped"] == 0
    assert found["damping"] <= 2 * damping
