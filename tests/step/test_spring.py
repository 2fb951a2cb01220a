import keras
import pytest

from keras_natgrad.step import Spring


@pytest.mark.parametrize("momentum", [0.0, 1.0, -0.5, True, "auto", None])
def test_momentum_out_of_range(momentum):
    with pytest.raises(ValueError, match=f"momentum={momentum!r}"):
        Spring(momentum)


def test_survives_saving():
    rule = Spring(0.7)
    config = keras.saving.serialize_keras_object(rule)
    assert keras.saving.deserialize_keras_object(config) == rule
