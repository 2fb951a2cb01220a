"""The graph of layers: what follows a layer, and what reads the inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import keras

from keras_natgrad._compat import LayerGraph, layer_graph
from keras_natgrad.capture.registry import applies_matrix

#: Layers that are an activation of each example alone.
ACTIVATION_LAYERS = (
    keras.layers.Activation,
    keras.layers.ELU,
    keras.layers.LeakyReLU,
    keras.layers.PReLU,
    keras.layers.ReLU,
    keras.layers.Softmax,
)
# Layers without weights that do not mix examples and may come in between.
_PASSING = (
    keras.layers.Dropout,
    keras.layers.Flatten,
    keras.layers.GaussianDropout,
    keras.layers.GaussianNoise,
    keras.layers.Identity,
    keras.layers.Reshape,
)


@dataclass(frozen=True)
class Following:
    """What follows one layer.

    Attributes:
        activation: The first operation on the pre-activation: a function, an
            activation layer, or `keras.activations.linear`.
        layer: The next dense layer, or `None`.
        is_output: Whether the model's output comes next.
        obstacle: Why neither comes next, in words.
    """

    activation: Any
    layer: Any = None
    is_output: bool = False
    obstacle: str = ""


def find_following(
    model: keras.Model, layers: list[keras.layers.Layer]
) -> list[Following]:
    """Returns what follows each of some layers of a model.

    A separate activation layer counts as the activation of the layer before it.
    Only sequential and functional models say how their layers are connected; in
    other models, and in models inside models, only the layer's own activation
    is known.

    Args:
        model: A built model.
        layers: Layers of the model.
    """
    graph = layer_graph(model)
    return [_follow(layer, graph) for layer in layers]


def _follow(layer: Any, graph: LayerGraph | None) -> Following:
    linear = keras.activations.linear
    activation = getattr(layer, "activation", None) or linear
    if graph is None:
        return Following(
            activation,
            obstacle="the model is neither sequential nor functional",
        )
    current = layer
    while True:
        found = graph.consumers.get(id(current), [])
        is_output = id(current) in graph.outputs
        if is_output and not found:
            return Following(activation, is_output=True)
        if not found:
            return Following(activation, obstacle="it is inside another model")
        if is_output or len(found) > 1:
            places = len(found) + is_output
            reason = f"the output of {current.name!r} goes to {places} places"
            return Following(activation, obstacle=reason)
        current = found[0]
        if isinstance(current, ACTIVATION_LAYERS):
            if activation is linear:
                activation = current
        elif _is_dense(current):
            return Following(activation, current)
        elif not isinstance(current, _PASSING):
            kind = type(current).__name__
            reason = f"{current.name!r} ({kind}) comes next, no Dense layer"
            return Following(activation, obstacle=reason)


def _is_dense(layer: Any) -> bool:
    if not isinstance(layer, keras.layers.Dense):
        return False
    return applies_matrix(layer)


# Layers after which a feature is still one feature of the input. They are given
# by name, because tf_keras has them too and need not be installed.
_KEEPING_FEATURES = (
    "Concatenate",
    "Dropout",
    "Flatten",
    "GaussianDropout",
    "GaussianNoise",
    "Identity",
    "Permute",
    "Rescaling",
    "Reshape",
)


def readers_of_inputs(model: keras.Model) -> set[int]:
    """Returns the `id`s of the dense layers that read a model's inputs.

    Only sequential and functional models say how their layers are connected.

    Args:
        model: A built model.
    """
    graph = layer_graph(model)
    if graph is None:
        return set()
    readers: set[int] = set()
    for source in graph.inputs:
        readers |= _readers_of(source, graph)
    return readers


def _readers_of(source: int, graph: LayerGraph) -> set[int]:
    readers: set[int] = set()
    seen = {source}
    waiting = [source]
    while waiting:
        for layer in graph.consumers.get(waiting.pop(), []):
            if id(layer) in seen:
                continue
            seen.add(id(layer))
            classes = _library_classes(layer)
            if "Dense" in classes:
                readers.add(id(layer))
            elif any(name in classes for name in _KEEPING_FEATURES):
                waiting.append(id(layer))
            elif "Model" in classes:
                readers |= readers_of_inputs(layer)
    return readers


def _library_classes(layer: keras.layers.Layer) -> set[str]:
    """Returns the names of those of a layer's classes that are part of Keras.

    The name of a user's class does not tell what it does.
    """
    return {
        each.__name__
        for each in type(layer).__mro__
        if each.__module__.partition(".")[0] in ("keras", "tf_keras")
    }
