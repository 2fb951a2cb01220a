"""A small character-level transformer, and its text.

The text are the help topics of Python's own standard library: nothing is
downloaded. It differs a little from one version of Python to the next.

References:
    - Radford et al., 2019 (GPT-2: blocks with normalisation first).
"""

from __future__ import annotations

import keras
import numpy as np
from keras import ops

from benchmarks.data import normal_kernel, weight_generator

EPSILON = 1e-5


def help_text() -> str:
    """Returns the help topics of the standard library, sorted by name."""
    from pydoc_data.topics import topics

    return "".join(topics[name] for name in sorted(topics))


def encode(text: str) -> tuple[np.ndarray, str]:
    """Returns a text as integers, and the characters that they stand for."""
    vocabulary = "".join(sorted(set(text)))
    place = {character: i for i, character in enumerate(vocabulary)}
    codes = np.array([place[character] for character in text], "int32")
    return codes, vocabulary


def windows(codes: np.ndarray, context: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns all windows of a text, with the next characters as targets.

    Args:
        codes: The text as integers, `(length,)`.
        context: Characters in a window.

    Returns:
        Inputs and targets `(length - context, context)`. They are views.
    """
    every = np.lib.stride_tricks.sliding_window_view(codes, context + 1)
    return every[:, :-1], every[:, 1:]


def build_transformer(
    vocabulary: int,
    context: int,
    seed: int,
    width: int = 64,
    blocks: int = 2,
    heads: int = 4,
) -> keras.Model:
    """Builds a decoder: tokens `(batch, context)` to logits of the next one.

    Args:
        vocabulary: Number of tokens.
        context: Tokens in a window.
        seed: Seed of the initial weights: normal, of variance one over the
            number of inputs, and one over the width for the embeddings.
        width: Width of the residual stream; the feed-forward layers are four
            times as wide.
        blocks: Number of blocks.
        heads: Attention heads.

    Returns:
        The model. The output layer has the name `"output"`.
    """
    tokens = keras.Input((context,), dtype="int32")
    # The positions have a batch axis, so that their embedding is one matrix
    # applied to every example like all others.
    positions = ops.zeros_like(tokens) + ops.arange(context, dtype="int32")
    x = keras.layers.Embedding(vocabulary, width, name="token_embedding")(
        tokens
    )
    x = x + keras.layers.Embedding(context, width, name="position_embedding")(
        positions
    )
    for _ in range(blocks):
        x = x + _attention(_normalised(x), width, heads)
        x = x + _feed_forward(_normalised(x), width)
    logits = keras.layers.Dense(vocabulary, name="output")(_normalised(x))
    model = keras.Model(tokens, logits)
    _initialise(model, width, seed)
    return model


def _normalised(x):
    return keras.layers.LayerNormalization(epsilon=EPSILON)(x)


def _attention(x, width: int, heads: int):
    layer = keras.layers.MultiHeadAttention(heads, width // heads)
    return layer(x, x, use_causal_mask=True)


def _feed_forward(x, width: int):
    x = keras.layers.Dense(4 * width, activation="gelu")(x)
    return keras.layers.Dense(width)(x)


def _initialise(model: keras.Model, width: int, seed: int) -> None:
    generator = weight_generator(seed)
    for variable in model.trainable_variables:
        shape = tuple(variable.shape)
        if variable.name == "embeddings":
            value = generator.normal(0.0, width**-0.5, shape)
        elif variable.name == "kernel":
            # Projections to heads are (width, heads, size), that from them
            # is (heads, size, width).
            inputs = 1 if shape[0] == width else len(shape) - 1
            value = normal_kernel(shape, 1.0, generator, inputs)
        else:
            continue
        variable.assign(value)
