"""Converts models to whitened layers, and back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras

from keras_natgrad._compat import flatten_layers
from keras_natgrad.layers.whitened_conv import (
    WhitenedConv1D,
    WhitenedConv2D,
    WhitenedConv3D,
)
from keras_natgrad.layers.whitened_dense import WhitenedDense
from keras_natgrad.layers.whitened_layer import WhitenedLayer

# The whitened form of each plain layer.
_FORMS: dict[type[keras.layers.Layer], type[WhitenedLayer]] = {
    form.plain_class: form
    for form in (WhitenedDense, WhitenedConv1D, WhitenedConv2D, WhitenedConv3D)
}


def whitened(
    model: keras.Model, layers: Sequence[str] | None = None
) -> keras.Model:
    """Returns a copy of a model whose layers have whitened inputs.

    `Dense`, `Conv1D`, `Conv2D` and `Conv3D` become `WhitenedDense`,
    `WhitenedConv1D` and so on. It computes the same, until it is trained.

    Args:
        model: A built sequential or functional model.
        layers: Names of the layers to replace. Defaults to all of these
            classes.

    Returns:
        A new model, not compiled.

    Raises:
        ValueError: If the model cannot be copied, or one of the layers cannot
            be replaced.

    Example:

    ```python
    model = keras_natgrad.layers.whitened(model)
    ```
    """
    names = {layer.name for layer in flatten_layers(model)}
    unknown = [name for name in layers or () if name not in names]
    if unknown:
        raise ValueError(
            f"The model {model.name!r} has no layers of these names. "
            f"Received: layers={unknown}, expected some of {sorted(names)}"
        )

    def replace(layer: Any) -> Any:
        form = _FORMS.get(type(layer))
        if layers is not None and layer.name not in layers:
            return None
        if form is None and layers is not None:
            names = ", ".join(plain.__name__ for plain in _FORMS)
            raise ValueError(
                f"Only layers of the classes {names} can be whitened. "
                f"Received: layer {layer.name!r} of type {type(layer).__name__}"
            )
        return None if form is None else form.from_plain(layer)

    return _copy(model, replace)


def canonical(model: keras.Model) -> keras.Model:
    """Returns a copy of a model with plain layers for whitened ones.

    Args:
        model: A built sequential or functional model.

    Returns:
        A new model, not compiled, that computes the same with layers of Keras.

    Raises:
        ValueError: If the model cannot be copied.

    Example:

    ```python
    keras_natgrad.layers.canonical(model).save("model.keras")
    ```
    """
    return _copy(
        model,
        lambda layer: (
            layer.to_plain() if isinstance(layer, WhitenedLayer) else None
        ),
    )


def _copy(
    model: keras.Model, replace: Callable[[Any], Any | None]
) -> keras.Model:
    """Returns a clone with some layers replaced, and the same weights."""
    for each in _models(model):
        kinds = (keras.Sequential, keras.Function)
        if not isinstance(each, kinds) or not each.built:
            raise ValueError(
                "Only built sequential and functional models can be copied; in "
                "others, use whitened layers directly. Received: "
                f"model={each.name!r} of type {type(each).__name__}, "
                f"built={each.built}"
            )

    def clone(layer: Any) -> Any:
        new = replace(layer)
        return (
            type(layer).from_config(layer.get_config()) if new is None else new
        )

    copy = keras.models.clone_model(model, clone_function=clone, recursive=True)
    for old, new in _pairs(model, copy):
        weights = old.get_weights()
        before, after = (isinstance(each, WhitenedLayer) for each in (old, new))
        if before and not after:
            weights = old.canonical_weights()
        if after and not before:
            new.set_canonical_weights(weights)
        else:
            new.set_weights(weights)
    return copy


def _models(model: keras.Model) -> Iterator[keras.Model]:
    yield model
    for layer in model.layers:
        if isinstance(layer, keras.Model):
            yield from _models(layer)


def _pairs(old: keras.Model, new: keras.Model) -> Iterator[tuple[Any, Any]]:
    for left, right in zip(old.layers, new.layers, strict=True):
        if isinstance(left, keras.Model):
            yield from _pairs(left, right)
        else:
            yield left, right
