"""A saved state is loaded as a whole, or refused in one sentence."""

import keras
import numpy as np
import pytest

import keras_natgrad as kng
from keras_natgrad.optimizers.saved_state import check_saved
from tests.training.networks import compiled, data


def test_a_state_that_fits_and_two_that_do_not():
    variables = [keras.Variable(np.zeros((2, 3)), name="factor")]
    check_saved("KFAC", {"0": np.zeros((2, 3))}, variables)
    with pytest.raises(ValueError, match=r"'factor' has the shape \(2, 3\)"):
        check_saved("KFAC", {"0": np.zeros((3, 3))}, variables)
    with pytest.raises(ValueError, match="2 variables, not 1.*compile=False"):
        check_saved("KFAC", {"0": np.zeros(1), "1": np.zeros(1)}, variables)


def test_an_optimizer_refuses_the_state_of_other_settings():
    x, y = data()
    models = [compiled(optimizer=kng.KFAC(momentum=m)) for m in ("auto", 0.0)]
    for model in models:
        model.train_on_batch(x, y)
    store = {}
    models[0].optimizer.save_own_variables(store)
    before = [v.numpy() for v in models[1].optimizer.variables]
    with pytest.raises(ValueError, match="does not fit this KFAC"):
        models[1].optimizer.load_own_variables(store)
    after = [v.numpy() for v in models[1].optimizer.variables]
    for a, b in zip(after, before, strict=True):
        np.testing.assert_array_equal(a, b)
