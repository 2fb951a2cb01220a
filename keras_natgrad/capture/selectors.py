"""Patterns that choose layers: names, paths, globs and classes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple, TypeVar

import keras

from keras_natgrad._compat import is_layer_class

Value = TypeVar("Value")


class LayerLabel(NamedTuple):
    """What a pattern can match; plain data.

    Attributes:
        path: The layer's path in the model; its last part is the name.
        classes: Names of its class and of the bases of its class.
    """

    path: str
    classes: tuple[str, ...]

    @classmethod
    def of(cls, layer: keras.layers.Layer) -> LayerLabel:
        """Returns the label of a layer."""
        return cls(layer_path(layer), class_names(layer))


def layer_path(layer: keras.layers.Layer) -> str:
    """Returns the path of a layer, or its name if it has no path."""
    return str(getattr(layer, "path", None) or layer.name)


def class_names(layer: keras.layers.Layer) -> tuple[str, ...]:
    """Returns the names of a layer's class and of its bases, in order."""
    return tuple(
        each.__name__ for each in type(layer).__mro__ if is_layer_class(each)
    )


def pattern_name(pattern: Any, argument: str) -> str:
    """Returns a pattern as plain data: a layer class by its name.

    Args:
        pattern: A string, or a `keras.layers.Layer` class.
        argument: Name of the argument, for the error.

    Raises:
        ValueError: If it is neither.
    """
    if isinstance(pattern, str):
        return pattern
    if is_layer_class(pattern):
        return pattern.__name__
    raise ValueError(
        f"A pattern of `{argument}` is a layer name, a path, a glob or a "
        f"layer class. Received: {argument} with {pattern!r}"
    )


def matches(pattern: str, label: LayerLabel) -> bool:
    """Returns whether a pattern matches a layer.

    It does if it is the name of the layer's class or of a base class, or a glob
    that matches the layer's name or path. A `*` also matches slashes, and `*/`
    also matches the beginning of a path.
    """
    path = label.path
    texts = (path, f"/{path}", path.rsplit("/", 1)[-1])
    return pattern in label.classes or any(
        text == pattern or fnmatchcase(text, pattern) for text in texts
    )


def first_match(
    choices: Mapping[str, Value], label: LayerLabel
) -> Value | None:
    """Returns the value of the first pattern that matches, or `None`."""
    for pattern, value in choices.items():
        if matches(pattern, label):
            return value
    return None


def check_patterns(
    patterns: Iterable[str], labels: Sequence[LayerLabel], argument: str
) -> None:
    """Raises ValueError if a pattern matches none of the layers."""
    unused = [
        pattern
        for pattern in patterns
        if not any(matches(pattern, label) for label in labels)
    ]
    if unused:
        names = [f"{label.path} ({label.classes[0]})" for label in labels]
        raise ValueError(
            f"Patterns of `{argument}` that match no layer. Layers: "
            f"{', '.join(names)}. Received: {argument} with {unused}"
        )
