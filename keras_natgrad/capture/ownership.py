"""Which layers use which variables."""

from __future__ import annotations

from collections.abc import Sequence

import keras

from keras_natgrad._compat import flatten_layers
from keras_natgrad.capture.registry import (
    linear_maps,
    may_support,
    why_not_captured,
)

# How the reason of a variable ends whose layer nobody described.
_UNDESCRIBED = "variable without a captured linear map"


def owners_of_variables(
    model: keras.Model,
) -> dict[int, list[keras.layers.Layer]]:
    """Returns the layers that use each variable, by its id.

    These are the layers with a map of it, and those that hold it themselves;
    not the layers around them, nor those inside a layer whose map has it.
    """
    mapped: dict[int, list[keras.layers.Layer]] = {}
    held: dict[int, list[keras.layers.Layer]] = {}
    for layer in flatten_layers(model):
        own = {id(v) for spec in linear_maps(layer) for v in spec.variables}
        for key in own:
            mapped.setdefault(key, []).append(layer)
        inner = {
            id(v) for each in flatten_layers(layer) for v in each.variables
        }
        for variable in layer.variables:
            if id(variable) not in inner | own:
                held.setdefault(id(variable), []).append(layer)
    owners = dict(mapped)
    for key, layers in held.items():
        users = mapped.get(key, [])
        inside = {id(each) for user in users for each in flatten_layers(user)}
        others = [layer for layer in layers if id(layer) not in inside]
        owners[key] = [*users, *others]
    return owners


def why_not_owned(owners: Sequence[keras.layers.Layer]) -> str:
    """Returns why a variable falls back, in a few words."""
    if len(owners) > 1:
        names = " and ".join(sorted(layer.name for layer in owners))
        return f"variable shared by the layers {names}"
    if not owners:
        return f"model {_UNDESCRIBED}"
    name = type(owners[0]).__name__
    why = why_not_captured(owners[0])
    if why is not None:
        return f"{name}: {why}"
    if may_support(owners[0]):
        return f"{name}: its settings are not covered"
    return f"{name} {_UNDESCRIBED}"


def can_be_described(reason: str) -> bool:
    """Returns whether describing a layer would capture its variable.

    Args:
        reason: Why the variable falls back.
    """
    return reason.endswith(_UNDESCRIBED) and not reason.startswith("model ")
