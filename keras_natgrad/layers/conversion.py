"""Models with whitened layers, and back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras

from keras_natgrad._compat import flatten_layers
from keras_natgrad.layers.whitened_dense import WhitenedDense


def whitened(
    model: keras.Model, layers: Sequence[str] | None = None
) -> keras.Model:
    """Returns a copy of a model with `WhitenedDense` for `Dense` layers.

    It computes the same, until it is trained.

    Args:
        model: A built sequential or functional model.
        layers: Names of the layers to replace. Defaults to all `Dense` ones.

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
        plain = type(layer) is keras.layers.Dense
        wanted = plain if layers is None else layer.name in layers
        return WhitenedDense.from_dense(layer) if wanted else None

    return _copy(model, replace)


def canonical(model: keras.Model) -> keras.Model:
    """Returns a copy of a model with `Dense` for `WhitenedDense` layers.

    Args:
        model: A built sequential or functional model.

    Returns:
        A new model, not compiled, that computes the same and is made of
        Keras's own layers.

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
            layer.to_dense() if isinstance(layer, WhitenedDense) else None
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
                "Only built sequential and functional models can be copied; "
                "write WhitenedDense into others. Received: "
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
        if isinstance(old, WhitenedDense) and not isinstance(
            new, WhitenedDense
        ):
            weights = old.canonical_weights()
        if isinstance(new, WhitenedDense) and type(old) is keras.layers.Dense:
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
