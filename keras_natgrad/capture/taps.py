"""Taps on the layers of one forward pass."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import keras
import tensorflow as tf

from keras_natgrad._compat import is_scratch_graph
from keras_natgrad.capture.registry import LinearMap, linear_map, may_support


class LayerRecord:
    """What one layer did in a forward pass.

    Attributes:
        layer: The layer.
        inputs: Its raw inputs, one per use of the layer.
        lost: Whether it was called, but in a graph of its own, where nothing
            can be sent back to it.
        preactivations: Its pre-activations `z`, one per use.
    """

    def __init__(self, layer: keras.layers.Layer) -> None:
        self.layer = layer
        self.lost = False
        self.inputs: list[tf.Tensor] = []
        self.preactivations: list[tf.Tensor] = []

    @functools.cached_property
    def spec(self) -> LinearMap:
        """The layer's `LinearMap`; the layer has been built by now."""
        spec = linear_map(self.layer)
        assert spec is not None, self.layer.path
        return spec

    def canonical_inputs(self, dtype: Any, batch: tf.Tensor) -> tf.Tensor:
        """Returns `ā`, `[batch, shared, rows]`, homogeneous if biased.

        Several uses of the layer count as more shared positions.
        """
        if not self.inputs:  # The layer took no part in this pass.
            return tf.zeros([batch, 1, self.spec.layout.rows], dtype)
        parts = [tf.cast(self.spec.inputs(a), dtype) for a in self.inputs]
        merged = parts[0] if len(parts) == 1 else tf.concat(parts, axis=1)
        merged = tf.stop_gradient(_unfold(merged, batch))
        if self.spec.layout.bias_shape is None:
            return merged
        ones = tf.ones_like(merged[..., :1])
        return tf.concat([merged, ones], axis=-1)

    def canonical_cotangents(
        self,
        cotangents: Sequence[tf.Tensor | None],
        dtype: Any,
        batch: tf.Tensor,
    ) -> tf.Tensor:
        """Returns `g`, `[batch, shared, columns]`, from one per use."""
        if not self.preactivations:
            return tf.zeros([batch, 1, self.spec.layout.columns], dtype)
        parts = [
            tf.cast(
                self.spec.cotangents(tf.zeros_like(z) if g is None else g),
                dtype,
            )
            for g, z in zip(cotangents, self.preactivations, strict=True)
        ]
        merged = parts[0] if len(parts) == 1 else tf.concat(parts, axis=1)
        return _unfold(merged, batch)


def _unfold(tensor: tf.Tensor, batch: tf.Tensor) -> tf.Tensor:
    """Takes positions out of a batch axis that they were folded into.

    A model may reshape `[batch, T, n]` to `[batch · T, n]` before a layer.
    """
    return tf.reshape(tensor, [batch, -1, tensor.shape[-1]])


class Taps:
    """Context manager that records layers while a model is called.

    For the time of the context each supported layer gets an instance `call`
    that notes its input and its pre-activation, the argument of
    `layer.activation`; leaving the context takes it off again. Nothing is
    kept on the layer, its class or its config.

    A model that is called inside a graph Keras throws away (while building)
    leaves tensors of that graph; only records of the current graph are kept.

    Args:
        layers: The layers to record. Those of unsupported classes are left
            alone; the others may still be unbuilt.

    Example:

    ```python
    with Taps(layers) as taps:
        outputs = model(x)
    taps.record(layer).preactivations
    ```
    """

    def __init__(self, layers: Sequence[keras.layers.Layer]) -> None:
        self._layers = [layer for layer in layers if may_support(layer)]
        self._records: dict[int, LayerRecord] = {}

    def record(self, layer: keras.layers.Layer) -> LayerRecord:
        """Returns what a layer did."""
        return self._records[id(layer)]

    def __enter__(self) -> Taps:
        self._records = {}
        for layer in self._layers:
            record = LayerRecord(layer)
            self._records[id(layer)] = record
            # Bypasses Keras's attribute tracking: this is not state.
            object.__setattr__(layer, "call", _tapped(layer, record))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for layer in self._layers:
            object.__delattr__(layer, "call")
        for record in self._records.values():
            _drop_foreign(record)


def _tapped(
    layer: keras.layers.Layer, record: LayerRecord
) -> Callable[..., Any]:
    original = layer.call

    def call(inputs: tf.Tensor, *args: Any, **kwargs: Any) -> Any:
        activation = getattr(layer, "activation", None)
        if activation is None:
            outputs = original(inputs, *args, **kwargs)
            _note(record, inputs, outputs)
            return outputs

        def tap(preactivation: tf.Tensor) -> tf.Tensor:
            # The identity gives the pre-activation a tensor of its own: in
            # eager mode an activation may return its argument.
            preactivation = tf.identity(preactivation)
            _note(record, inputs, preactivation)
            return activation(preactivation)

        object.__setattr__(layer, "activation", tap)
        try:
            return original(inputs, *args, **kwargs)
        finally:
            object.__setattr__(layer, "activation", activation)

    return call


def _note(record: LayerRecord, inputs: Any, preactivation: Any) -> None:
    if tf.is_tensor(preactivation) and tf.is_tensor(inputs):
        record.inputs.append(inputs)
        record.preactivations.append(preactivation)


def _drop_foreign(record: LayerRecord) -> None:
    """Keeps the tensors of the current graph; notes those out of reach.

    What Keras computed in a graph that it throws away, to learn a shape, may
    go. What ran in the graph of a loop or of a `tf.function` was part of the
    pass, and no cotangent can be sent back to it.
    """
    eager = tf.executing_eagerly()
    graph = None if eager else tf.compat.v1.get_default_graph()

    def here(z: tf.Tensor) -> bool:
        if eager:
            return isinstance(z, tf.__internal__.EagerTensor)
        return z.graph is graph

    uses = list(zip(record.inputs, record.preactivations, strict=True))
    foreign = [z for _, z in uses if not here(z)]
    record.lost = any(not is_scratch_graph(z.graph) for z in foreign)
    record.inputs = [a for a, z in uses if here(z)]
    record.preactivations = [z for _, z in uses if here(z)]
