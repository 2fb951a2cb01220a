import keras
import pytest

from keras_natgrad import heads

from .test_base import Exponential


@pytest.mark.parametrize(
    "head",
    [
        heads.Normal(scale=0.3),
        heads.Bernoulli(from_logits=False),
        heads.Categorical(from_logits=False, sparse=False),
        Exponential(),
    ],
)
def test_round_trip(head):
    config = keras.saving.serialize_keras_object(head)
    restored = heads.get(config)
    assert type(restored) is type(head)
    assert restored == head


def test_instance_is_returned():
    head = heads.Normal(scale=0.3)
    assert heads.get(head) is head


@pytest.mark.parametrize(
    ("identifier", "head"),
    [
        ("normal", heads.Normal()),
        ("Bernoulli", heads.Bernoulli()),
        ("categorical", heads.Categorical()),
        ("keras_natgrad>Categorical", heads.Categorical()),
        ("test_heads>Exponential", Exponential()),
        (heads.Bernoulli, heads.Bernoulli()),
    ],
)
def test_names_and_classes(identifier, head):
    assert heads.get(identifier) == head


@pytest.mark.parametrize("identifier", ["gauss", None, 3, keras.losses.Loss])
def test_other_identifiers_are_an_error(identifier):
    message = r"one of the names \['bernoulli', .*'normal', .*\]"
    with pytest.raises(ValueError, match=f"{message}. Received: identifier="):
        heads.get(identifier)


def test_saved_object_that_is_no_head():
    config = keras.saving.serialize_keras_object(keras.losses.Huber())
    with pytest.raises(ValueError, match="Received: identifier="):
        heads.get(config)
