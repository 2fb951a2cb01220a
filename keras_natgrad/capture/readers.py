"""Layers whose features are the inputs of the model, in the user's units."""

from __future__ import annotations

import keras

from keras_natgrad._compat import LayerGraph, layer_graph
from keras_natgrad.capture.patterns import class_names

# Layers after which a feature is still one feature of the input; by name, as
# tf_keras has them too.
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
            classes = class_names(layer)
            if "Dense" in classes:
                readers.add(id(layer))
            elif any(name in classes for name in _KEEPING_FEATURES):
                waiting.append(id(layer))
            elif "Model" in classes:
                readers |= readers_of_inputs(layer)
    return readers
