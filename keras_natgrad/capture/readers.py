"""Layers whose features are the inputs of the model, in the user's units."""

from __future__ import annotations

import keras

from keras_natgrad._compat import LayerGraph, layer_graph

# Layers after which a feature is still one feature of the input; by name, as
# tf_keras, which need not be installed, has them too.
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
    """Returns the names of a layer's classes that are Keras's or tf_keras's.

    What a user's class does is not known by its name.
    """
    return {
        each.__name__
        for each in type(layer).__mro__
        if each.__module__.partition(".")[0] in ("keras", "tf_keras")
    }
