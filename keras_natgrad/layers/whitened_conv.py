"""Convolutions with the weights of whitened patches (PRONG)."""

from __future__ import annotations

import dataclasses
from typing import Any

import keras
from typing_extensions import override

from keras_natgrad.capture import LinearMap, register_layer
from keras_natgrad.capture.convolution import convolution_map
from keras_natgrad.capture.images import patches
from keras_natgrad.layers.whitened_layer import WhitenedLayer
from keras_natgrad.linalg import Rows


class _WhitenedConv(WhitenedLayer):
    """A whitened convolution, computed as one convolution with W."""

    @override
    def rows(self, inputs: Any) -> Rows:
        return patches(self, inputs)

    @override
    def call(self, inputs: Any) -> Any:
        ops = keras.ops
        shape = self.kernel.shape
        # W = M V costs n² m, white patches n² per position.
        kernel = ops.matmul(
            self.whitening, ops.reshape(self.kernel, (-1, self.filters))
        )
        padding = self.padding
        if padding == "causal":
            inputs, padding = self._causal(inputs), "valid"
        outputs = ops.conv(
            inputs,
            ops.reshape(kernel, shape),
            strides=list(self.strides),
            padding=padding,
            dilation_rate=self.dilation_rate,
            data_format=self.data_format,
        )
        if self.bias is not None:
            bias = self.bias - ops.matmul(self.centre, kernel)
            if self.data_format == "channels_first":
                bias = ops.reshape(bias, (-1, *[1] * self.rank))
            outputs = ops.add(outputs, bias)
        return self.activation(outputs)

    def _causal(self, inputs: Any) -> Any:
        """Returns inputs `[batch, steps, channels]` with zeros in front."""
        before = self.dilation_rate[0] * (self.kernel_size[0] - 1)
        axis = 1 if self.data_format == "channels_last" else 2
        widths = [(0, 0), (0, 0), (0, 0)]
        widths[axis] = (before, 0)
        return keras.ops.pad(inputs, widths)


@keras.saving.register_keras_serializable(package="keras_natgrad")
class WhitenedConv1D(_WhitenedConv, keras.layers.Conv1D):
    """A `Conv1D` layer that trains the weights of whitened patches.

    See `keras_natgrad.layers.WhitenedConv2D`, which has the same arguments.

    Args:
        filters: Number of outputs.
        kernel_size: Length of the window.
        **kwargs: Arguments of `keras.layers.Conv1D`, except groups,
            regularizers and constraints of the weights, LoRA and quantisation.

    Raises:
        ValueError: If one of these is given.
    """

    plain_class = keras.layers.Conv1D


@keras.saving.register_keras_serializable(package="keras_natgrad")
class WhitenedConv2D(_WhitenedConv, keras.layers.Conv2D):
    r"""A `Conv2D` layer `a = (h − μ) M V + d` that trains V and d.

    h is a patch: the n inputs of one position, kernel offsets × channels,
    including the zeros of the padding. The matrix M and the mean μ of all
    patches are not trained. They start as I and 0, so the layer starts as a
    plain `Conv2D`; `keras_natgrad.callbacks.Whiten` sets them so that
    `(h − μ) M` is white over examples and positions. The layer still computes
    the same function, with the canonical weights

        W = M V,   b = d − μᵀ W.

    The layer is one convolution with W and b, at the borders too, so neither
    patches nor white patches are formed. With m filters, a forward pass costs
    `n² m` more than a plain one for any number of positions, and so does a
    backward pass; memory `n² + n`.

    Gradient descent on (V, d) is natural gradient descent on (W, b) with the
    Fisher `E[h̄h̄ᵀ] ⊗ I`; `keras_natgrad.PRONG` makes the same step with plain
    layers.

    A saved file holds the canonical weights as `kernel` and `bias`, and the
    state from which training continues.

    Args:
        filters: Number of outputs m.
        kernel_size: Sides of the window.
        **kwargs: Arguments of `keras.layers.Conv2D`, except groups,
            regularizers and constraints of the weights, LoRA and quantisation.

    Raises:
        ValueError: If one of these is given.

    Example:

    ```python
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras_natgrad.layers.WhitenedConv2D(4, 3, activation="relu"),
            keras.layers.Flatten(),
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

    plain_class = keras.layers.Conv2D


@keras.saving.register_keras_serializable(package="keras_natgrad")
class WhitenedConv3D(_WhitenedConv, keras.layers.Conv3D):
    """A `Conv3D` layer that trains the weights of whitened patches.

    See `keras_natgrad.layers.WhitenedConv2D`, which has the same arguments.

    Args:
        filters: Number of outputs.
        kernel_size: Sides of the window.
        **kwargs: Arguments of `keras.layers.Conv3D`, except groups,
            regularizers and constraints of the weights, LoRA and quantisation.

    Raises:
        ValueError: If one of these is given.
    """

    plain_class = keras.layers.Conv3D


@register_layer(WhitenedConv1D)
@register_layer(WhitenedConv2D)
@register_layer(WhitenedConv3D)
def describe_whitened_convolution(layer: Any) -> LinearMap:
    """`z = (patch − μ) M V + d`; the canonical inputs are the white patches."""
    return dataclasses.replace(convolution_map(layer), inputs=layer.white_rows)
