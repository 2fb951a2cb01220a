"""Tensor functions shared by the heads."""

import keras
import tensorflow as tf


def as_parameters(outputs: tf.Tensor) -> tf.Tensor:
    """Converts model outputs to the dtype that a head computes in.

    float64 stays float64; half-precision outputs are computed in float32.
    Integers, e.g. in a list, get the float type of Keras.

    Args:
        outputs: Tensor or array of real numbers.

    Returns:
        `outputs` as a tensor of dtype float32 or float64.

    Raises:
        ValueError: If the outputs are not real numbers.
    """
    outputs = tf.convert_to_tensor(outputs)
    if outputs.dtype.is_integer:
        outputs = tf.cast(outputs, keras.config.floatx())
    if not outputs.dtype.is_floating:
        raise ValueError(
            "The outputs of a model must be real numbers; cast them to "
            f"'float32'. Received: outputs.dtype={outputs.dtype.name!r}"
        )
    if outputs.dtype in (tf.float16, tf.bfloat16):
        return tf.cast(outputs, tf.float32)
    return outputs


def cast_like(value: tf.Tensor, parameters: tf.Tensor) -> tf.Tensor:
    """Converts `value` to a tensor with the dtype of `parameters`."""
    return tf.cast(tf.convert_to_tensor(value), parameters.dtype)


def clip_with_gradient(
    value: tf.Tensor, highest: float | None = None
) -> tf.Tensor:
    """Clips to `[ε, highest − ε]`, `ε = keras.config.epsilon()`, as Keras does.

    Derivatives pass through the clipping.

    Args:
        value: Floating-point tensor.
        highest: The upper end of the range, or `None` for no bound.

    Returns:
        Tensor of the same shape and dtype.
    """
    epsilon = keras.config.epsilon()
    if highest is None:
        clip = tf.grad_pass_through(lambda x: tf.maximum(x, epsilon))
    else:
        clip = tf.grad_pass_through(
            lambda x: tf.clip_by_value(x, epsilon, highest - epsilon)
        )
    return clip(value)


def match_targets(parameters: tf.Tensor, targets: tf.Tensor) -> tf.Tensor:
    """Gives real-valued targets the shape and dtype of the parameters.

    A trailing axis of size one may be missing or superfluous, as in Keras.
    Nothing else is broadcast: targets of shape `[N]` or `[N, 1]` silently
    compared with outputs of shape `[N, K]` are the classic regression bug.

    Args:
        parameters: Tensor of shape `[..., K]`.
        targets: Tensor of shape `[..., K]`, or `[...]` if `K` is one.

    Returns:
        The targets, with the shape and dtype of `parameters`.

    Raises:
        ValueError: If the shapes do not match.
    """
    targets = cast_like(targets, parameters)
    rank = parameters.shape.rank
    aligned = targets
    if targets.shape.rank == rank - 1 and parameters.shape[-1] == 1:
        aligned = targets[..., tf.newaxis]
    elif targets.shape.rank == rank + 1 and targets.shape[-1] == 1:
        aligned = tf.squeeze(targets, axis=-1)
    if not aligned.shape.is_compatible_with(parameters.shape):
        raise ValueError(
            "The targets must have the shape of the outputs, one target per "
            "parameter of the last axis. Reshape or repeat the targets to "
            f"shape {tuple(parameters.shape)}. Received: "
            f"targets.shape={tuple(targets.shape)}, "
            f"outputs.shape={tuple(parameters.shape)}"
        )
    return aligned


def are_counts(targets: tf.Tensor, total_count: float) -> tf.Tensor:
    """Tells whether targets `[..., K]` are counts with this total."""
    counts = tf.equal(targets, tf.floor(targets)) & (targets >= 0)
    total = tf.reduce_sum(targets, axis=-1)
    return tf.reduce_all(counts) & tf.reduce_all(
        tf.equal(total, tf.cast(total_count, total.dtype))
    )
