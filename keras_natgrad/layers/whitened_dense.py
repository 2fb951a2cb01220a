"""A dense layer with the weights of whitened inputs (PRONG)."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import tensorflow as tf
from typing_extensions import override

from keras_natgrad.capture import LinearMap, ParameterLayout, register_layer
from keras_natgrad.capture.dense import merge_middle_axes

_PENALTIES = ("regularizer", "constraint")


@keras.saving.register_keras_serializable(package="keras_natgrad")
class WhitenedDense(keras.layers.Dense):
    r"""A `Dense` layer `a = (h − μ) M V + d` that trains V and d.

    The matrix M and the mean μ of the inputs are not trained; they start as I
    and 0, where the layer is a plain `Dense`, and are set by
    `keras_natgrad.callbacks.Whiten` so that `(h − μ) M` is white. What the
    layer computes does not change with them: its canonical weights are

        W = M V,   b = d − μᵀ W.

    Gradient descent on (V, d) is natural gradient descent on (W, b) with the
    Fisher `E[h̄h̄ᵀ] ⊗ I`; see `keras_natgrad.PRONG` for the same step without
    another layer. A forward pass costs `N n²` more, memory `n² + n`.

    A saved file holds the canonical weights as `kernel` and `bias`, beside
    what training continues from.

    Args:
        units: Number of outputs.
        **kwargs: As of `keras.layers.Dense`, without regularizers and
            constraints of the weights, which would act on V and d, and
            without LoRA and quantisation.

    Raises:
        ValueError: If one of these is given.

    Example:

    ```python
    model = keras.Sequential(
        [
            keras.Input((64,)),
            keras_natgrad.layers.WhitenedDense(32, activation="relu"),
            keras_natgrad.layers.WhitenedDense(10),
        ]
    )
    model.compile(keras.optimizers.SGD(0.1), loss=loss)
    model.fit(x, y, callbacks=[keras_natgrad.callbacks.Whiten(x[:1000])])
    plain = keras_natgrad.layers.canonical(model)
    ```

    References:
        - Desjardins et al., 2015, arXiv:1507.00210.
    """

    def __init__(self, units: int, **kwargs: Any) -> None:
        super().__init__(units, **kwargs)
        check_plain(self)

    @override
    def build(self, input_shape: Any) -> None:
        super().build(input_shape)
        features = int(input_shape[-1])
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

    @override
    def call(self, inputs: Any, training: Any = None) -> Any:
        return super().call(self.whiten(inputs), training=training)

    def whiten(self, inputs: Any) -> Any:
        """Returns `(h − μ) M`.

        Args:
            inputs: Tensor `[..., n]`.
        """
        return keras.ops.matmul(inputs - self.centre, self.whitening)

    # -- Canonical weights -------------------------------------------------

    def canonical_weights(self) -> list[np.ndarray]:
        """Returns (W[, b]) of the plain `Dense` layer that this one is."""
        kernel = _float64(self.whitening) @ _float64(self.kernel)
        arrays = [kernel]
        if self.bias is not None:
            arrays.append(_float64(self.bias) - _float64(self.centre) @ kernel)
        return [array.astype(_numpy_dtype(self.kernel)) for array in arrays]

    def set_canonical_weights(self, weights: list[np.ndarray]) -> None:
        """Becomes the plain `Dense` layer with the weights (W[, b])."""
        features = int(self.centre.shape[0])
        self.whitening.assign(np.eye(features))
        self.centre.assign(np.zeros(features))
        self.kernel.assign(weights[0])
        if self.bias is not None:
            self.bias.assign(weights[1])

    @classmethod
    def from_dense(cls, layer: keras.layers.Dense) -> WhitenedDense:
        """Returns an unbuilt layer with the settings of a `Dense` layer.

        Args:
            layer: A `keras.layers.Dense`.

        Raises:
            ValueError: If it is another layer, or has what this one cannot.
        """
        if type(layer) is not keras.layers.Dense:
            raise ValueError(
                "`WhitenedDense` stands for keras.layers.Dense only. Received: "
                f"layer {layer.name!r} of type {type(layer).__name__}"
            )
        check_plain(layer)
        return cls.from_config(layer.get_config())

    def to_dense(self) -> keras.layers.Dense:
        """Returns an unbuilt `Dense` layer with the same settings."""
        return keras.layers.Dense.from_config(self.get_config())

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
                f"WhitenedDense layer. Received: keys={sorted(store.keys())}, "
                f"missing={missing}"
            )
        for key, variable in self._saved().items():
            variable.assign(store[key])


def check_plain(layer: keras.layers.Dense) -> None:
    """Raises ValueError for settings that whitening would change.

    Args:
        layer: A `Dense` layer.
    """
    found = [
        f"{part}_{penalty}"
        for part in ("kernel", "bias")
        for penalty in _PENALTIES
        if getattr(layer, f"{part}_{penalty}") is not None
    ]
    found += [
        name
        for name in ("lora_rank", "quantization_config", "quantization_mode")
        if getattr(layer, name, None) is not None
    ]
    if found:
        raise ValueError(
            "`WhitenedDense` trains other weights than the layer computes "
            f"with, and cannot have {', '.join(found)}. "
            f"Received: layer={layer.name!r}"
        )


@register_layer(WhitenedDense)
def describe_whitened_dense(layer: WhitenedDense) -> LinearMap:
    """`z = (x − μ) M V + d`; the canonical inputs are the white ones."""
    inputs, outputs = (int(side) for side in layer.kernel.shape)
    biased = layer.bias is not None

    def white(x: tf.Tensor) -> tf.Tensor:
        return merge_middle_axes(layer.whiten(x), inputs)

    return LinearMap(
        variables=(layer.kernel, layer.bias) if biased else (layer.kernel,),
        layout=ParameterLayout.of_matrix(inputs, outputs, bias=biased),
        inputs=white,
        cotangents=lambda g: merge_middle_axes(g, outputs),
    )


def _float64(variable: Any) -> np.ndarray:
    return np.asarray(keras.ops.convert_to_numpy(variable), np.float64)


def _numpy_dtype(variable: Any) -> Any:
    return keras.ops.convert_to_numpy(variable).dtype
