"""Configuration: round trips, and what it holds."""

import json

import keras
import pytest

import keras_natgrad as kng
from tests.training.networks import (
    assert_equal,
    compiled,
    data,
    mlp,
    state,
)

DAMPINGS = {
    "auto": "auto",
    "zero": 0.0,
    "float": 0.3,
    "schedule": keras.optimizers.schedules.ExponentialDecay(1.0, 10, 0.9),
    "rule": kng.LevenbergMarquardt(initial=0.2, decay=0.9, period=3),
}


def round_trip(optimizer):
    config = keras.optimizers.serialize(optimizer)
    config = json.loads(json.dumps(config))
    return keras.optimizers.deserialize(config)


@pytest.mark.parametrize("name", DAMPINGS)
def test_damping(name):
    optimizer = kng.KFAC(damping=DAMPINGS[name])
    restored = round_trip(optimizer)
    assert type(restored) is kng.KFAC
    assert restored.get_config() == optimizer.get_config()
    if name != "schedule":
        assert restored.damping == optimizer.damping


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"learning_rate": 0.25, "momentum": 0.9},
        {"learning_rate": "auto", "momentum": "auto"},
        {"learning_rate": 0.25, "momentum": kng.Spring(0.7)},
        {
            "learning_rate": keras.optimizers.schedules.ExponentialDecay(
                1.0, 10, 0.9
            )
        },
        {"fisher": "exact", "factor_decay": 0.8, "seed": 5},
        {"curvature_update_period": 3, "inverse_update_period": 7},
        {"norm_constraint": 0.01, "log_statistics": True},
        {"block": "diagonal", "fallback": "first_order"},
        {"block": {"dense*": "full"}, "fallback": "kronecker"},
        {"weight_sharing": "reduce", "max_factor_size": 100},
        {"clipnorm": 1.0, "weight_decay": 0.1, "name": "mine"},
        {"use_ema": True, "ema_overwrite_frequency": 2},
        {"loss_scale_factor": 2.0, "gradient_accumulation_steps": 4},
    ],
)
def test_arguments(kwargs):
    optimizer = kng.KFAC(**kwargs)
    config = optimizer.get_config()
    for key, value in kwargs.items():
        if isinstance(value, (int, float, str)):
            assert config[key] == value
    assert round_trip(optimizer).get_config() == config


def test_learning_rate_changed_by_a_callback_is_kept():
    optimizer = kng.KFAC(learning_rate=0.5)
    optimizer.learning_rate = 0.125
    assert round_trip(optimizer).get_config()["learning_rate"] == 0.125


def test_registered_name():
    config = keras.optimizers.serialize(kng.KFAC())
    assert config["registered_name"] == "keras_natgrad>KFAC"


def test_state_comes_from_plan_and_variables_alone():
    """Keras builds the optimizer on load before any model is attached."""
    x, y = data()
    model = compiled()
    model.train_on_batch(x, y)
    restored = round_trip(model.optimizer)
    restored.build(mlp().trainable_variables)
    assert [tuple(v.shape) for v in restored.variables] == [
        tuple(v.shape) for v in model.optimizer.variables
    ]


def test_get_config_does_not_change_with_training():
    x, y = data()
    model = compiled()
    model.train_on_batch(x, y)
    before = model.optimizer.get_config()
    model.train_on_batch(x, y)
    assert model.optimizer.get_config() == before


@pytest.mark.variants("auto")
@pytest.mark.parametrize("name", DAMPINGS)
def test_restored_optimizer_continues(name, float64):
    """Config and variables are all there is."""
    x, y = data()
    damping = DAMPINGS[name] or 1e-3
    model = compiled(optimizer=kng.KFAC(damping=damping))
    for _ in range(3):
        model.train_on_batch(x, y)
    copy = mlp()
    copy.set_weights(model.get_weights())
    restored = round_trip(model.optimizer)
    restored.build(copy.trainable_variables)
    for new, old in zip(
        restored.variables, model.optimizer.variables, strict=True
    ):
        new.assign(old)
    compiled(copy, restored)
    for _ in range(3):
        model.train_on_batch(x, y)
        copy.train_on_batch(x, y)
    assert_equal(state(copy), state(model))
