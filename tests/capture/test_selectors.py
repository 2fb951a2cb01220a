"""Names, paths, globs and classes as patterns."""

import keras
import pytest

from keras_natgrad.capture.selectors import (
    LayerLabel,
    check_patterns,
    class_names,
    first_match,
    matches,
    pattern_name,
)

QUERY = LayerLabel("net/attention/query", ("EinsumDense", "Layer"))
CONV = LayerLabel("conv2d_1", ("Conv2D", "BaseConv", "Layer"))


@pytest.mark.parametrize(
    ("pattern", "label", "expected"),
    [
        ("query", QUERY, True),
        ("net/attention/query", QUERY, True),
        ("*/attention/*", QUERY, True),
        ("net/*", QUERY, True),
        ("EinsumDense", QUERY, True),
        ("attention", QUERY, False),
        ("quer", QUERY, False),
        ("Einsum", QUERY, False),
        ("conv*", QUERY, False),
        ("conv*", CONV, True),
        ("conv2d_[12]", CONV, True),
        ("*/conv2d_1", CONV, True),
        ("BaseConv", CONV, True),
        ("CONV*", CONV, False),
        ("a[b]", LayerLabel("a[b]", ("Dense",)), True),
    ],
)
def test_matches(pattern, label, expected):
    assert matches(pattern, label) is expected


def test_a_path_that_begins_with_the_container():
    label = LayerLabel("attention/query", ("EinsumDense",))
    assert matches("*/attention/*", label)


def test_first_match_wins():
    choices = {"query": "full", "EinsumDense": "diagonal", "*": "identity"}
    assert first_match(choices, QUERY) == "full"
    assert first_match(choices, CONV) == "identity"
    assert first_match({"dense": "full"}, CONV) is None


def test_classes_go_by_name():
    class Special(keras.layers.Dense):
        pass

    assert pattern_name(keras.layers.Dense, "block") == "Dense"
    assert pattern_name("dense*", "block") == "dense*"
    names = class_names(Special(2))
    assert names[:2] == ("Special", "Dense") and "object" not in names


@pytest.mark.parametrize("pattern", [3, None, int, keras.layers.Dense.call])
def test_no_pattern(pattern):
    with pytest.raises(ValueError, match="A pattern of `block` is"):
        pattern_name(pattern, "block")


def test_unused_patterns_are_named_beside_the_layers():
    check_patterns(["query", "Conv2D"], [QUERY, CONV], "block")
    with pytest.raises(ValueError) as error:
        check_patterns(["query", "convv*"], [QUERY, CONV], "block")
    message = str(error.value)
    assert "conv2d_1 (Conv2D)" in message and "net/attention/query" in message
    assert message.endswith("Received: block with ['convv*']")
