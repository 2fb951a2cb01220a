"""The base of layers with the weights of whitened inputs (PRONG)."""

from __future__ import annotations

import abc
import math
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from typing_extensions import Self, override

from keras_natgrad.linalg import Rows, to_dense

_PENALTIES = ("regularizer", "constraint")


class WhitenedLayer(keras.layers.Layer, abc.ABC):
    r"""A layer `a = (h − μ) M V + d` that trains V and d.

    Among the bases of a class it comes before a Keras layer `a = h W + b`, and
    adds M, `[n, n]`, and μ, `[n]`, for the n rows of its kernel, with all axes
    but the last merged. The variables `kernel` and `bias` are V and d; the
    canonical weights are

        W = M V,   b = d − μᵀ W.

    Attributes:
        plain_class: The Keras layer that it replaces.
    """

    plain_class: type[keras.layers.Layer]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check_plain(self, type(self).__name__)

    @override
    def build(self, input_shape: Any) -> None:
        super().build(input_shape)
        features = math.prod(self.kernel.shape[:-1])
        self.whitening = self.add_weight(
            name="whitening",
            shape=(features, features),
            initializer="identity",
            trainable=False,
        )
        self.centre = self.add_weight(
            name="centre",
            shape=(features,),
            initializer="zeros",
            trainable=False,
        )

    @abc.abstractmethod
    def rows(self, inputs: Any) -> Rows:
        """Returns the inputs h of the linear map, `[batch, shared, n]`.

        Args:
            inputs: The layer's input.
        """

    def whiten(self, rows: Any) -> Any:
        """Returns `(h − μ) M`.

        Args:
            rows: Inputs h of the linear map, `[..., n]`.
        """
        return keras.ops.matmul(rows - self.centre, self.whitening)

    def white_rows(self, inputs: Any) -> tf.Tensor:
        """Returns `(h − μ) M`, `[batch, shared, n]`.

        Args:
            inputs: The layer's input.
        """
        return self.whiten(to_dense(self.rows(inputs)))

    # -- Canonical weights -------------------------------------------------

    def canonical_weights(self) -> list[np.ndarray]:
        """Returns (W[, b]) of the equivalent plain layer."""
        kernel = float64(self.whitening) @ matrix_of(self.kernel)
        arrays = [kernel.reshape(self.kernel.shape)]
        if self.bias is not None:
            arrays.append(float64(self.bias) - float64(self.centre) @ kernel)
        return [array.astype(_numpy_dtype(self.kernel)) for array in arrays]

    def set_canonical_weights(self, weights: list[np.ndarray]) -> None:
        """Makes the layer equivalent to the plain one with weights (W[, b])."""
        features = int(self.centre.shape[0])
        self.whitening.assign(np.eye(features))
        self.centre.assign(np.zeros(features))
        self.kernel.assign(weights[0])
        if self.bias is not None:
            self.bias.assign(weights[1])

    @classmethod
    def from_plain(cls, layer: keras.layers.Layer) -> Self:
        """Returns an unbuilt layer with the settings of a plain layer.

        Args:
            layer: A Keras layer of the class `plain_class`.

        Raises:
            ValueError: If it is another layer, or has unsupported settings.
        """
        if type(layer) is not cls.plain_class:
            raise ValueError(
                f"`{cls.__name__}` can only replace keras.layers."
                f"{cls.plain_class.__name__}. Received: layer "
                f"{layer.name!r} of type {type(layer).__name__}"
            )
        check_plain(layer, cls.__name__)
        return cls.from_config(layer.get_config())

    def to_plain(self) -> keras.layers.Layer:
        """Returns an unbuilt plain layer with the same settings."""
        return self.plain_class.from_config(self.get_config())

    # -- Saving ------------------------------------------------------------

    def _saved(self) -> dict[str, Any]:
        named = {
            "whitened_kernel": self.kernel,
            "whitened_bias": self.bias,
            "whitening": self.whitening,
            "centre": self.centre,
        }
        return {key: value for key, value in named.items() if value is not None}

    @override
    def save_own_variables(self, store: Any) -> None:
        if not self.built:
            return
        for key, value in zip(
            ("kernel", "bias"), self.canonical_weights(), strict=False
        ):
            store[key] = value
        for key, variable in self._saved().items():
            store[key] = variable.numpy()

    @override
    def load_own_variables(self, store: Any) -> None:
        if not self.built:
            return
        missing = [key for key in self._saved() if key not in store]
        if missing:
            raise ValueError(
                f"The saved weights of layer {self.name!r} are not those of a "
                f"{type(self).__name__} layer. Received: "
                f"keys={sorted(store.keys())}, missing={missing}"
            )
        for key, variable in self._saved().items():
            variable.assign(store[key])


def check_plain(layer: keras.layers.Layer, name: str) -> None:
    """Raises ValueError for settings that whitening would change.

    Args:
        layer: A layer with a kernel and perhaps a bias.
        name: Name of the class to convert it to.
    """
    found = [
        f"{part}_{penalty}"
        for part in ("kernel", "bias")
        for penalty in _PENALTIES
        if getattr(layer, f"{part}_{penalty}") is not None
    ]
    found += [
        setting
        for setting in ("lora_rank", "quantization_config", "quantization_mode")
        if getattr(layer, setting, None) is not None
    ]
    if found:
        raise ValueError(
            f"`{name}` trains different weights from those it computes "
            f"with, and cannot have {', '.join(found)}. "
            f"Received: layer={layer.name!r}"
        )
    if getattr(layer, "groups", 1) != 1:
        raise ValueError(
            f"`{name}` has one matrix for all channels of its inputs, and "
            "cannot have groups. Received: "
            f"groups={layer.groups}, layer={layer.name!r}"
        )


def float64(variable: Any) -> np.ndarray:
    """Returns the value of a variable in float64."""
    return keras.ops.convert_to_numpy(variable).astype(np.float64)


def matrix_of(variable: Any) -> np.ndarray:
    """Returns the value of a kernel as a float64 matrix `[n, m]`."""
    return float64(variable).reshape(-1, variable.shape[-1])


def _numpy_dtype(variable: Any) -> Any:
    return keras.ops.convert_to_numpy(variable).dtype
