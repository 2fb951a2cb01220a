"""What the robustness benchmark varies, and how it compares."""

import numpy as np
import pytest

pytest.importorskip("sklearn")

from benchmarks.robustness import FACTOR, ratios, variations
from keras_natgrad import LevenbergMarquardt


@pytest.fixture(scope="module")
def varied():
    return variations("diabetes", None)


def test_default_has_no_arguments(varied):
    task, method = varied["default"]
    assert dict(method.options) == {}
    assert task.loss_weight is None


@pytest.mark.parametrize(
    "label, factor", [("too high", FACTOR), ("too low", 1 / FACTOR)]
)
def test_damping_alone_differs(varied, label, factor):
    task, method = varied[f"damping started 1000 times {label}"]
    damping = method.options["damping"]
    usual = LevenbergMarquardt()
    assert damping.relative == pytest.approx(factor * usual.relative)
    assert damping.decay == usual.decay
    assert task is varied["default"][0]


def test_loss_alone_is_scaled(varied):
    task, method = varied["loss times 1000"]
    assert task.loss_weight == FACTOR
    assert dict(method.options) == {}
    np.testing.assert_array_equal(task.train[0], varied["default"][0].train[0])


def test_features_spread_in_training_and_evaluation(varied):
    task, method = varied["features spread over 10³"]
    usual = varied["default"][0]
    assert dict(method.options) == {}
    for ours, theirs in (
        (task.train, usual.train),
        (task.evaluation, usual.evaluation),
    ):
        spread = np.std(ours[0], axis=0) / np.std(theirs[0], axis=0)
        assert spread.max() / spread.min() == pytest.approx(1e3, rel=1e-4)
        np.testing.assert_array_equal(ours[1], theirs[1])


def test_ratio_of_means_and_a_missed_target():
    seeds = [
        {"default": {"steps": 10.0}, "other": {"steps": 30.0}},
        {"default": {"steps": 30.0}, "other": {"steps": 50.0}},
    ]
    assert ratios(seeds, "steps") == {"default": 1.0, "other": 2.0}
    seeds[1]["other"]["steps"] = None
    assert ratios(seeds, "steps") == {"default": 1.0, "other": None}
