"""Plans: which variables form which layer."""

import json

import keras
import numpy as np
import pytest

from keras_natgrad import capture
from keras_natgrad.capture import Plan, make_plan, match_layers
from tests.reference.bridge import mlp
from tests.reference.unknown import Unknown


def mixed_model():
    return keras.Sequential(
        [
            keras.Input((3,)),
            keras.layers.Dense(4, name="one"),
            Unknown(name="norm"),
            keras.layers.Dense(2, use_bias=False, name="two"),
        ]
    )


def test_layers_and_fallbacks():
    model = mixed_model()
    variables = model.trainable_variables
    plan = make_plan(model, variables)
    assert [layer.path for layer in plan.layers] == [
        layer.path for layer in (model.layers[0], model.layers[2])
    ]
    assert [layer.variables for layer in plan.layers] == [(0, 1), (4,)]
    assert plan.fallback == (2, 3)
    assert all("Unknown" in reason for reason in plan.reasons)


def test_every_variable_is_owned_exactly_once():
    model = mixed_model()
    for order in ([0, 1, 2, 3, 4], [4, 2, 0, 3, 1], [3, 1, 0]):
        variables = [model.trainable_variables[i] for i in order]
        plan = make_plan(model, variables)
        owned = [i for layer in plan.layers for i in layer.variables]
        assert sorted([*owned, *plan.fallback]) == list(range(len(order)))


def test_partly_trained_layer_falls_back():
    """A kernel without its bias is no complete linear map."""
    model = mlp([3, 4, 2])
    variables = model.trainable_variables[1:]
    plan = make_plan(model, variables)
    assert [layer.variables for layer in plan.layers] == [(1, 2)]
    assert plan.fallback == (0,)


def test_frozen_layer_is_left_out():
    model = mlp([3, 4, 2])
    model.layers[0].trainable = False
    plan = make_plan(model, model.trainable_variables)
    assert [layer.variables for layer in plan.layers] == [(0, 1)]
    assert plan.fallback == ()


def test_config_round_trip_through_json():
    model = mixed_model()
    plan = make_plan(model, model.trainable_variables)
    config = json.loads(json.dumps(plan.get_config()))
    assert Plan.from_config(config) == plan


def test_match_layers():
    model = mixed_model()
    plan = make_plan(model, model.trainable_variables)
    found = match_layers(plan, model, model.trainable_variables)
    assert found == [(model.layers[0], 0), (model.layers[2], 0)]


def test_match_layers_of_another_model():
    model, other = mixed_model(), mlp([3, 4, 2])
    plan = make_plan(model, model.trainable_variables)
    with pytest.raises(ValueError, match="does not have the layers"):
        match_layers(plan, other, other.trainable_variables)


def test_registration_of_a_layer(monkeypatch, assert_captures, float64):
    registry = capture.registry
    monkeypatch.setattr(registry, "_LAYERS", dict(registry._LAYERS))

    class Doubling(keras.layers.Layer):
        """`2 x W`, no activation."""

        bias = None

        def build(self, shape):
            self.w = self.add_weight(shape=(shape[-1], 2))
            self.built = True

        def call(self, inputs):
            return 2.0 * inputs @ self.w

    layer = Doubling()
    x = np.random.default_rng(0).normal(size=(4, 3))
    layer(x)
    assert capture.linear_maps(layer) == ()

    @capture.register_layer(Doubling)
    def describe(layer):
        return capture.LinearMap(
            variables=(layer.w,),
            layout=capture.ParameterLayout.of_matrix(3, 2, bias=False),
            inputs=lambda x: 2.0 * x[:, None],
            cotangents=lambda g: g[:, None],
        )

    assert_captures(layer, [layer], x)


def test_only_layer_classes_can_be_registered():
    with pytest.raises(ValueError, match="takes a keras.layers.Layer subclass"):
        capture.register_layer(int)


@pytest.mark.parametrize(
    "exclude", [["one"], ["on*"], ["sequential/one"], ["*/one"]]
)
def test_excluded_layers(exclude):
    model = mixed_model()
    model.layers[0]._path = "sequential/one"
    plan = make_plan(model, model.trainable_variables, exclude)
    assert [layer.variables for layer in plan.layers] == [(4,)]
    assert plan.reasons[:2] == ("Dense: excluded",) * 2


def test_excluded_class():
    model = mixed_model()
    variables = model.trainable_variables
    assert make_plan(model, variables, [keras.layers.Dense]).layers == ()
    assert make_plan(model, variables, ["*"]).layers == ()
    assert len(make_plan(model, variables, ["norm"]).layers) == 2


def test_exclude_that_matches_nothing():
    model = mixed_model()
    with pytest.raises(ValueError, match=r"one \(Dense\).*\['three'\]"):
        make_plan(model, model.trainable_variables, ["one", "three"])


def test_special_computations_are_named():
    model = mlp([3, 4, 2])
    model.layers[0].enable_lora(2)
    model.layers[1].quantize("int8")
    plan = make_plan(model, model.trainable_variables)
    assert plan.layers == ()
    assert set(plan.reasons) == {
        "Dense: LoRA enabled",
        "Dense: quantised to int8",
    }
