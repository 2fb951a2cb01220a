"""Metrics of predicted distributions."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from scipy import stats

import keras_natgrad as kng
from keras_natgrad import heads, metrics

HEAD = heads.Normal("exp")


def data(count=4000, spread=1.0):
    rng = np.random.default_rng(0)
    outputs = rng.normal(size=(count, 2)).astype("float32")
    noise = spread * np.exp(outputs[:, 1]) * rng.normal(size=count)
    targets = (outputs[:, 0] + noise)[:, None].astype("float32")
    return outputs, targets


def test_negative_log_likelihood_over_batches():
    outputs, targets = data(30)
    weight = np.random.default_rng(1).uniform(size=30)
    metric = metrics.NegativeLogLikelihood(HEAD)
    for part in (slice(0, 10), slice(10, 30)):
        metric.update_state(targets[part], outputs[part], weight[part])
    density = stats.norm(outputs[:, 0], np.exp(outputs[:, 1]))
    expected = -np.average(density.logpdf(targets[:, 0]), weights=weight)
    np.testing.assert_allclose(metric.result(), expected, rtol=1e-5)


@pytest.mark.parametrize("spread", [0.5, 1.0, 3.0])
def test_calibration_error(spread):
    """Against its definition, and near zero for the truth only."""
    outputs, targets = data(spread=spread)
    metric = metrics.CalibrationError(HEAD, levels=9)
    for part in np.array_split(np.arange(len(targets)), 3):
        metric.update_state(targets[part], outputs[part])
    levels = np.arange(1, 10) / 10
    quantiles = stats.norm.ppf(levels) * np.exp(outputs[:, 1:])
    share = np.mean(targets <= outputs[:, :1] + quantiles, axis=0)
    expected = np.mean(np.abs(share - levels))
    np.testing.assert_allclose(metric.result(), expected, atol=1e-3)
    assert (expected < 0.02) == (spread == 1.0)
    metric.reset_state()
    assert metric.result() == 0.0


def test_weights_of_examples():
    outputs, targets = data(100)
    weighted = metrics.CalibrationError(HEAD)
    weighted.update_state(targets, outputs, np.r_[np.ones(40), np.zeros(60)])
    plain = metrics.CalibrationError(HEAD)
    plain.update_state(targets[:40], outputs[:40])
    np.testing.assert_allclose(weighted.result(), plain.result(), rtol=1e-6)


def test_in_compiled_training_and_saving(tmp_path):
    outputs, targets = data(64)
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)])
    model.compile(
        "sgd",
        kng.losses.NegativeLogLikelihood(HEAD),
        metrics=[
            metrics.NegativeLogLikelihood(HEAD),
            metrics.CalibrationError(HEAD),
        ],
    )
    logs = model.fit(outputs, targets, epochs=1, verbose=0).history
    assert 0 <= logs["calibration_error"][0] <= 0.5
    assert np.isfinite(logs["negative_log_likelihood"][0])
    model.save(tmp_path / "model.keras")
    restored = keras.models.load_model(tmp_path / "model.keras")
    found = restored.evaluate(outputs, targets, verbose=0, return_dict=True)
    expected = model.evaluate(outputs, targets, verbose=0, return_dict=True)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.CalibrationError(heads.Poisson()), "continuous"),
        (lambda: metrics.CalibrationError("categorical"), "continuous"),
        (lambda: metrics.CalibrationError(HEAD, levels=0), "`levels` must be"),
        (
            lambda: metrics.CalibrationError(HEAD, levels=2.5),
            "Received: levels=2.5",
        ),
        (lambda: metrics.CalibrationError(heads.Dirichlet()), "continuous"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_distribution_function():
    outputs, targets = data(5)
    np.testing.assert_allclose(
        HEAD.cdf(tf.constant(outputs), targets)[:, 0],
        stats.norm.cdf(targets[:, 0], outputs[:, 0], np.exp(outputs[:, 1])),
        rtol=1e-4,
    )


@pytest.mark.parametrize("dtype", [None, "float64"])
def test_calibration_error_of_float64_outputs(dtype):
    outputs, targets = data(300)
    plain = metrics.CalibrationError(HEAD)
    plain.update_state(targets, outputs)
    wide = metrics.CalibrationError(HEAD, dtype=dtype)
    wide.update_state(targets.astype(float), outputs.astype(float))
    np.testing.assert_allclose(wide.result(), plain.result(), rtol=1e-5)


def test_calibration_error_of_a_mixture():
    """Of two equal components, which is their normal."""
    outputs, targets = data(300)
    loc, raw = outputs[:, :1], outputs[:, 1:]
    mixture = heads.NormalMixture(2, "exp")
    both = np.hstack([0 * loc, 0 * loc, loc, loc, raw, raw])
    weight = np.random.default_rng(2).uniform(size=300)
    found = metrics.CalibrationError(mixture)
    found.update_state(targets, both, weight)
    expected = metrics.CalibrationError(HEAD)
    expected.update_state(targets, outputs, weight)
    np.testing.assert_allclose(found.result(), expected.result(), rtol=1e-4)


@pytest.mark.parametrize(
    "metric", [metrics.CalibrationError, metrics.NegativeLogLikelihood]
)
def test_wrong_number_of_outputs(metric):
    outputs, targets = np.zeros([4, 3], "float32"), np.zeros([4, 1], "float32")
    with pytest.raises(ValueError, match="takes 2 outputs per unit"):
        metric(HEAD).update_state(targets, outputs)
