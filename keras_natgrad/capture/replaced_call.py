"""An instance `call` that replaces a layer's own, on one replica at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras

from keras_natgrad.replicas import replica_key


class _CallOfReplica:
    """Calls the replacement that the calling replica has set.

    The replicas of a process share their layers. While one of them waits in the
    middle of a forward pass, e.g. for a synchronised batch normalisation,
    another one begins its own.
    """

    def __init__(self, layer: keras.layers.Layer) -> None:
        self.original = layer.call
        # A `call` that was set on the instance before is restored.
        self.foreign = vars(layer).get("call")
        self.replaced: dict[Any, Callable[..., Any]] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = self.replaced.get(replica_key(), self.original)
        return call(*args, **kwargs)


def replace_call(
    layer: keras.layers.Layer,
    make: Callable[[Callable[..., Any]], Callable[..., Any]],
) -> None:
    """Sets a `call` on a layer instance, on this replica.

    Args:
        layer: A layer or a model.
        make: Function from the layer's own `call` to its replacement.
    """
    current = vars(layer).get("call")
    if not isinstance(current, _CallOfReplica):
        current = _CallOfReplica(layer)
        # Bypasses Keras's attribute tracking: this is not state.
        object.__setattr__(layer, "call", current)
    current.replaced[replica_key()] = make(current.original)


def restore_call(layer: keras.layers.Layer) -> None:
    """Removes the replacement; the last replica restores the layer."""
    current = vars(layer).get("call")
    if not isinstance(current, _CallOfReplica):
        return
    current.replaced.pop(replica_key(), None)
    if current.replaced:
        return
    if current.foreign is None:
        object.__delattr__(layer, "call")
    else:
        object.__setattr__(layer, "call", current.foreign)
