import math

import pytest

from benchmarks.methods import Method, learning_rates
from benchmarks.tuning import PATIENCE, Tuner


class Model:
    """Falls faster with a larger learning rate, diverges from 1 on.

    Under a cosine it falls half as fast again, but only above a horizon.
    """

    def __init__(self, setting, shortest, log):
        self.setting = setting
        self.limit = setting.horizon
        self.speed = setting.learning_rate
        if setting.horizon:
            self.speed *= 1.5 if setting.horizon > shortest else 0.1
        self.step = 0
        log.append(self)

    def advance(self, steps):
        self.step += steps
        return 0.0

    def evaluate(self):
        if self.setting.learning_rate >= 1 and self.step > 20:
            return math.nan
        return 100 - self.speed * self.step

    def close(self):
        self.closed = True


def tune(rates, max_steps=5000, shortest=0):
    runs = []
    tuner = Tuner(lambda s: Model(s, shortest, runs), 50.0, 10, max_steps)
    tuner.tune(rates)
    assert all(run.closed for run in runs)
    return tuner, runs


def test_the_fewest_steps_win():
    tuner, runs = tune([0.01, 0.02, 0.08, 0.1, 2.0])
    assert tuner.best.setting.learning_rate == 0.1
    # 500 steps at a constant rate, hence a horizon of 375, which takes 333
    # steps, hence one of 250, which is too short, and finally one of 333.
    assert tuner.best.setting.horizon == 380
    assert tuner.best.steps == pytest.approx(50 / 0.15)
    cosines = [(r.setting.learning_rate, r.limit) for r in runs if r.limit]
    assert cosines == [
        (rate, horizon) for horizon in (380, 250, 330) for rate in (0.08, 0.1)
    ]


def test_a_cosine_that_is_too_short_is_made_longer_once():
    tuner, runs = tune([0.08, 0.1], shortest=400)
    assert [r.limit for r in runs] == [None, None, 380, 380, 500, 500]
    assert tuner.best.setting.horizon == 500


def test_no_point_outlasts_the_best_and_poor_ones_are_given_up():
    _, runs = tune([0.01, 0.02, 0.08, 0.1, 2.0])
    steps = {r.setting.learning_rate: r.step for r in runs if not r.limit}
    assert steps[0.1] == steps[0.08] == 500
    assert steps[0.01] == steps[0.02] == 10 * PATIENCE
    assert steps[2.0] == 30


def test_without_any_success_the_budget_bounds_every_point():
    tuner, runs = tune([0.001], max_steps=200)
    assert tuner.best is None
    assert [run.limit for run in runs] == [None, 150, 200]
    assert [run.step for run in runs] == [200, 150, 200]


def test_grids():
    for name in ("sgd", "adam", "muon"):
        assert len(learning_rates(Method.parse(name), 1.0)) >= 5
    mean, total = (
        learning_rates(Method.parse("sgd"), scale) for scale in (0.01, 1.0)
    )
    assert mean == pytest.approx([100 * rate for rate in total])
