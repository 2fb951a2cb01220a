"""ResNet-20, the residual network of He et al. for CIFAR-10, for grey images.

Three stages of three blocks with 16, 32 and 64 channels. A block is
`relu(x + bn(conv(relu(bn(conv(x))))))` with 3×3 kernels. Shortcuts have no
weights: where a stage halves the image they take every second pixel and fill
the new channels with zeros.

References:
    - He, Zhang, Ren & Sun, 2016, arXiv:1512.03385 (section 4.2).
    - He, Zhang, Ren & Sun, 2015, arXiv:1502.01852 (the initial weights).
"""

from __future__ import annotations

import keras
from keras import ops

from benchmarks.data import normal_kernel, weight_generator

STAGES = (16, 32, 64)
BLOCKS = 3


def build_resnet(
    size: int,
    classes: int,
    seed: int,
    stages: tuple[int, ...] = STAGES,
    blocks: int = BLOCKS,
) -> keras.Model:
    """Builds the network.

    Args:
        size: Height and width of the images.
        classes: Number of outputs, logits.
        seed: Seed of the initial weights: normal, of variance two over the
            number of inputs.
        stages: Channels of every stage.
        blocks: Residual blocks of every stage.

    Returns:
        The model. The output layer has the name `"output"`.
    """
    inputs = keras.Input((size, size, 1))
    x = keras.layers.ReLU()(_convolution(inputs, stages[0]))
    for stage, channels in enumerate(stages):
        for block in range(blocks):
            x = _block(x, channels, 2 if stage and not block else 1)
    x = keras.layers.GlobalAveragePooling2D()(x)
    outputs = keras.layers.Dense(classes, name="output")(x)
    model = keras.Model(inputs, outputs)
    generator = weight_generator(seed)
    for variable in model.trainable_variables:
        if variable.name == "kernel":
            variable.assign(normal_kernel(variable.shape, 2.0, generator))
    return model


def estimate_statistics(model: keras.Model, x) -> None:
    """Sets all moving statistics to those of one batch.

    Args:
        model: A model with batch normalisation at its top level.
        x: The batch.
    """
    layers = [
        layer
        for layer in model.layers
        if isinstance(layer, keras.layers.BatchNormalization)
    ]
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.momentum = 0.0
    model(x, training=True)
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum


def _convolution(x, channels: int, strides: int = 1):
    x = keras.layers.Conv2D(
        channels, 3, strides=strides, padding="same", use_bias=False
    )(x)
    return keras.layers.BatchNormalization()(x)


def _block(x, channels: int, strides: int):
    y = keras.layers.ReLU()(_convolution(x, channels, strides))
    y = _convolution(y, channels)
    new = channels - x.shape[-1]
    if strides > 1:
        x = keras.layers.MaxPooling2D(1, strides=strides)(x)
    if new:
        x = ops.pad(x, [[0, 0], [0, 0], [0, 0], [0, new]])
    return keras.layers.ReLU()(keras.layers.Add()([x, y]))
