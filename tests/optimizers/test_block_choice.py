"""Blocks and weight sharing by pattern, and the table of what came of it."""

import json
import re

import keras
import pytest

import keras_natgrad as kng
from keras_natgrad.capture.positions import shared_positions
from tests.reference.unknown import Unknown
from tests.training.networks import assert_equal, compiled, data, mlp, state

layers = keras.layers


def network():
    """Attention between two dense layers, one of them by position."""
    source = keras.Input((3, 4))
    x = layers.Dense(4, "tanh", name="first")(source)
    x = layers.MultiHeadAttention(1, 2, name="attention")(x, x)
    x = layers.GlobalAveragePooling1D()(x)
    return keras.Model(source, layers.Dense(3, name="last")(x))


def built(model=None, **kwargs):
    model = network() if model is None else model
    optimizer = kng.KFAC(**kwargs).attach(model)
    optimizer.build(model.trainable_variables)
    return model, optimizer


def kinds_of(optimizer):
    return {
        entry.layer.path.split("/")[-1]: entry.block.kind
        for entry in optimizer.curvature.captured
    }


ATTENTION = ("query", "key", "value", "attention_output")
CHOICES = {
    "name": ({"last": "full"}, {"last": "full"}),
    "glob": ({"*st": "diagonal"}, {"first": "diagonal", "last": "diagonal"}),
    "path": (
        {"*attention/*": "diagonal"},
        dict.fromkeys(ATTENTION, "diagonal"),
    ),
    "class": (
        {layers.EinsumDense: "diagonal"},
        dict.fromkeys(ATTENTION, "diagonal"),
    ),
    "first match": (
        {"query": "full", "EinsumDense": "diagonal", "*": "identity"},
        {
            **dict.fromkeys(ATTENTION, "diagonal"),
            "query": "full",
            **dict.fromkeys(("first", "last"), "identity"),
        },
    ),
}


@pytest.mark.parametrize("name", CHOICES)
def test_block_by_pattern(name):
    block, expected = CHOICES[name]
    _, optimizer = built(block=block)
    default = dict.fromkeys(("last", *ATTENTION), "kronecker")
    default["first"] = "feature_scaled"  # It reads the model's inputs.
    assert kinds_of(optimizer) == {**default, **expected}


def test_weight_sharing_by_pattern():
    _, optimizer = built(weight_sharing={layers.Dense: "reduce"})
    found = {
        entry.layer.path.split("/")[-1]: entry.block.weight_sharing.value
        for entry in optimizer.curvature.captured
    }
    assert found == {
        **dict.fromkeys(ATTENTION, "expand"),
        **dict.fromkeys(("first", "last"), "reduce"),
    }


def test_class_stands_for_its_subclasses():
    class Special(layers.Dense):
        pass

    model = keras.Sequential([keras.Input((4,)), Special(2), layers.Dense(2)])
    for pattern in (Special, "Special"):
        _, optimizer = built(model, block={pattern: "full"})
        assert list(kinds_of(optimizer).values()) == ["full", "kronecker"]
    _, optimizer = built(model, block={layers.Dense: "full"})
    assert list(kinds_of(optimizer).values()) == ["full", "full"]


def test_own_block_of_a_layer_unless_a_pattern_says_otherwise(monkeypatch):
    class Own(layers.Dense):
        pass

    registry = kng.capture.registry
    monkeypatch.setattr(registry, "_LAYERS", dict(registry._LAYERS))

    @kng.register_layer(Own)
    def describe(layer):
        return kng.capture.LinearMap(
            variables=(layer.kernel,),
            layout=kng.capture.ParameterLayout.of_matrix(4, 2, bias=False),
            inputs=lambda x: x[:, None],
            cotangents=lambda g: g[:, None],
            block="full",
        )

    def model():
        return keras.Sequential(
            [
                keras.Input((4,)),
                Own(2, use_bias=False, name="own"),
                layers.Dense(3, name="last"),
            ]
        )

    for block, expected in [
        ("kronecker", "full"),
        ("kfac", "full"),
        ("eigen", "full"),
        ("ekfac", "full"),
        ({"last": "diagonal"}, "full"),
        ({"own": "kronecker"}, "kronecker"),
        ("diagonal", "diagonal"),
    ]:
        _, optimizer = built(model(), block=block)
        assert kinds_of(optimizer)["own"] == expected


@pytest.mark.parametrize("argument", ["block", "weight_sharing"])
def test_pattern_that_matches_nothing(argument):
    value = "full" if argument == "block" else "reduce"
    with pytest.raises(ValueError) as error:
        built(**{argument: {"last": value, "convv*": value}})
    message = str(error.value)
    assert f"`{argument}`" in message and "['convv*']" in message
    assert "first (Dense)" in message and "(EinsumDense)" in message


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"block": {"last": "lattice"}}, "'lattice'"),
        ({"block": {3: "full"}}, "block with 3"),
        ({"weight_sharing": {"last": "sum"}}, "weight_sharing='sum'"),
    ],
)
def test_bad_choices(kwargs, message):
    with pytest.raises(ValueError) as error:
        kng.KFAC(**kwargs)
    assert message in str(error.value)


@pytest.mark.parametrize("exclude", ["last", layers.Dense, [3]])
def test_bad_exclude(exclude):
    with pytest.raises(ValueError, match="exclude"):
        kng.KFAC().attach(network(), exclude=exclude)


@pytest.mark.filterwarnings("ignore:These variables")
def test_exclude_by_glob_and_class():
    model = network()
    optimizer = kng.KFAC().attach(model, exclude=["*/attention/*", "first"])
    optimizer.build(model.trainable_variables)
    assert list(kinds_of(optimizer)) == ["last"]
    model = network()
    optimizer = kng.KFAC().attach(model, exclude=[layers.Dense])
    optimizer.build(model.trainable_variables)
    assert set(kinds_of(optimizer)) == set(ATTENTION)


def test_config_alone_gives_the_same_blocks():
    """No model is attached to the copy; classes went by name."""
    choices = {layers.EinsumDense: "diagonal", "last": "full"}
    model, optimizer = built(block=choices, weight_sharing={"first": "reduce"})
    config = json.loads(json.dumps(optimizer.get_config()))
    assert config["block"] == {"EinsumDense": "diagonal", "last": "full"}
    copy = kng.KFAC.from_config(config)
    assert copy.get_config() == optimizer.get_config()
    copy.build(network().trainable_variables)
    assert kinds_of(copy) == kinds_of(optimizer)
    assert [tuple(v.shape) for v in copy.variables] == [
        tuple(v.shape) for v in optimizer.variables
    ]
    sharing = copy.curvature.captured[0].block.weight_sharing
    assert sharing.value == "reduce"


def test_saved_model_continues(tmp_path):
    x, y = data()
    optimizer = kng.KFAC(block={layers.Dense: "full", "*": "diagonal"})
    model = compiled(mlp(), optimizer)
    model.train_on_batch(x, y)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.optimizer.get_config() == optimizer.get_config()
    loaded.optimizer.attach(loaded)
    loaded.run_eagerly = True
    for each in (model, loaded):
        each.train_on_batch(x, y)
    assert_equal(state(loaded), state(model))


# -- The table ------------------------------------------------------------


def table(model, **kwargs):
    """The rows, with continued lines joined, and all lines."""
    optimizer = kng.KFAC(**kwargs).attach(model)
    texts = []
    optimizer.summary(print_fn=texts.append)
    lines = texts[0].rstrip().split("\n")
    rows = []
    for line in lines:
        cells = [cell.strip() for cell in re.split("│", line)[1:-1]]
        if cells and not cells[1]:
            pairs = zip(rows[-1], cells, strict=True)
            rows[-1] = [f"{a} {b}".strip() for a, b in pairs]
        elif cells:
            rows.append(cells)
    return rows, lines


@pytest.mark.filterwarnings("ignore:These variables")
def test_table():
    model = keras.Sequential(
        [
            keras.Input((5, 3)),
            layers.Dense(4, name="first"),
            layers.LSTM(2, name="lstm"),
            layers.Dense(2, name="last"),
        ]
    )
    rows, lines = table(model)
    named = {row[0].split("/")[-1].split(" ")[0]: row for row in rows}
    approximation = "4² ⊗ 4², expand, damped by feature"
    assert named["first"][1:5] == [
        "feature_scaled",
        "4 × 4",
        "5",
        approximation,
    ]
    assert named["last"][3] == "1"
    kernel = next(row for row in rows if row[2] == "4 × 8")
    assert kernel[1] == "gradient_kronecker" and kernel[3] == ""
    assert kernel[4].startswith("4² ⊗ 8²; fallback: weights of a loop: LSTM")
    assert kernel[5] == "640.0 B"
    assert lines[-1] == (
        "Parameters preconditioned: 78 of 78 (100.0%): captured 28.2%, "
        "fallback with curvature 71.8%; first order 0.0%"
    )
    assert len(rows) == 5


@pytest.mark.filterwarnings("ignore:These variables")
def test_share_of_first_order():
    model = keras.Sequential([keras.Input((4,)), Unknown(), layers.Dense(3)])
    _, lines = table(model, fallback="first_order")
    assert lines[-1].startswith("Parameters preconditioned: 15 of 23 (65.2%)")
    assert lines[-1].endswith("first order 34.8%")
    _, lines = table(model, block="identity")
    assert lines[-1].startswith("Parameters preconditioned: 8 of 23")


def test_positions():
    model = network()
    by_name = {layer.name: layer for layer in model.layers}
    assert shared_positions(by_name["first"]) == 3
    assert shared_positions(by_name["last"]) == 1
    assert shared_positions(by_name["attention"].query_dense) == 3
    unknown = layers.Dense(2)
    unknown(keras.Input((None, 3)))
    assert shared_positions(unknown) is None
