"""Which layers can be captured, and whether cotangents can reach them.

Before the first step, this decides which layer owns which variable, and which
embeddings see no examples. In every trace, it checks that cotangents can be
sent back to each planned layer, example by example.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_natgrad._compat import flatten_layers
from keras_natgrad.capture.registry import (
    linear_maps,
    may_support,
    why_not_captured,
)
from keras_natgrad.capture.traces import MapTrace

# How the reason ends if no registered function describes the layer.
_UNDESCRIBED = "variable without a captured linear map"


def owners_of_variables(
    model: keras.Model,
) -> dict[int, list[keras.layers.Layer]]:
    """Returns the layers that use each variable, by its id.

    These are the layers whose map has the variable, and the layers that hold it
    directly; not the layers around them, nor those inside a layer whose map has
    it.
    """
    mapped: dict[int, list[keras.layers.Layer]] = {}
    held: dict[int, list[keras.layers.Layer]] = {}
    for layer in flatten_layers(model):
        own = {id(v) for spec in linear_maps(layer) for v in spec.variables}
        for key in own:
            mapped.setdefault(key, []).append(layer)
        inner = {
            id(v) for each in flatten_layers(layer) for v in each.variables
        }
        for variable in layer.variables:
            if id(variable) not in inner | own:
                held.setdefault(id(variable), []).append(layer)
    owners = dict(mapped)
    for key, layers in held.items():
        users = mapped.get(key, [])
        inside = {id(each) for user in users for each in flatten_layers(user)}
        others = [layer for layer in layers if id(layer) not in inside]
        owners[key] = [*users, *others]
    return owners


def why_not_owned(owners: Sequence[keras.layers.Layer]) -> str:
    """Returns why a variable falls back, in a few words."""
    if len(owners) > 1:
        names = " and ".join(sorted(layer.name for layer in owners))
        return f"variable shared by the layers {names}"
    if not owners:
        return f"model {_UNDESCRIBED}"
    name = type(owners[0]).__name__
    why = why_not_captured(owners[0])
    if why is not None:
        return f"{name}: {why}"
    if may_support(owners[0]):
        return f"{name}: its settings are not covered"
    return f"{name} {_UNDESCRIBED}"


def can_be_described(reason: str) -> bool:
    """Returns whether describing a layer would capture its variable.

    Args:
        reason: Why the variable falls back.
    """
    return reason.endswith(_UNDESCRIBED) and not reason.startswith("model ")


def embeddings_without_batch(model: keras.Model) -> dict[int, str]:
    """Returns why embeddings are not captured, by their id.

    An embedding of positions is often called on `range(length)`, and its output
    is added to every example: the cotangents of the examples arrive as one sum.
    Such a layer is built on a shape `(length,)`. A layer that is called on a
    batch of single integers has such a shape too, if the model is first called
    on a batch of known size; but then other layers are built on that size as
    well. A list of all integers of the vocabulary always counts as positions.

    Args:
        model: A built model.
    """
    batches = _first_sides(_build_shapes(model))
    for tensor in getattr(model, "inputs", None) or ():
        batches.add(tensor.shape[0])
    reasons = {}
    for layer in flatten_layers(model):
        depth = _vocabulary(layer)
        shape: Sequence[Any] = _build_shapes(layer).get("input_shape") or ()
        if depth is None or len(shape) != 1 or shape[0] is None:
            continue
        if shape[0] not in batches or shape[0] == depth:
            reasons[id(layer)] = (
                f"{type(layer).__name__}: looked up by integers without a "
                "batch axis"
            )
    return reasons


def _vocabulary(layer: keras.layers.Layer) -> int | None:
    """Returns the vocabulary size of a layer that is only an embedding."""
    for spec in linear_maps(layer):
        if spec.layout.one_hot and spec.applies is None:
            return spec.layout.inputs
    return None


def _build_shapes(layer: keras.layers.Layer) -> dict[str, Any]:
    config: dict[str, Any] | None = layer.get_build_config()
    return config or {}


def _first_sides(shapes: Any) -> set[Any]:
    """Returns the first sides of all shapes of a nested structure."""
    if isinstance(shapes, Mapping):
        shapes = list(shapes.values())
    if not isinstance(shapes, (list, tuple)) or not shapes:
        return set()
    if all(side is None or isinstance(side, int) for side in shapes):
        return {shapes[0]}
    return set().union(*map(_first_sides, shapes))


def check_reached(records: Sequence[MapTrace]) -> None:
    """Raises ValueError if a planned layer ran in a separate graph."""
    _raise_unreached([record.layer.name for record in records if record.lost])


def check_batched(records: Sequence[MapTrace], batch: int | None) -> None:
    """Raises ValueError if a planned layer saw inputs without a batch axis."""
    names = [r.layer.name for r in records if r.lacks_batch(batch)]
    if names:
        raise ValueError(
            "These layers are called on inputs without the batch axis, so that "
            f"examples cannot be told apart: {names}. Leave them out with "
            f"`optimizer.attach(model, exclude={names})`; they then get the "
            "fallback block."
        )


def check_called(
    tape: tf.GradientTape,
    outputs: Sequence[tf.Tensor],
    records: Sequence[MapTrace],
    variables: Sequence[Sequence[Any]],
) -> None:
    """Raises ValueError if outputs depend on layers that were not called.

    A `tf.function` that was traced earlier runs without its Python code, so
    nothing is recorded.

    Args:
        tape: Persistent tape of the forward pass.
        outputs: The network's outputs.
        records: What the layers did.
        variables: For each record, those of its matrix.
    """
    suspects = [not record.preactivations for record in records]
    _check_gradients(tape, outputs, records, variables, suspects)


def check_arrivals(
    tape: tf.GradientTape,
    outputs: Sequence[tf.Tensor],
    records: Sequence[MapTrace],
    variables: Sequence[Sequence[Any]],
    cotangents: Sequence[Sequence[tf.Tensor | None]],
) -> None:
    """Raises ValueError if a layer was recorded, but not by the tape.

    Recomputed parts run forward while tapes are stopped: no cotangent reaches
    such a pre-activation, although its weights get a gradient. In a branch that
    the loss does not use there is no cotangent either, but there the tape knows
    how the pre-activation depends on the weights.

    Args:
        tape: Persistent tape of the forward pass.
        outputs: The network's outputs.
        records: What the layers did.
        variables: For each record, those of its matrix.
        cotangents: For each record one per use, `None` if there is none.
    """
    suspects = [
        any(
            cotangent is None
            and all(part is None for part in tape.gradient(z, list(own)))
            for z, cotangent in zip(record.preactivations, sent, strict=True)
        )
        for record, own, sent in zip(
            records, variables, cotangents, strict=True
        )
    ]
    _check_gradients(tape, outputs, records, variables, suspects)


def _check_gradients(
    tape: tf.GradientTape,
    outputs: Sequence[tf.Tensor],
    records: Sequence[MapTrace],
    variables: Sequence[Sequence[Any]],
    suspects: Sequence[bool],
) -> None:
    """Raises ValueError if the outputs depend on suspected layers.

    Layers that the outputs do not depend on correctly have a Fisher of zero.
    """
    found = [index for index, suspect in enumerate(suspects) if suspect]
    if not found:
        return
    gradients = tape.gradient(
        list(outputs), [list(variables[index]) for index in found]
    )
    _raise_unreached(
        [
            records[index].layer.name
            for index, parts in zip(found, gradients, strict=True)
            if any(part is not None for part in parts)
        ]
    )


def _raise_unreached(names: Sequence[str]) -> None:
    if names:
        unique = list(dict.fromkeys(names))
        raise ValueError(
            "These layers run inside a loop, a tf.function or a recomputed "
            "part (`tf.recompute_grad`, `keras.RematScope`) of their own, or "
            "their weights are read by other code; their curvature cannot be "
            f"reached there: {unique}. Leave them out with "
            f"`optimizer.attach(model, exclude={unique})`; they then get the "
            "fallback block."
        )
