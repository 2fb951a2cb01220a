"""Taps on the layers of one forward pass."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from keras_natgrad._compat import is_scratch_graph
from keras_natgrad.capture.loops import folded_call
from keras_natgrad.capture.registry import (
    LinearMap,
    linear_maps,
    may_support,
)
from keras_natgrad.capture.replaced_call import replace_call, restore_call
from keras_natgrad.linalg import (
    Rows,
    StructuredRows,
    TwoWayCotangents,
    TwoWayRows,
    homogeneous,
)


class LayerUse(NamedTuple):
    """One call of a layer.

    Attributes:
        inputs: The layer's raw input.
        arguments: The other arguments of the call, by name.
        preactivation: Its pre-activation `z`.
        tape: Tape of this call alone, of a layer in half precision.
    """

    inputs: tf.Tensor
    arguments: Mapping[str, Any]
    preactivation: tf.Tensor
    tape: tf.GradientTape | None = None


class LayerUses:
    """What one layer did in a forward pass.

    Attributes:
        layer: The layer.
        lost: Whether it was called, but in a graph of its own, where nothing
            can be sent back to it.
        uses: One `LayerUse` per call.
    """

    def __init__(self, layer: keras.layers.Layer) -> None:
        self.layer = layer
        self.lost = False
        self.uses: list[LayerUse] = []

    @functools.cached_property
    def specs(self) -> tuple[LinearMap, ...]:
        """The layer's `LinearMap`s; the layer has been built by now."""
        return linear_maps(self.layer)


class LayerRecord:
    """What one matrix of a layer did in a forward pass.

    Args:
        recorded: `LayerUses` of the layer.
        index: Which of the layer's `LinearMap`s.
    """

    def __init__(self, recorded: LayerUses, index: int = 0) -> None:
        self._recorded = recorded
        self._index = index

    @property
    def layer(self) -> keras.layers.Layer:
        """The layer."""
        return self._recorded.layer

    @property
    def lost(self) -> bool:
        """Whether the layer ran where nothing can be sent back to it."""
        return self._recorded.lost

    @property
    def inputs(self) -> list[tf.Tensor]:
        """Its raw inputs, one per use."""
        return [use.inputs for use in self._uses]

    @property
    def preactivations(self) -> list[tf.Tensor]:
        """Its pre-activations `z`, one per use."""
        return [use.preactivation for use in self._uses]

    @property
    def spec(self) -> LinearMap:
        """Its `LinearMap`."""
        return self._recorded.specs[self._index]

    @property
    def _uses(self) -> list[LayerUse]:
        """The uses of the layer that are uses of this matrix.

        Those of its transpose come last.
        """
        spec = self.spec
        uses = self._uses_of(spec)
        if spec.transposed is not None:
            uses = [*uses, *self._uses_of(spec.transposed)]
        return uses

    def _uses_of(self, spec: LinearMap) -> list[LayerUse]:
        if spec.applies is None:
            return self._recorded.uses
        return [u for u in self._recorded.uses if spec.applies(**u.arguments)]

    def lacks_batch(self, batch: int | None) -> bool:
        """Returns whether static shapes show a use without the batch axis.

        Args:
            batch: Number of examples, `None` where it is not known yet.
        """
        first = [z.shape[0] for z in self.preactivations]
        return any(n and (not batch or n % batch != 0) for n in first)

    def canonical_inputs(
        self, dtype: Any, batch: tf.Tensor
    ) -> Rows | TwoWayRows:
        """Returns `ā`, `[(groups,) batch, shared, rows]`.

        It is homogeneous if the layer has a bias. Several uses of the layer
        count as more shared positions. One-hot inputs stay so, and so do the
        patches of a layer that was used once. Where the layer uses the
        transpose too, it is a `TwoWayRows`.
        """
        spec = self.spec
        direct = _inputs(spec, self._uses_of(spec), dtype, batch)
        if spec.transposed is None:
            return direct
        uses = self._uses_of(spec.transposed)
        return TwoWayRows(direct, _inputs(spec.transposed, uses, dtype, batch))

    def canonical_cotangents(
        self,
        cotangents: Sequence[tf.Tensor | None],
        dtype: Any,
        batch: tf.Tensor,
    ) -> tf.Tensor | TwoWayCotangents:
        """Returns `g`, `[(groups,) batch, shared, columns]`.

        Where the layer uses the transpose too, it is a `TwoWayCotangents`.

        Args:
            cotangents: One per use of the layer, `None` for zero.
            dtype: Dtype of the result.
            batch: Number of examples.
        """
        spec = self.spec
        # The gradient of a product may have lost its static shape.
        sent = [
            tf.zeros_like(z) if g is None else tf.ensure_shape(g, z.shape)
            for g, z in zip(cotangents, self.preactivations, strict=True)
        ]
        if spec.transposed is None:
            return _cotangents(spec, sent, dtype, batch)
        count = len(self._uses_of(spec))
        return TwoWayCotangents(
            _cotangents(spec, sent[:count], dtype, batch),
            _cotangents(spec.transposed, sent[count:], dtype, batch),
        )

    def own_gradients(
        self, cotangents: Sequence[tf.Tensor | None]
    ) -> list[tf.Tensor | None]:
        """Returns what the layer's calls themselves add to the gradients.

        In the dtype and with the roundings of the backward pass of the loss.
        Only for layers in half precision.

        Args:
            cotangents: One per use of the layer, `None` for zero.

        Returns:
            One tensor per variable of `spec`, `None` where there is none.
        """
        totals: list[tf.Tensor | None] = [None] * len(self.spec.variables)
        for use, cotangent in zip(self._uses, cotangents, strict=True):
            if use.tape is None or cotangent is None:
                continue
            parts = use.tape.gradient(
                use.preactivation,
                list(self.spec.variables),
                output_gradients=cotangent,
            )
            for i, part in enumerate(parts):
                if part is not None:
                    part = tf.convert_to_tensor(part)
                    total = totals[i]
                    totals[i] = part if total is None else total + part
        return totals


def _inputs(
    spec: LinearMap, uses: Sequence[LayerUse], dtype: Any, batch: tf.Tensor
) -> Rows:
    """Returns the canonical inputs of some uses of one map."""
    layout = spec.layout
    if not uses:  # The matrix took no part in this pass.
        return tf.zeros([*layout.lead, batch, 1, layout.rows], dtype)
    parts = [_own_inputs(spec, use) for use in uses]
    if isinstance(parts[0], StructuredRows):
        merged = _fold(
            type(parts[0]).join([part.cast(dtype) for part in parts]), batch
        )
    else:
        merged = _merge([tf.cast(part, dtype) for part in parts], batch)
        merged = tf.stop_gradient(merged)
    return merged if layout.bias_shape is None else homogeneous(merged)


def _own_inputs(spec: LinearMap, use: LayerUse) -> Rows:
    inputs = tf.stop_gradient(use.inputs)
    if spec.with_arguments:
        return spec.inputs(inputs, **use.arguments)
    return spec.inputs(inputs)


def _cotangents(
    spec: LinearMap, sent: Sequence[tf.Tensor], dtype: Any, batch: tf.Tensor
) -> tf.Tensor:
    """Returns the canonical cotangents of some uses of one map."""
    layout = spec.layout
    if not sent:
        return tf.zeros([*layout.lead, batch, 1, layout.columns], dtype)
    parts = [tf.cast(spec.cotangents(g), dtype) for g in sent]
    return _merge(parts, batch)


def _merge(parts: Sequence[tf.Tensor], batch: tf.Tensor) -> tf.Tensor:
    """Joins the uses of a layer, and puts groups first.

    Positions are taken out of a batch axis that they were folded into: a model
    may reshape `[batch, T, n]` to `[batch · T, n]` before a layer.

    Args:
        parts: Tensors `[batch, shared, (groups,) features]`.
        batch: Number of examples.
    """
    merged = parts[0] if len(parts) == 1 else tf.concat(parts, axis=1)
    merged = tf.reshape(merged, [batch, -1, *merged.shape[2:]])
    if merged.shape.rank == 4:
        merged = tf.transpose(merged, [2, 0, 1, 3])
    return merged


def _fold(rows: Rows, batch: tf.Tensor) -> Rows:
    """Takes positions out of the batch axis, as `_merge` does.

    Args:
        rows: `[(groups,) images, shared, features]`.
        batch: Number of examples.
    """
    if isinstance(rows, StructuredRows):
        return rows.fold(batch)
    lead, features = rows.shape[:-3], rows.shape[-1]
    return tf.reshape(rows, [*lead, batch, -1, features])


class Taps:
    """Context manager that records layers while a model is called.

    For the time of the context each supported layer gets an instance `call`
    that notes its input and its pre-activation, the argument of
    `layer.activation`; leaving the context takes it off again. Nothing is
    kept on the layer, its class or its config.

    A `TimeDistributed` layer around supported layers is called on all time
    steps at once, see `capture.loops`.

    A model that is called inside a graph Keras throws away (while building)
    leaves tensors of that graph; only records of the current graph are kept.

    Args:
        layers: The layers to record. Those of unsupported classes are left
            alone; the others may still be unbuilt.

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
        self._records: dict[int, LayerUses] = {}

    def record(self, layer: keras.layers.Layer, index: int = 0) -> LayerRecord:
        """Returns what a layer did, for one of its `LinearMap`s."""
        return LayerRecord(self._records[id(layer)], index)

    def half_precision_records(self) -> list[LayerRecord]:
        """Returns the records of all layers that computed in half precision."""
        return [
            LayerRecord(uses, index)
            for uses in self._records.values()
            if any(use.tape is not None for use in uses.uses)
            for index in range(len(uses.specs))
        ]

    def __enter__(self) -> Taps:
        self._records = {}
        for layer in self._layers:
            record = LayerUses(layer)
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
    record: LayerUses,
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
            # The identity gives the pre-activation a tensor of its own: in
            # eager mode an activation may return its argument.
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
    """Returns the first argument of a call, and the others by name."""
    others = dict(signature.bind(*args, **kwargs).arguments)
    inputs = others.pop(next(iter(others)))
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            others.update(others.pop(name, {}))
    return inputs, others


def _note(
    record: LayerUses,
    inputs: Any,
    arguments: Mapping[str, Any],
    preactivation: Any,
    tape: tf.GradientTape | None,
) -> None:
    if tf.is_tensor(preactivation) and tf.is_tensor(inputs):
        record.uses.append(LayerUse(inputs, arguments, preactivation, tape))


def _drop_foreign(record: LayerUses) -> None:
    """Keeps the tensors of the current graph; notes those out of reach.

    What Keras computed in a graph that it throws away, to learn a shape, may
    go. What ran in the graph of a loop or of a `tf.function` was part of the
    pass, and no cotangent can be sent back to it.
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
