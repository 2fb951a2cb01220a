"""Every layer of `keras.applications` that trains is captured."""

import pytest

from benchmarks.models import MODELS, build
from keras_natgrad.capture import make_plan

# One with a scale per channel, one with squeeze and excitation.
QUICK = ("ConvNeXtTiny", "MobileNetV3Small")


@pytest.mark.parametrize(
    "name",
    [
        name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)
        for name in MODELS
    ],
)
def test_nothing_falls_back(name):
    model, _ = build(name)
    plan = make_plan(model, model.trainable_variables)
    assert plan.reasons == ()
    covered = {index for layer in plan.layers for index in layer.variables}
    assert covered == set(range(len(model.trainable_variables)))
