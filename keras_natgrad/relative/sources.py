"""What the relative metric of each layer is made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import keras

from keras_natgrad._compat import flatten_layers
from keras_natgrad.capture import applies_matrix
from keras_natgrad.capture.topology import find_following
from keras_natgrad.relative.responses import (
    ResponseOptions,
    UnitResponse,
    find_response,
    response_name,
)

#: Metrics of the first and of the last layer.
END_METRICS = ("metric", "inputs")


@dataclass(frozen=True)
class HorizonOptions:
    """Which response the metric of a layer looks at.

    Attributes:
        horizon: 1 for the layer's own response, 2 for that of the next one,
            and so on; the network's output where it is nearer. `"full"` for
            the output of every layer.
        ends: `"inputs"` gives the first and the last layer the plain second
            moment of their inputs, `"metric"` treats them as the others.
        responses: `ResponseOptions`.
    """

    horizon: int | str = 1
    ends: str = "metric"
    responses: ResponseOptions = field(default_factory=ResponseOptions)

    def __post_init__(self) -> None:
        horizon = self.horizon
        number = isinstance(horizon, int) and not isinstance(horizon, bool)
        if horizon != "full" and not (number and int(horizon) >= 1):
            raise ValueError(
                "`horizon` must be a positive integer or 'full'. "
                f"Received: horizon={horizon!r}"
            )
        if self.ends not in END_METRICS:
            raise ValueError(
                f"`ends` must be one of {END_METRICS}. "
                f"Received: ends={self.ends!r}"
            )


@dataclass(frozen=True)
class Source:
    """What one layer's metric is made of.

    Attributes:
        kind: `"inputs"`, the second moment of the inputs; `"own"`, the
            response of the layer's own independent units; `"layer"`, the
            response of `layer`; `"output"`, the network's output.
        name: The same in words, for the summary.
        response: The response, for `"own"` and `"layer"`.
        layer: The layer that responds, for `"layer"`.
    """

    kind: str
    name: str
    response: Any = None
    layer: Any = None

    @property
    def couples(self) -> bool:
        """Whether the metric may couple the units of the layer."""
        return self.kind in ("layer", "output")

    @property
    def same_for_all_units(self) -> bool:
        """Whether all units have the same metric."""
        return self.kind == "inputs" or (
            self.kind == "own" and self.name == "linear"
        )


def find_sources(
    model: keras.Model,
    layers: Sequence[keras.layers.Layer],
    options: HorizonOptions,
) -> list[Source]:
    """Returns what the metric of each layer is made of.

    Args:
        model: A built model.
        layers: Its captured layers, in order.
        options: `HorizonOptions`.

    Raises:
        ValueError: If the horizon is longer than the network, if what follows
            a layer within the horizon is no Dense layer, or if an activation
            has no information.
    """
    horizon = options.horizon
    depth = sum(applies_matrix(each) for each in flatten_layers(model))
    if layers and isinstance(horizon, int) and horizon > depth:
        raise ValueError(
            f"The horizon of the layer {layers[0].name!r} goes beyond the "
            f"network, which has {depth} layers with a linear map. Use a "
            f"smaller one, or horizon='full'. Received: horizon={horizon}"
        )
    return [
        _find_source(model, layer, options, index in (0, len(layers) - 1))
        for index, layer in enumerate(layers)
    ]


def _find_source(
    model: keras.Model, layer: Any, options: HorizonOptions, at_end: bool
) -> Source:
    (following,) = find_following(model, [layer])
    if options.ends == "inputs" and (at_end or following.is_output):
        return Source("inputs", "inputs alone")
    current, steps = layer, 1
    while options.horizon != "full" and not following.is_output:
        if steps == options.horizon:
            response = find_response(
                following.activation, options.responses, current.name
            )
            name = response_name(response)
            if current is not layer:
                name = f"{name} of {current.name}"
            elif isinstance(response, UnitResponse):
                return Source("own", name, response)
            return Source("layer", name, response, current)
        if following.layer is None:
            raise ValueError(
                f"The metric of the layer {layer.name!r} looks further than "
                f"{current.name!r}, but what follows there is not known: "
                f"{following.obstacle}. Use horizon=1 or horizon='full'. "
                f"Received: horizon={options.horizon}"
            )
        current, steps = following.layer, steps + 1
        (following,) = find_following(model, [current])
    return Source("output", "network output")
