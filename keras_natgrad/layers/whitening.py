"""Whitens layers again without changing what they compute."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
import scipy.linalg
import tensorflow as tf

from keras_natgrad._compat import flatten_layers
from keras_natgrad.capture import Taps
from keras_natgrad.layers.whitened_layer import (
    WhitenedLayer,
    float64,
    matrix_of,
)
from keras_natgrad.linalg import Patches, Rows, StructuredRows, homogeneous


class InputMoments(NamedTuple):
    """Mean and covariance of the inputs of a layer's linear map, in float64.

    n is the number of rows of the layer's kernel, all axes but the last merged.

    Attributes:
        mean: `[n]`; zeros for a layer without a bias.
        covariance: `[n, n]`; the second moment for a layer without a bias.
    """

    mean: np.ndarray
    covariance: np.ndarray


def whitened_layers(model: keras.Model) -> list[WhitenedLayer]:
    """Returns the layers of a model that have whitened inputs.

    Raises:
        ValueError: If there are none.
    """
    found = [
        layer
        for layer in flatten_layers(model)
        if isinstance(layer, WhitenedLayer)
    ]
    if not found:
        raise ValueError(
            "There is nothing to whiten. Write `model = "
            "keras_natgrad.layers.whitened(model)` before `compile`. Received: "
            f"model={model.name!r} without a whitened layer"
        )
    return found


def input_moments(
    model: keras.Model, x: Any, batch_size: int = 1024
) -> list[InputMoments]:
    """Returns the moments of the inputs of every whitened layer.

    The model runs in inference mode; all positions at which a layer is applied
    count as examples. The inputs of a convolution are its patches.

    Args:
        model: A built model.
        x: Inputs of the model, one array or a structure of arrays.
        batch_size: Examples per forward pass.

    Returns:
        One `InputMoments` per layer, in the order of the model's layers.

    Raises:
        ValueError: If there is no such layer, or one is never applied or has
            inputs that are not finite.
    """
    layers = whitened_layers(model)
    total = len(keras.tree.flatten(x)[0])
    sums = [_Sums(layer) for layer in layers]
    for start in range(0, total, batch_size):
        part = keras.tree.map_structure(
            lambda array, start=start: tf.convert_to_tensor(
                array[start : start + batch_size]
            ),
            x,
        )
        with Taps(layers) as taps:
            model(part, training=False)
        for layer, each in zip(layers, sums, strict=True):
            for inputs in taps.record(layer).inputs:
                each.add(inputs)
    return [each.moments() for each in sums]


class _Sums:
    """Sums of a layer's inputs, about the mean of the first ones."""

    def __init__(self, layer: WhitenedLayer) -> None:
        self._layer = layer
        self._shift: Any = None
        self._moment: Any = 0.0

    def add(self, inputs: Any) -> None:
        """Adds the inputs of one use of the layer."""
        rows = self._layer.rows(tf.cast(inputs, tf.float64))
        if self._layer.bias is not None:
            if self._shift is None:
                self._shift = _mean(rows)
            rows = _shifted(rows, self._shift)
        self._moment = self._moment + _second_moment(rows).numpy()

    def moments(self) -> InputMoments:
        """Returns mean and covariance of all added inputs."""
        applied = np.ndim(self._moment) > 0
        if not applied or not np.all(np.isfinite(self._moment)):
            reason = "has inputs" if applied else "is never applied"
            raise ValueError(
                "Whitening needs finite inputs. Received: layer "
                f"{self._layer.name!r}, which {reason}"
                + (" that are not finite" if applied else "")
            )
        moment = self._moment / self._moment[-1, -1]
        first, second = moment[-1, :-1], moment[:-1, :-1]
        if self._layer.bias is None:
            return InputMoments(np.zeros_like(first), second)
        shift = np.tile(self._shift, len(first) // len(self._shift))
        return InputMoments(shift + first, second - np.outer(first, first))


def _mean(rows: Rows) -> np.ndarray:
    """Returns the mean of rows, or of each channel of patches."""
    values: Any = rows.images if isinstance(rows, Patches) else rows
    axes = list(range(values.shape.rank - 1))
    return tf.reduce_mean(values, axis=axes).numpy()


def _shifted(rows: Rows, shift: np.ndarray) -> Rows:
    """Returns rows minus a mean, also subtracted from padding zeros."""
    if isinstance(rows, Patches):
        return Patches(rows.images - shift, rows.window)
    return rows - shift


def _second_moment(rows: Rows) -> tf.Tensor:
    """Returns the sum of `h̄h̄ᵀ` of the homogeneous rows `h̄ = (h, 1)`."""
    own = homogeneous(rows)
    if isinstance(own, StructuredRows):
        return own.second_moment()
    flat = tf.reshape(own, [-1, own.shape[-1]])
    return tf.matmul(flat, flat, transpose_a=True)


def rewhiten(
    layer: WhitenedLayer,
    moments: InputMoments,
    damping: float,
    relative_damping: bool = True,
    velocities: Sequence[Any] = (),
) -> None:
    r"""Sets M and μ of a layer, and V and d so that it computes the same.

    With `Σ = Q Λ Qᵀ` the new `M = Q (Λ + εI)^{-½}`, and

        V ← M⁻¹ W,   d ← b + μᵀ W.

    A velocity is a difference of weights and is mapped like them. M is rounded
    first, and V is then solved for in float64, so that the layer's outputs
    change only by the rounding of V and d.

    Args:
        layer: A built layer of whitened inputs.
        moments: `InputMoments` of its inputs or patches.
        damping: ε, non-negative.
        relative_damping: Whether ε is in units of the mean eigenvalue of Σ.
        velocities: Optimizer variables with the last step of V and of d.

    Raises:
        ValueError: If `Σ + εI` is singular.
    """
    values, vectors = scipy.linalg.eigh(moments.covariance)
    if relative_damping:
        damping = damping * float(np.mean(values))
    damped = np.maximum(values, 0.0) + damping
    if not damped[0] > np.finfo(np.float64).eps * damped[-1]:
        raise ValueError(
            "The covariance of a layer's inputs is singular; give Whiten a "
            f"larger damping. Received: layer {layer.name!r}, damping={damping}"
        )
    # The sign of an eigenvector is arbitrary and would carry over to V.
    largest = np.argmax(np.abs(vectors), axis=0)
    vectors = vectors * np.sign(vectors[largest, np.arange(len(values))])
    old = float64(layer.whitening), float64(layer.centre)
    layer.whitening.assign(vectors / np.sqrt(damped))
    layer.centre.assign(moments.mean)
    new = float64(layer.whitening), float64(layer.centre)
    factorised = scipy.linalg.lu_factor(new[0])
    for variables in ([layer.kernel, layer.bias], list(velocities)):
        if not variables:
            continue
        kernel = old[0] @ matrix_of(variables[0])
        inner = scipy.linalg.lu_solve(factorised, kernel)
        variables[0].assign(inner.reshape(variables[0].shape))
        if layer.bias is not None:
            bias = float64(variables[1]) + (new[1] - old[1]) @ kernel
            variables[1].assign(bias)
