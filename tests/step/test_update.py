"""The update of one variable."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_natgrad.step.update import apply_update

WEIGHT, VELOCITY, DIRECTION = (
    np.random.default_rng(seed).normal(size=(3, 2)) for seed in range(3)
)
RATE, MOMENTUM = 0.25, 0.5


def variable(value, dtype):
    return keras.Variable(value, dtype=dtype)


def apply(weight, velocity, dtype, mode):
    def call(direction):
        apply_update(
            weight,
            velocity,
            direction,
            tf.constant(RATE, dtype),
            tf.constant(MOMENTUM, dtype),
        )

    if mode != "eager":
        call = tf.function(call, jit_compile=mode == "xla")
    call(tf.constant(DIRECTION, dtype))


@pytest.mark.parametrize("mode", ["eager", "graph", "xla"])
@pytest.mark.parametrize(
    ("dtype", "state", "rtol"),
    [
        ("float64", "float64", 1e-14),
        ("float32", "float32", 1e-6),
        ("bfloat16", "float32", 2e-2),
        ("float32", "float64", 1e-6),
    ],
)
def test_moves_by_direction_and_velocity(dtype, state, rtol, mode):
    weight, velocity = variable(WEIGHT, dtype), variable(VELOCITY, state)
    apply(weight, velocity, state, mode)
    update = -RATE * DIRECTION + MOMENTUM * VELOCITY
    state_rtol = 1e-14 if state == "float64" else 1e-6
    np.testing.assert_allclose(
        np.asarray(velocity, float), update, rtol=state_rtol, atol=1e-7
    )
    found = keras.ops.convert_to_numpy(keras.ops.cast(weight, "float64"))
    np.testing.assert_allclose(found, WEIGHT + update, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("mode", ["eager", "graph", "xla"])
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_without_velocity(dtype, mode):
    weight = variable(WEIGHT, dtype)
    apply(weight, None, "float64" if dtype == "float64" else "float32", mode)
    found = keras.ops.convert_to_numpy(keras.ops.cast(weight, "float64"))
    rtol = {"float64": 1e-14, "float32": 1e-6, "bfloat16": 2e-2}[dtype]
    np.testing.assert_allclose(
        found, WEIGHT - RATE * DIRECTION, rtol=rtol, atol=rtol
    )
