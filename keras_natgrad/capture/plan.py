"""The plan: which variables form which layer, as plain data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import keras

from keras_natgrad._compat import flatten_layers, special_computation
from keras_natgrad.capture.eligibility import (
    embeddings_without_batch,
    owners_of_variables,
    why_not_owned,
)
from keras_natgrad.capture.layout import ParameterLayout
from keras_natgrad.capture.loops import unreachable_layers
from keras_natgrad.capture.registry import linear_maps
from keras_natgrad.capture.selectors import (
    LayerLabel,
    check_patterns,
    class_names,
    layer_path,
    matches,
    pattern_name,
)
from keras_natgrad.capture.topology import readers_of_inputs


@dataclass(frozen=True)
class LayerPlan:
    """One captured matrix of a layer; most layers have one.

    Attributes:
        path: The layer's path in the model, unique in the plan.
        layer_class: Name of the layer's class.
        variables: Positions of (kernel[, bias]) in the variable list.
        layout: Their `ParameterLayout`.
        block: Name of the layer's preferred block, or `None`.
        bases: Names of the bases of the layer's class.
        reads_inputs: Whether its features are inputs of the model.
    """

    path: str
    layer_class: str
    variables: tuple[int, ...]
    layout: ParameterLayout
    block: str | None = None
    bases: tuple[str, ...] = ()
    reads_inputs: bool = False

    @property
    def label(self) -> LayerLabel:
        """The label that patterns are compared with."""
        return LayerLabel(self.path, (self.layer_class, *self.bases))

    def get_config(self) -> dict[str, Any]:
        """Returns plain data for an optimizer's config."""
        return {
            "path": self.path,
            "layer_class": self.layer_class,
            "variables": list(self.variables),
            "layout": self.layout.get_config(),
            "block": self.block,
            "bases": list(self.bases),
            "reads_inputs": self.reads_inputs,
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
            bases=tuple(config.get("bases", ())),
            reads_inputs=config.get("reads_inputs", False),
        )


@dataclass(frozen=True)
class Plan:
    """All captured layers and the variables that fall back.

    An optimizer's state can be created from the plan and the variable list
    alone, so a saved optimizer can be rebuilt before a model is attached.

    Attributes:
        layers: Captured layers.
        fallback: Positions of variables that no captured layer owns.
        reasons: Why each of them falls back, in a few words.
    """

    layers: tuple[LayerPlan, ...]
    fallback: tuple[int, ...]
    reasons: tuple[str, ...]

    def only_matrices(self, reason: str) -> Plan:
        """Returns the plan with plain matrices only.

        Args:
            reason: Why layers with groups or one-hot inputs, and matrices whose
                transposes are used too, fall back.
        """
        return self._without(
            reason,
            lambda layout: (
                layout.groups is not None or layout.one_hot or layout.two_way
            ),
        )

    def only_one_way(self, reason: str) -> Plan:
        """Returns the plan without matrices whose transposes are used too.

        Args:
            reason: Why those fall back.
        """
        return self._without(reason, lambda layout: layout.two_way)

    def _without(
        self, reason: str, dropped: Callable[[ParameterLayout], bool]
    ) -> Plan:
        kept = [layer for layer in self.layers if not dropped(layer.layout)]
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
    model: keras.Model, variables: Sequence[Any], exclude: Sequence[Any] = ()
) -> Plan:
    """Plans the capture of a built model.

    Args:
        model: A built `keras.Model`.
        variables: The variables that the optimizer trains, in its order.
        exclude: Names, paths, globs or classes of layers to leave out.

    Returns:
        The `Plan`. A layer is captured if all variables of its linear map are
        among `variables`. A variable that no captured layer owns falls back, as
        does one that several layers own.

    Raises:
        ValueError: If a pattern of `exclude` matches no layer.
    """
    positions = {id(variable): i for i, variable in enumerate(variables)}
    patterns = [pattern_name(pattern, "exclude") for pattern in exclude]
    found = flatten_layers(model)
    labels = [LayerLabel.of(layer) for layer in found]
    check_patterns(patterns, labels, "exclude")
    unreachable = {
        **embeddings_without_batch(model),
        **unreachable_layers(model),
    }
    readers = readers_of_inputs(model)
    layers: list[LayerPlan] = []
    owners = owners_of_variables(model)
    excluded = {
        id(layer)
        for layer, label in zip(found, labels, strict=True)
        if any(matches(pattern, label) for pattern in patterns)
    }
    for layer in found:
        if id(layer) not in excluded | set(unreachable):
            reads = id(layer) in readers
            layers += _plan_layer(layer, positions, owners, reads)

    def why(users: list[keras.layers.Layer]) -> str:
        if len(users) != 1:
            return why_not_owned(users)
        (layer,) = users
        return _reason(layer, id(layer) in excluded, unreachable.get(id(layer)))

    owned = {i for layer in layers for i in layer.variables}
    fallback = tuple(i for i in range(len(variables)) if i not in owned)
    reasons = tuple(why(owners.get(id(variables[i]), [])) for i in fallback)
    return Plan(tuple(layers), fallback, reasons)


def _plan_layer(
    layer: keras.layers.Layer,
    positions: dict[int, int],
    owners: Mapping[int, Sequence[keras.layers.Layer]],
    reads_inputs: bool,
) -> list[LayerPlan]:
    plans = []
    for spec in linear_maps(layer):
        variables = tuple(positions.get(id(v), -1) for v in spec.variables)
        if min(variables) < 0:  # Frozen, or trained by another optimizer.
            continue
        if any(len(owners.get(id(v), ())) > 1 for v in spec.variables):
            continue
        plans.append(
            LayerPlan(
                path=layer_path(layer),
                layer_class=type(layer).__name__,
                variables=variables,
                layout=spec.layout,
                block=spec.block,
                bases=class_names(layer)[1:],
                reads_inputs=reads_inputs,
            )
        )
    return plans


def _reason(
    layer: keras.layers.Layer, excluded: bool, unreachable: str | None
) -> str:
    """Returns why variables of a layer are not captured, if they are not."""
    name = type(layer).__name__
    if excluded:
        return f"{name}: excluded"
    special = special_computation(layer)
    if special:
        return f"{name}: {special}"
    if unreachable is not None:
        return unreachable
    return why_not_owned([layer])


def match_layers(
    plan: Plan, model: keras.Model, variables: Sequence[Any]
) -> list[tuple[keras.layers.Layer, int]]:
    """Returns the model's layer and the index of its map, for each entry.

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
