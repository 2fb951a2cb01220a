"""A dense layer with the weights of whitened inputs (PRONG)."""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf
from typing_extensions import override

from keras_natgrad.capture import LinearMap, ParameterLayout, register_layer
from keras_natgrad.capture.dense import merge_middle_axes
from keras_natgrad.layers.whitened_layer import WhitenedLayer


@keras.saving.register_keras_serializable(package="keras_natgrad")
class WhitenedDense(WhitenedLayer, keras.layers.Dense):
    r"""A `Dense` layer `a = (h − μ) M V + d` that trains V and d.

    The matrix M and the mean μ of the inputs are not trained. They start as I
    and 0, so the layer starts as a plain `Dense`;
    `keras_natgrad.callbacks.Whiten` sets them so that `(h − μ) M` is white. The
    layer still computes the same function, with the canonical weights

        W = M V,   b = d − μᵀ W.

    Gradient descent on (V, d) is natural gradient descent on (W, b) with the
    Fisher `E[h̄h̄ᵀ] ⊗ I`; see `keras_natgrad.PRONG` for the same step with
    plain layers. A forward pass costs `N n²` more, memory `n² + n`.

    A saved file holds the canonical weights as `kernel` and `bias`, and the
    state from which training continues.

    Args:
        units: Number of outputs.
        **kwargs: Arguments of `keras.layers.Dense`, except LoRA, quantisation,
            and regularizers and constraints of the weights, which would act on
            V and d.

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

    plain_class = keras.layers.Dense

    def __init__(self, units: int, **kwargs: Any) -> None:
        super().__init__(units, **kwargs)

    @override
    def call(self, inputs: Any, training: Any = None) -> Any:
        return super().call(self.whiten(inputs), training=training)

    @override
    def rows(self, inputs: Any) -> tf.Tensor:
        return merge_middle_axes(inputs, int(self.centre.shape[0]))


@register_layer(WhitenedDense)
def describe_whitened_dense(layer: WhitenedDense) -> LinearMap:
    """`z = (x − μ) M V + d`; the canonical inputs are the white ones."""
    inputs, outputs = (int(side) for side in layer.kernel.shape)
    biased = layer.bias is not None
    return LinearMap(
        variables=(layer.kernel, layer.bias) if biased else (layer.kernel,),
        layout=ParameterLayout.of_matrix(inputs, outputs, bias=biased),
        inputs=layer.white_rows,
        cotangents=lambda g: merge_middle_axes(g, outputs),
    )
