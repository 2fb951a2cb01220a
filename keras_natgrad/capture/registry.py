"""The registry of layers that capture understands."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import keras
import tensorflow as tf

from keras_natgrad._compat import is_layer_class, special_computation
from keras_natgrad.capture.layout import ParameterLayout
from keras_natgrad.linalg import Rows


@dataclass(frozen=True)
class LinearMap:
    """What capture needs to know about one matrix of a built layer.

    The layer must compute `z = canonical(inputs) · W (+ b)` and pass `z` as
    the argument of `layer.activation` (as all Keras layers with an activation
    do), or return `z` itself if it has no such attribute. More generally, the
    gradient of W must be `Σ_n Σ_s ā gᵀ` with the canonical inputs and
    cotangents given here.

    Attributes:
        variables: The layer's variables: (kernel,) or (kernel, bias).
        layout: `ParameterLayout` of these variables.
        inputs: Function from the layer's input to `[batch, shared, n]`, or
            `[batch, shared, groups, n]` if the layout has groups, or an
            equivalent `linalg.StructuredRows`.
        cotangents: Function from a tensor shaped like `z` to
            `[batch, shared, (groups,) m]`, with the same shared positions.
        with_arguments: Whether `inputs` takes the keyword arguments of the
            layer's call (such as `training`) besides the input.
        block: Name of the block to use if a Kronecker product does not suit the
            layer.
        applies: Function of the keyword arguments of a call that says whether
            the call uses this matrix; `None` if every call does.
        transposed: For a layout that is `two_way`: the map of the calls that
            use the transpose, `z = canonical(inputs) · Wᵀ`, with canonical
            inputs `[batch, shared, m]` and cotangents `[batch, shared, n]`.
    """

    variables: tuple[Any, ...]
    layout: ParameterLayout
    inputs: Callable[..., Rows]
    cotangents: Callable[[tf.Tensor], tf.Tensor]
    with_arguments: bool = False
    block: str | None = None
    applies: Callable[..., bool] | None = None
    transposed: LinearMap | None = None

    def __post_init__(self) -> None:
        own = self.layout
        if own.two_way != (self.transposed is not None):
            raise ValueError(
                "A map has the layout `two_way=True` if and only if "
                "it has a `transposed` map. Received: "
                f"layout={own!r}, transposed={self.transposed!r}"
            )
        if self.transposed is None:
            return
        other = self.transposed.layout
        if own.lead or (own.rows, own.columns) != (other.columns, other.rows):
            raise ValueError(
                "A matrix that is used both ways has no groups and no bias, "
                "and its `transposed` map has inputs and outputs exchanged. "
                f"Received: layout={own!r}, transposed layout={other!r}"
            )


@dataclass(frozen=True)
class NotCaptured:
    """Says why a layer of a registered class has no linear map.

    Attributes:
        reason: A few words, for the summary and the warning.
    """

    reason: str


Describe: TypeAlias = Callable[
    [Any], "LinearMap | Sequence[LinearMap] | NotCaptured | None"
]

_LAYERS: dict[type[keras.layers.Layer], Describe] = {}


def register_layer(
    layer_class: type[keras.layers.Layer],
) -> Callable[[Describe], Describe]:
    """Decorator that registers how a layer class is captured.

    Subclasses that override `call` are not covered, because their computation
    is unknown; register them too.

    Args:
        layer_class: A subclass of `keras.layers.Layer`, or of
            `tf_keras.layers.Layer` for `integrations.tf_keras`.

    Returns:
        A decorator for a function that takes a built layer and returns its
        `LinearMap`, a sequence of them if it has several matrices, or `None` or
        a `NotCaptured` if this instance is not supported.

    Raises:
        ValueError: If `layer_class` is not a layer class.

    Example:

    ```python
    @keras_natgrad.register_layer(MyDense)
    def describe(layer):
        n, m = layer.w.shape
        return keras_natgrad.capture.LinearMap(
            variables=(layer.w,),
            layout=keras_natgrad.capture.ParameterLayout.of_matrix(
                n, m, bias=False
            ),
            inputs=lambda x: x[:, tf.newaxis],
            cotangents=lambda g: g[:, tf.newaxis],
        )
    ```
    """
    if not is_layer_class(layer_class):
        raise ValueError(
            "`register_layer` takes a keras.layers.Layer subclass. "
            f"Received: {layer_class!r}"
        )

    def decorate(describe: Describe) -> Describe:
        _LAYERS[layer_class] = describe
        return describe

    return decorate


def may_support(layer: keras.layers.Layer) -> bool:
    """Returns whether a layer's class is registered, built or not."""
    return not special_computation(layer) and _find(layer) is not None


def linear_maps(layer: keras.layers.Layer) -> tuple[LinearMap, ...]:
    """Returns the `LinearMap`s of a layer, none if it is not supported."""
    found = _describe(layer)
    if found is None or isinstance(found, NotCaptured):
        return ()
    return (found,) if isinstance(found, LinearMap) else tuple(found)


def applies_matrix(layer: keras.layers.Layer) -> bool:
    """Returns whether a layer multiplies its features by one matrix."""
    return any(
        spec.layout.groups is None and not spec.layout.one_hot
        for spec in linear_maps(layer)
    )


def why_not_captured(layer: keras.layers.Layer) -> str | None:
    """Returns why a layer has no linear map, if its function says so."""
    found = _describe(layer)
    return found.reason if isinstance(found, NotCaptured) else None


def _describe(layer: keras.layers.Layer) -> Any:
    describe = _find(layer)
    if describe is None or not layer.built or special_computation(layer):
        return None
    return describe(layer)


def _find(layer: keras.layers.Layer) -> Describe | None:
    for layer_class in type(layer).__mro__:
        if layer_class in _LAYERS:
            same_call = type(layer).call is layer_class.call
            return _LAYERS[layer_class] if same_call else None
    return None
