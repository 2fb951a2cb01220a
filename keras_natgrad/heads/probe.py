"""What is known about a distribution before there are any outputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import keras
import tensorflow as tf

from keras_natgrad.heads.probability import distributions

Found = TypeVar("Found")


def probe(
    function: Callable[[tf.Tensor, tf.Tensor], Found], parameter_count: int
) -> Found:
    """Calls a function with unknown outputs, without computing anything.

    It is traced like a part of a model, so it may use constants and variables
    from outside. Constants determine the float type: that of Keras, or else the
    other one.

    Args:
        function: Takes two unrelated tensors of outputs, `[2, K]` each.
        parameter_count: K.

    Returns:
        What the function returns.
    """
    wide = keras.config.floatx() == "float64"
    first, second = (
        (tf.float64, tf.float32) if wide else (tf.float32, tf.float64)
    )
    try:
        return _trace(function, parameter_count, first)
    except (TypeError, ValueError) as error:
        try:
            return _trace(function, parameter_count, second)
        except (TypeError, ValueError):
            raise error from None


def _trace(
    function: Callable[[tf.Tensor, tf.Tensor], Found],
    parameter_count: int,
    dtype: tf.DType,
) -> Found:
    found: list[Found] = []

    def traced(outputs: tf.Tensor, others: tf.Tensor) -> None:
        found.append(function(outputs, others))

    spec = tf.TensorSpec([2, parameter_count], dtype)
    tf.function(traced, autograph=False).get_concrete_function(spec, spec)
    return found[-1]


class Inspection(NamedTuple):
    """What is known about the distributions that a function makes.

    Attributes:
        name: Name of their class.
        methods: The ways to find their Fisher matrix, best first.
        support_size: Number of values of a finite support, or `None`.
    """

    name: str
    methods: tuple[str, ...]
    support_size: int | None


def inspect(
    make: Callable[[tf.Tensor], Any], parameter_count: int
) -> Inspection:
    """Checks the distributions that a function makes, and finds the methods.

    Args:
        make: Function from outputs `[..., K]` to a distribution.
        parameter_count: K.

    Returns:
        An `Inspection`.

    Raises:
        ValueError: If it does not make a distribution over one tensor per
            example.
    """

    def both(outputs: tf.Tensor, others: tf.Tensor) -> Inspection:
        made = make(outputs)
        _check(made)
        methods, support = ["monte_carlo"], finite_support(made)
        if _has_smooth_divergence(made, make(others)):
            methods.insert(0, "kl_divergence")
        if support is not None:
            methods.insert(0, "summation")
        size = None if support is None else int(support.shape[0])
        return Inspection(type(made).__name__, tuple(methods), size)

    return probe(both, parameter_count)


def _check(made: Any) -> None:
    if not isinstance(made, distributions().Distribution):
        raise ValueError(
            "`make` must return a tfp.distributions.Distribution. "
            f"Received: {made!r} of type {type(made).__name__}"
        )
    if not isinstance(made.event_shape, tf.TensorShape):
        raise ValueError(
            "`make` must return a distribution of one tensor, not of several. "
            "Put its parts side by side with tfp.distributions.Blockwise or "
            "keras_natgrad.heads.Joint. Received: "
            f"{type(made).__name__} of event shape {made.event_shape}"
        )
    if made.batch_shape.rank != 1:
        raise ValueError(
            "`make` must return one distribution per example: from "
            "outputs of shape (2, K), one of batch shape (2,). Wrap "
            "several units in tfp.distributions.Independent. "
            f"Received: batch shape {made.batch_shape}"
        )


def finite_support(distribution: Any) -> tf.Tensor | None:
    """Returns all values of a finite support, `[R, ...]`, or `None`."""
    tfd = distributions()
    dtype = distribution.dtype
    if isinstance(distribution, tfd.Bernoulli):
        return tf.constant([0, 1], dtype)
    if isinstance(distribution, tfd.FiniteDiscrete):
        outcomes = distribution.outcomes
        return outcomes if outcomes.shape.rank == 1 else None
    if isinstance(distribution, (tfd.Categorical, tfd.OrderedLogistic)):
        parameter = (
            distribution.cutpoints
            if isinstance(distribution, tfd.OrderedLogistic)
            else distribution.logits_parameter()
        )
        count = parameter.shape[-1]
        if count is None:
            return None
        if isinstance(distribution, tfd.OrderedLogistic):
            count += 1
        return tf.range(count, dtype=dtype)
    if isinstance(distribution, tfd.OneHotCategorical):
        count = distribution.event_shape[-1]
        return None if count is None else tf.eye(count, dtype=dtype)
    if isinstance(distribution, tfd.Binomial):
        count = tf.get_static_value(distribution.total_count)
        if count is None or count.size != 1:
            return None
        return tf.range(int(count) + 1, dtype=dtype)
    return None


def _has_smooth_divergence(distribution: Any, other: Any) -> bool:
    """Tells whether the Hessian of TFP's divergence is the Fisher matrix.

    The two must come from different outputs. Transformed distributions have a
    divergence only if their transformations are equal; it is then that of their
    bases, without the outputs that change the transformation.

    Two of TFP's divergences have wrong derivatives at equality: the Laplace one
    is `|Δ| + exp(−|Δ|)`, whose kinks cancel, but not for automatic
    differentiation, which takes `sign(0) = 0`; the uniform one is infinite on
    one side.
    """
    tfd = distributions()
    parts = (distribution, *distribution.submodules)
    if any(isinstance(part, (tfd.Laplace, tfd.Uniform)) for part in parts):
        return False
    try:
        distribution.kl_divergence(other)
    except NotImplementedError:
        return False
    return True
