"""From Keras models to reference networks; uses Keras, not the package."""

from __future__ import annotations

from collections.abc import Sequence

import keras
import numpy as np

from tests.reference.network import Array, Linear, MeanPool, Network


def matrix_of(layer: keras.layers.Dense) -> Array:
    """Kernel and bias of a Dense layer as one matrix."""
    kernel = np.asarray(layer.kernel, np.float64)
    if layer.bias is None:
        return kernel
    return np.concatenate([kernel, np.asarray(layer.bias, np.float64)[None]])


def patches_of(layer: keras.layers.Layer, x: Array) -> Array:
    """The inputs of every position of a convolution, `[positions, n]`.

    A convolution whose kernel is the n × n identity copies them.

    Args:
        layer: A Conv1D, Conv2D or Conv3D, channels last.
        x: Its inputs.
    """
    features = int(np.prod(layer.kernel_size)) * x.shape[-1]
    config = layer.get_config()
    config.update(filters=features, use_bias=False, activation=None)
    copy = type(layer).from_config(config)
    copy.build(x.shape)
    copy.kernel.assign(np.eye(features).reshape(copy.kernel.shape))
    return np.asarray(copy(x)).reshape(-1, features)


def network_of(
    layers: Sequence[keras.layers.Layer],
    sources: dict[int, int] | None = None,
    outputs: Sequence[int] = (-1,),
) -> Network:
    """Returns the network that applies Keras layers one after another.

    Args:
        layers: Dense and GlobalAveragePooling1D layers; a layer that occurs
            twice has tied weights.
        sources: Node that a stage reads, where it is not the previous one.
        outputs: Nodes that are outputs.
    """
    sources = sources or {}
    dense: list[keras.layers.Dense] = []
    stages: list[Linear | MeanPool] = []
    for index, layer in enumerate(layers):
        source = sources.get(index, -1)
        if isinstance(layer, keras.layers.GlobalAveragePooling1D):
            stages.append(MeanPool(source))
            continue
        if not any(layer is known for known in dense):
            dense.append(layer)
        parameter = next(i for i, each in enumerate(dense) if each is layer)
        activation = layer.activation.__name__
        stages.append(Linear(parameter, activation, source))
    return Network(
        [matrix_of(layer) for layer in dense],
        [layer.bias is not None for layer in dense],
        stages,
        outputs,
    )


def dense_layers(model: keras.Model) -> list[keras.layers.Dense]:
    """The Dense layers of a model, in order."""
    return [
        layer for layer in model.layers if isinstance(layer, keras.layers.Dense)
    ]


def randomize(model: keras.Model, seed: int = 0, scale: float = 0.7) -> None:
    """Gives every weight, biases too, a random value."""
    rng = np.random.default_rng(seed)
    for variable in model.weights:
        variable.assign(scale * rng.normal(size=tuple(variable.shape)))


def mlp(
    sizes: Sequence[int],
    activation: str = "tanh",
    bias: bool = True,
    positions: int | None = None,
    pool: bool = False,
    seed: int = 0,
) -> keras.Sequential:
    """A small random network; the last layer is linear.

    Args:
        sizes: Numbers of features, inputs first.
        activation: Of the hidden layers.
        bias: Whether layers have a bias.
        positions: Length of the input sequence, or `None` for vectors.
        pool: Whether to average over positions before the last layer.
        seed: Of the weights.
    """
    shape = sizes[:1] if positions is None else (positions, sizes[0])
    model = keras.Sequential([keras.Input(tuple(shape))])
    for index, size in enumerate(sizes[1:]):
        last = index == len(sizes) - 2
        if pool and last:
            model.add(keras.layers.GlobalAveragePooling1D())
        model.add(
            keras.layers.Dense(
                size,
                activation="linear" if last else activation,
                use_bias=bias,
            )
        )
    randomize(model, seed)
    return model
