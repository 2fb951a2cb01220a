"""The plan: which variables form which layer, as plain data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import keras

from keras_natgrad._compat import flatten_layers
from keras_natgrad.capture.layout import ParameterLayout
from keras_natgrad.capture.ownership import owners_of_variables, why_not_owned
from keras_natgrad.capture.registry import linear_maps


@dataclass(frozen=True)
class LayerPlan:
    """One captured matrix of a layer; most layers have one.

    Attributes:
        path: The layer's path in the model, unique in the plan.
        layer_class: Name of the layer's class.
        variables: Positions of (kernel[, bias]) in the variable list.
        layout: Their `ParameterLayout`.
        block: Name of the block that suits the layer, or `None`.
    """

    path: str
    layer_class: str
    variables: tuple[int, ...]
    layout: ParameterLayout
    block: str | None = None

    def get_config(self) -> dict[str, Any]:
        """Returns plain data for an optimizer's config."""
        return {
            "path": self.path,
            "layer_class": self.layer_class,
            "variables": list(self.variables),
            "layout": self.layout.get_config(),
            "block": self.block,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> LayerPlan:
        """Recreates the entry from `get_config`."""
        return cls(
            path=config["path"],
            layer_class=config["layer_class"],
            variables=tuple(config["variables"]),
            layout=ParameterLayout.from_config(config["layout"]),
            block=config.get("block"),
        )


@dataclass(frozen=True)
class Plan:
    """All captured layers and the variables that fall back.

    An optimizer's state is creatable from this and the variable list alone,
    so that a saved optimizer can be rebuilt before any model is attached.

    Attributes:
        layers: Captured layers.
        fallback: Positions of variables that no captured layer owns.
        reasons: For each of them, why, in a few words.
    """

    layers: tuple[LayerPlan, ...]
    fallback: tuple[int, ...]
    reasons: tuple[str, ...]

    def only_matrices(self, reason: str) -> Plan:
        """Returns the plan without layers that are more than one matrix.

        Args:
            reason: Why layers with groups, and one-hot inputs, fall back.
        """
        kept = [
            layer
            for layer in self.layers
            if layer.layout.groups is None and not layer.layout.one_hot
        ]
        why = dict(zip(self.fallback, self.reasons, strict=True))
        for layer in self.layers:
            if layer not in kept:
                text = f"{layer.layer_class} variable: {reason}"
                why.update(dict.fromkeys(layer.variables, text))
        fallback = tuple(sorted(why))
        return Plan(tuple(kept), fallback, tuple(why[i] for i in fallback))

    def get_config(self) -> dict[str, Any]:
        """Returns plain data for an optimizer's config."""
        return {
            "layers": [layer.get_config() for layer in self.layers],
            "fallback": list(self.fallback),
            "reasons": list(self.reasons),
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Plan:
        """Recreates the plan from `get_config`."""
        return cls(
            layers=tuple(LayerPlan.from_config(c) for c in config["layers"]),
            fallback=tuple(config["fallback"]),
            reasons=tuple(config["reasons"]),
        )


def make_plan(
    model: keras.Model, variables: Sequence[Any], exclude: Sequence[str] = ()
) -> Plan:
    """Plans the capture of a built model.

    Args:
        model: A built `keras.Model`.
        variables: The variables that the optimizer trains, in its order.
        exclude: Names or paths of layers that are not to be captured.

    Returns:
        The `Plan`. A layer is captured when all variables of its linear map
        are among `variables`; whatever no captured layer owns falls back, as
        does a variable that several layers own.
    """
    positions = {id(variable): i for i, variable in enumerate(variables)}
    layers: list[LayerPlan] = []
    owners = owners_of_variables(model)
    for layer in flatten_layers(model):
        if layer.name in exclude or layer.path in exclude:
            continue
        for spec in linear_maps(layer):
            found = tuple(positions.get(id(v), -1) for v in spec.variables)
            if min(found) < 0:  # Frozen, or trained by another optimizer.
                continue
            if any(len(owners.get(id(v), ())) > 1 for v in spec.variables):
                continue
            layers.append(
                LayerPlan(
                    path=layer.path,
                    layer_class=type(layer).__name__,
                    variables=found,
                    layout=spec.layout,
                    block=spec.block,
                )
            )
    owned = {i for layer in layers for i in layer.variables}
    fallback = tuple(i for i in range(len(variables)) if i not in owned)
    reasons = tuple(
        why_not_owned(owners.get(id(variables[i]), [])) for i in fallback
    )
    return Plan(tuple(layers), fallback, reasons)


def match_layers(
    plan: Plan, model: keras.Model, variables: Sequence[Any]
) -> list[tuple[keras.layers.Layer, int]]:
    """Returns the model's layer, and which of its maps, for each entry.

    Args:
        plan: A `Plan`, possibly from a saved config.
        model: The attached model.
        variables: The optimizer's variables.

    Raises:
        ValueError: If the model does not have these layers.
    """
    positions = {id(variable): i for i, variable in enumerate(variables)}
    by_variables = {}
    for layer in flatten_layers(model):
        for index, spec in enumerate(linear_maps(layer)):
            key = tuple(positions.get(id(v), -1) for v in spec.variables)
            by_variables[key] = (layer, index)
    try:
        return [by_variables[entry.variables] for entry in plan.layers]
    except KeyError:
        raise ValueError(
            "The attached model does not have the layers that this optimizer "
            "was built for. Create a new optimizer for a new model, or attach "
            "the model it was saved with. Received: model="
            f"{model.name!r}, expected layers "
            f"{[entry.path for entry in plan.layers]}"
        ) from None
