"""Taps on the layers of one forward pass."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

import keras
import tensorflow as tf

from keras_natgrad._compat import is_scratch_graph
from keras_natgrad.capture.loops import folded_call
from keras_natgrad.capture.registry import may_support
from keras_natgrad.capture.replaced_call import replace_call, restore_call
from keras_natgrad.capture.traces import LayerCall, LayerTrace, MapTrace


class Taps:
    """Context manager that records layers while a model is called.

    Inside the context each supported layer has an instance `call` that records
    its input and its pre-activation, the argument of `layer.activation`.
    Leaving the context removes it. The layer, its class and its config are left
    unchanged.

    A `TimeDistributed` layer around supported layers is called on all time
    steps at once; see `capture.loops`.

    While building, Keras may call a model inside a graph that it then throws
    away. Only records of the current graph are kept.

    Args:
        layers: The layers to record. Layers of unsupported classes are left
            alone; the others need not be built yet.

    Example:

    ```python
    with keras_natgrad.capture.Taps(layers) as taps:
        outputs = model(x)
    taps.record(layers[0]).preactivations
    ```
    """

    def __init__(self, layers: Sequence[keras.layers.Layer]) -> None:
        self._layers = [layer for layer in layers if may_support(layer)]
        self._folded = [
            layer
            for layer in layers
            if isinstance(layer, keras.layers.TimeDistributed)
        ]
        self._records: dict[int, LayerTrace] = {}

    def record(self, layer: keras.layers.Layer, index: int = 0) -> MapTrace:
        """Returns what a layer did, for one of its `LinearMap`s."""
        return MapTrace(self._records[id(layer)], index)

    def half_precision_records(self) -> list[MapTrace]:
        """Returns the records of all layers that computed in half precision."""
        return [
            MapTrace(uses, index)
            for uses in self._records.values()
            if any(use.tape is not None for use in uses.uses)
            for index in range(len(uses.specs))
        ]

    def __enter__(self) -> Taps:
        self._records = {}
        for layer in self._layers:
            record = LayerTrace(layer)
            self._records[id(layer)] = record
            replace_call(layer, functools.partial(_tapped, layer, record))
        for layer in self._folded:
            replace_call(layer, functools.partial(folded_call, layer))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for layer in [*self._layers, *self._folded]:
            restore_call(layer)
        for record in self._records.values():
            _drop_foreign(record)


def _tapped(
    layer: keras.layers.Layer,
    record: LayerTrace,
    original: Callable[..., Any],
) -> Callable[..., Any]:
    signature = inspect.signature(original)
    is_half = layer.compute_dtype in ("float16", "bfloat16")

    def call(*args: Any, **kwargs: Any) -> Any:
        if not is_half:
            return record_call(None, *args, **kwargs)
        with tf.GradientTape(persistent=True) as tape:
            return record_call(tape, *args, **kwargs)

    def record_call(
        tape: tf.GradientTape | None, *args: Any, **kwargs: Any
    ) -> Any:
        inputs, others = _split_arguments(signature, args, kwargs)
        activation = getattr(layer, "activation", None)
        if activation is None:
            outputs = original(*args, **kwargs)
            _note(record, inputs, others, outputs, tape)
            return outputs

        def tap(preactivation: tf.Tensor) -> tf.Tensor:
            # The identity gives the pre-activation its own tensor: in eager
            # mode an activation may return its argument.
            preactivation = tf.identity(preactivation)
            _note(record, inputs, others, preactivation, tape)
            return activation(preactivation)

        object.__setattr__(layer, "activation", tap)
        try:
            return original(*args, **kwargs)
        finally:
            object.__setattr__(layer, "activation", activation)

    return call


def _split_arguments(
    signature: inspect.Signature, args: Any, kwargs: Any
) -> tuple[Any, dict[str, Any]]:
    """Returns the first argument of a call, and the other ones by name."""
    others = dict(signature.bind(*args, **kwargs).arguments)
    inputs = others.pop(next(iter(others)))
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            others.update(others.pop(name, {}))
    return inputs, others


def _note(
    record: LayerTrace,
    inputs: Any,
    arguments: Mapping[str, Any],
    preactivation: Any,
    tape: tf.GradientTape | None,
) -> None:
    if tf.is_tensor(preactivation) and tf.is_tensor(inputs):
        record.uses.append(LayerCall(inputs, arguments, preactivation, tape))


def _drop_foreign(record: LayerTrace) -> None:
    """Keeps the tensors of the current graph, and marks those out of reach.

    Tensors of a graph that Keras made only to learn a shape can be dropped.
    What ran in the graph of a loop or of a `tf.function` was part of the pass,
    but no cotangent can be sent back to it.
    """
    eager = tf.executing_eagerly()
    graph = None if eager else tf.compat.v1.get_default_graph()

    def here(z: Any) -> bool:
        if not isinstance(z, tf.Tensor):  # Ragged: the map will refuse it.
            return True
        if eager:
            return isinstance(z, tf.__internal__.EagerTensor)
        return z.graph is graph

    foreign = [use for use in record.uses if not here(use.preactivation)]
    record.lost = any(
        not is_scratch_graph(use.preactivation.graph) for use in foreign
    )
    record.uses = [use for use in record.uses if here(use.preactivation)]
