import keras
import pytest

from keras_natgrad import solvers


@pytest.mark.parametrize("name", ["kernel", "dense", "cg"])
def test_names(name):
    assert solvers.get(name).kind == name


def test_auto_is_chosen_later():
    assert solvers.get("auto") is None


def test_config_round_trip():
    solver = solvers.ConjugateGradient(7, 0.0, 0.5)
    config = keras.saving.serialize_keras_object(solver)
    assert solvers.get(config) == solver


def test_choice_by_size():
    assert solvers.choose(100, 1000, 2**28).kind == "dense"
    assert solvers.choose(1000, 100, 2**28).kind == "kernel"
    assert solvers.choose(10**7, 10**6, 2**28).kind == "cg"
    assert solvers.choose(10**7, None, 2**28).kind == "kernel"


def test_memory_bound_names_size_and_alternatives():
    with pytest.raises(ValueError, match=r"kernel.*2,000,000.*solver='cg'"):
        solvers.check_memory(solvers.Kernel(), 10**6, 1000, 10**6)


def test_unknown_solver():
    with pytest.raises(ValueError, match="Received: solver='lu'"):
        solvers.get("lu")
