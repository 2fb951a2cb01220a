"""What the layers of one forward pass did, in canonical form."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from keras_natgrad.capture.registry import LinearMap, linear_maps
from keras_natgrad.linalg import (
    Rows,
    StructuredRows,
    TwoWayCotangents,
    TwoWayRows,
    homogeneous,
)


class LayerCall(NamedTuple):
    """One call of a layer.

    Attributes:
        inputs: The layer's raw input.
        arguments: Further arguments of the call, by name.
        preactivation: Its pre-activation `z`.
        tape: Tape of this call alone, for a layer in half precision.
    """

    inputs: tf.Tensor
    arguments: Mapping[str, Any]
    preactivation: tf.Tensor
    tape: tf.GradientTape | None = None


class LayerTrace:
    """What one layer did in a forward pass.

    Attributes:
        layer: The layer.
        lost: Whether it was called in a separate graph, where no cotangent can
            be sent back to it.
        uses: One `LayerCall` per call.
    """

    def __init__(self, layer: keras.layers.Layer) -> None:
        self.layer = layer
        self.lost = False
        self.uses: list[LayerCall] = []

    @functools.cached_property
    def specs(self) -> tuple[LinearMap, ...]:
        """The layer's `LinearMap`s; the layer has been built by now."""
        return linear_maps(self.layer)


class MapTrace:
    """What one matrix of a layer did in a forward pass.

    Args:
        recorded: `LayerTrace` of the layer.
        index: Which of the layer's `LinearMap`s.
    """

    def __init__(self, recorded: LayerTrace, index: int = 0) -> None:
        self._recorded = recorded
        self._index = index

    @property
    def layer(self) -> keras.layers.Layer:
        """The layer."""
        return self._recorded.layer

    @property
    def lost(self) -> bool:
        """Whether the layer ran where no cotangent can be sent back to it."""
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
    def _uses(self) -> list[LayerCall]:
        """The uses of the layer that use this matrix.

        Uses of its transpose come last.
        """
        spec = self.spec
        uses = self._uses_of(spec)
        if spec.transposed is not None:
            uses = [*uses, *self._uses_of(spec.transposed)]
        return uses

    def _uses_of(self, spec: LinearMap) -> list[LayerCall]:
        if spec.applies is None:
            return self._recorded.uses
        return [u for u in self._recorded.uses if spec.applies(**u.arguments)]

    def lacks_batch(self, batch: int | None) -> bool:
        """Returns whether a use lacks the batch axis, by its static shapes.

        Args:
            batch: Number of examples, or `None` if it is not known yet.
        """
        return any(
            n and (not batch or n % batch != 0 or _counts_up(use.inputs))
            for use in self._uses
            for n in [use.preactivation.shape[0]]
        )

    def canonical_inputs(
        self, dtype: Any, batch: tf.Tensor
    ) -> Rows | TwoWayRows:
        """Returns `ā`, `[(groups,) batch, shared, rows]`.

        It is homogeneous if the layer has a bias. Several uses of the layer
        count as more shared positions. One-hot inputs stay structured, and so
        do the patches of a layer that was used once. If the layer uses the
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

        If the layer uses the transpose too, it is a `TwoWayCotangents`.

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
        """Returns the contribution of the layer's calls to the gradients.

        It has the dtype and the rounding errors of the backward pass of the
        loss. Only for layers in half precision.

        Args:
            cotangents: One per use of the layer, `None` for zero.

        Returns:
            One tensor per variable of `spec`, or `None`.
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


def _counts_up(inputs: tf.Tensor) -> bool:
    """Whether integers are a `range` in the graph, and belong to no example."""
    if tf.executing_eagerly() or not isinstance(inputs, tf.Tensor):
        return False
    return bool(inputs.op.type == "Range")


def _inputs(
    spec: LinearMap, uses: Sequence[LayerCall], dtype: Any, batch: tf.Tensor
) -> Rows:
    """Returns the canonical inputs of some uses of one map."""
    layout = spec.layout
    if not uses:  # The matrix was not used in this pass.
        return tf.zeros([*layout.lead, batch, 1, layout.rows], dtype)
    parts = [_own_inputs(spec, use) for use in uses]
    if isinstance(parts[0], StructuredRows):
        # Each by itself: uses may differ in their positions.
        merged = type(parts[0]).join(
            [part.cast(dtype).fold(batch) for part in parts]
        )
    else:
        merged = _merge([tf.cast(part, dtype) for part in parts], batch)
        merged = tf.stop_gradient(merged)
    return merged if layout.bias_shape is None else homogeneous(merged)


def _own_inputs(spec: LinearMap, use: LayerCall) -> Rows:
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
    """Joins the uses of a layer, and moves groups to the front.

    A model may reshape `[batch, T, n]` to `[batch · T, n]` before some uses of
    a layer; those positions are taken out of the batch axis again.

    Args:
        parts: Tensors `[batch, shared, (groups,) features]`.
        batch: Number of examples.
    """
    folded = [tf.reshape(p, [batch, -1, *p.shape[2:]]) for p in parts]
    merged = folded[0] if len(folded) == 1 else tf.concat(folded, axis=1)
    if merged.shape.rank == 4:
        merged = tf.transpose(merged, [2, 0, 1, 3])
    return merged
