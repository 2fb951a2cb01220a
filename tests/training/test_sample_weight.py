"""Weights of examples: in the gradient and in the Fisher."""

import numpy as np
import pytest

import keras_natgrad as kng
from tests.training.networks import (
    assert_close,
    compiled,
    cross_entropy,
    data,
    state,
    weights,
)


def run(loss, steps=4, **arguments):
    # The exact Fisher draws no numbers that depend on the batch size.
    optimizer = kng.KFAC(fisher="exact")
    model = compiled(optimizer=optimizer, loss=loss)
    for _ in range(steps):
        model.train_on_batch(**arguments)
    return model


@pytest.mark.variants("sum")
@pytest.mark.parametrize(
    "reduction", ["sum", "mean_with_sample_weight", "sum_over_batch_size"]
)
def test_weight_zero_is_leaving_out(float64, reduction):
    """The last reduction divides by all examples: a change of scale only."""
    x, y = data()
    loss = cross_entropy(reduction=reduction)
    weight = np.ones(24)
    weight[5:12] = 0.0
    kept = weight > 0
    left = run(loss, x=x, y=y, sample_weight=weight)
    right = run(loss, x=x[kept], y=y[kept])
    assert_close(
        weights(left),
        weights(right),
        1e-7,
        1e-10,
    )
    if reduction != "sum_over_batch_size":
        assert_close(state(left), state(right), 1e-7, 1e-10)


def test_class_weight_zero_is_leaving_out(float64):
    x, y = data()
    loss = cross_entropy(reduction="sum")
    kept = y != 1
    left = run(loss, x=x, y=y, class_weight={0: 1.0, 1: 0.0, 2: 1.0})
    right = run(loss, x=x[kept], y=y[kept])
    assert_close(state(left), state(right), 1e-7, 1e-10)


def test_weight_two_is_repeating(float64):
    x, y = data(12)
    loss = cross_entropy(reduction="sum")
    weight = np.where(np.arange(12) < 4, 2.0, 1.0)
    rows = np.concatenate([np.arange(12), np.arange(4)])
    left = run(loss, x=x, y=y, sample_weight=weight)
    right = run(loss, x=x[rows], y=y[rows])
    assert_close(state(left), state(right), 1e-7, 1e-10)


def test_weights_through_fit(float64):
    x, y = data()
    class_weight = {0: 1.0, 1: 2.0, 2: 0.5}
    weight = np.array([class_weight[label] for label in y])
    left, right = compiled(), compiled()
    arguments = {"batch_size": 8, "shuffle": False, "verbose": 0}
    left.fit(x, y, class_weight=class_weight, **arguments)
    right.fit(x, y, sample_weight=weight, **arguments)
    assert_close(state(left), state(right))


@pytest.mark.parametrize("first", [True, False])
def test_a_batch_without_any_weight_changes_nothing(first):
    x, y = data()
    model = compiled()
    if not first:
        model.train_on_batch(x, y)
    before = weights(model)
    model.train_on_batch(x, y, sample_weight=np.zeros(24))
    if first:
        assert_close(weights(model), before)
    losses = [float(model.train_on_batch(x, y)) for _ in range(6)]
    assert np.all(np.isfinite(losses))
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.variants("True-False")
@pytest.mark.parametrize("column", [False, True])
@pytest.mark.parametrize("eager", [True, False])
def test_an_ignored_class_is_absent(eager, column, float64):
    """Labels that the loss ignores are none of the head's."""
    x, y = data()
    kept = np.arange(24) % 3 > 0
    partial = np.where(kept, y, -1)
    if column:
        partial = partial[:, None]
    found = []
    for loss, rows, labels in (
        (cross_entropy(ignore_class=-1), slice(None), partial),
        (cross_entropy(), kept, y[kept]),
    ):
        optimizer = kng.KFAC(
            learning_rate=0.1, momentum=0.0, damping=0.1, fisher="exact"
        )
        model = compiled(None, optimizer, loss, run_eagerly=eager)
        for _ in range(3):
            model.train_on_batch(x[rows], labels)
        assert optimizer.statistics["skipped"] == 0
        found.append(weights(model))
    assert_close(*found, 1e-8, 1e-10)
