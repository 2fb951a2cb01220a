"""Whitens layers anew without a change of what they compute."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
import scipy.linalg
import tensorflow as tf

from keras_natgrad._compat import flatten_layers
from keras_natgrad.capture import Taps
from keras_natgrad.layers.whitened_dense import WhitenedDense


class InputMoments(NamedTuple):
    """Mean and covariance of a layer's inputs, in float64.

    Attributes:
        mean: `[n]`; zeros for a layer without a bias.
        covariance: `[n, n]`; the second moment for a layer without a bias.
    """

    mean: np.ndarray
    covariance: np.ndarray


def whitened_layers(model: keras.Model) -> list[WhitenedDense]:
    """Returns the `WhitenedDense` layers of a model.

    Raises:
        ValueError: If there are none.
    """
    found = [
        layer
        for layer in flatten_layers(model)
        if isinstance(layer, WhitenedDense)
    ]
    if not found:
        raise ValueError(
            "There is nothing to whiten. Write `model = "
            "keras_natgrad.layers.whitened(model)` before `compile`. Received: "
            f"model={model.name!r} without a WhitenedDense layer"
        )
    return found


def input_moments(
    model: keras.Model, x: Any, batch_size: int = 1024
) -> list[InputMoments]:
    """Returns the moments of the inputs of every `WhitenedDense` layer.

    The model runs in inference mode; all positions at which a layer is applied
    count as examples.

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
    """Sums over a layer's inputs, about their first mean."""

    def __init__(self, layer: WhitenedDense) -> None:
        self._layer = layer
        self._shift: Any = None
        self._count = 0
        self._first: Any = 0.0
        self._second: Any = 0.0

    def add(self, inputs: Any) -> None:
        """Takes inputs of any rank."""
        values = keras.ops.convert_to_numpy(inputs).astype(np.float64)
        values = values.reshape(-1, values.shape[-1])
        if self._layer.bias is not None:
            if self._shift is None:
                self._shift = values.mean(axis=0)
            values = values - self._shift
        self._count += len(values)
        self._first = self._first + values.sum(axis=0)
        self._second = self._second + values.T @ values

    def moments(self) -> InputMoments:
        """Returns mean and covariance of all that was added."""
        if not self._count or not np.all(np.isfinite(self._second)):
            reason = "is never applied" if not self._count else "has inputs"
            raise ValueError(
                "Whitening needs finite inputs. Received: layer "
                f"{self._layer.name!r}, which {reason}"
                + (" that are not finite" if self._count else "")
            )
        first, second = self._first / self._count, self._second / self._count
        if self._layer.bias is None:
            return InputMoments(np.zeros_like(first), second)
        return InputMoments(
            self._shift + first, second - np.outer(first, first)
        )


def rewhiten(
    layer: WhitenedDense,
    moments: InputMoments,
    damping: float,
    relative_damping: bool = True,
    velocities: Sequence[Any] = (),
) -> None:
    r"""Sets M and μ of a layer, and V and d so that it computes the same.

    With `Σ = Q Λ Qᵀ` the new `M = Q (Λ + εI)^{-½}`, and

        V ← M⁻¹ W,   d ← b + μᵀ W.

    A velocity is mapped as the weights are, because it is a difference of
    weights. M is rounded first and V solved for it in float64, so that what
    the layer computes changes by the rounding of V and d alone.

    Args:
        layer: A built `WhitenedDense`.
        moments: `InputMoments` of its inputs.
        damping: ε, non-negative.
        relative_damping: Whether ε counts in mean eigenvalues of Σ.
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
    old = _array(layer.whitening), _array(layer.centre)
    layer.whitening.assign(vectors / np.sqrt(damped))
    layer.centre.assign(moments.mean)
    new = _array(layer.whitening), _array(layer.centre)
    factorised = scipy.linalg.lu_factor(new[0])
    for variables in ([layer.kernel, layer.bias], list(velocities)):
        if not variables:
            continue
        kernel = old[0] @ _array(variables[0])
        variables[0].assign(scipy.linalg.lu_solve(factorised, kernel))
        if layer.bias is not None:
            bias = _array(variables[1]) + (new[1] - old[1]) @ kernel
            variables[1].assign(bias)


def _array(variable: Any) -> np.ndarray:
    return keras.ops.convert_to_numpy(variable).astype(np.float64)
