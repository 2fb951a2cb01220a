import keras
import numpy as np
import pytest

from benchmarks.muon import Muon, matrix_shape

SETTINGS = {
    "learning_rate": 0.1,
    "weight_decay": None,
    "adam_weight_decay": None,
}


def trained(optimizer, shape, name="kernel", steps=3):
    """A variable after some steps along fixed gradients."""
    generator = np.random.default_rng(0)
    variable = keras.Variable(generator.normal(size=60).reshape(shape))
    variable._path = f"layer/{name}"
    optimizer.build([variable])
    for _ in range(steps):
        gradient = generator.normal(size=60).reshape(shape)
        optimizer.apply([keras.ops.convert_to_tensor(gradient)])
    return variable.numpy().reshape(-1)


@pytest.mark.parametrize(
    ("shape", "matrix"),
    [
        ((3, 3, 16, 32), (144, 32)),
        ((1, 1, 16, 32), (16, 32)),
        ((64, 4, 16), (64, 64)),
        ((4, 16, 64), (64, 64)),
        ((65, 10), (65, 10)),
    ],
)
def test_kernels_are_matrices(shape, matrix):
    assert matrix_shape(shape) == matrix


@pytest.mark.parametrize("shape", [(2, 2, 3, 5), (12, 5)])
def test_step_is_that_of_the_matrix(float64, shape):
    found = trained(Muon(**SETTINGS), shape)
    expected = trained(keras.optimizers.Muon(**SETTINGS), (12, 5))
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)


def test_excluded_layers_are_left_to_adam(float64):
    own = Muon(exclude_layers=["output"], **SETTINGS)
    found = trained(own, (2, 2, 3, 5), "output")
    keras_own = keras.optimizers.Muon(**SETTINGS)
    expected = trained(keras_own, (2, 2, 3, 5), "output")  # Rank 4: Adam.
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)
    assert not np.allclose(found, trained(Muon(**SETTINGS), (2, 2, 3, 5)))
