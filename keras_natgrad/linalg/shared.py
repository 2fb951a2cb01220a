"""Functions that a graph holds once, however many layers call them."""

from __future__ import annotations

from collections.abc import Callable

import tensorflow as tf


def held_once(
    name: str, function: Callable[[tf.Tensor], tf.Tensor]
) -> Callable[[tf.Tensor], tf.Tensor]:
    """Returns the function such that a graph holds it once per signature.

    It is traced for the first argument of each shape and dtype, and called for
    those that follow. Eagerly it is the function itself.

    Args:
        name: Says what the function does, with all settings that it closes
            over: functions of one name are taken for the same.
        function: Takes one tensor, and closes over no tensors.
    """
    if tf.executing_eagerly():
        return function
    graph = tf.compat.v1.get_default_graph()
    held = graph.get_collection_ref(f"keras_natgrad/{name}")
    if not held:
        held.append(tf.function(function, autograph=False))
    found: Callable[[tf.Tensor], tf.Tensor] = held[0]
    return found
