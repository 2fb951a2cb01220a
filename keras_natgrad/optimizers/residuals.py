"""A step on residuals: evaluation, checks, gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from keras_natgrad.curvature.residual_root import (
    JacobianRoot,
    ResidualGroup,
    TapeRoot,
    pointwise_jacobian,
)
from keras_natgrad.optimizers.observation import Observation, all_finite
from keras_natgrad.solvers import FisherRoot


@dataclass(frozen=True)
class ResidualObservation(Observation):
    """Residuals on their way to the step.

    Attributes:
        root: R of the residuals.
    """

    root: FisherRoot


def observe_residuals(
    residuals: Any,
    variables: Sequence[Any],
    points: Any,
    weights: Sequence[float] | None,
    needs_jacobian: bool,
) -> tuple[ResidualObservation, list[tf.Tensor]]:
    """Evaluates residuals, and what a solver asks of them.

    Args:
        residuals: See `NaturalGradient.minimize_residuals`.
        variables: `keras.Variable`s.
        points: See there.
        weights: See there.
        needs_jacobian: Whether the solver needs the Jacobian as a matrix.

    Returns:
        The observation, and the gradient of the loss.
    """
    tensors = [variable.value for variable in variables]
    functions, arguments = _functions(residuals, points)

    def evaluate() -> list[ResidualGroup]:
        values: list[Any] = []
        for function, own in zip(functions, arguments, strict=True):
            result = function(*own)
            many = isinstance(result, (list, tuple))
            values.extend(result if many else [result])
        return _groups(values, weights)

    with tf.GradientTape(persistent=True) as tape:
        groups = evaluate()
        loss = tf.add_n([group.loss() for group in groups])
    _check_dtypes(loss, variables)
    gradients = tape.gradient(loss, tensors)
    if all(gradient is None for gradient in gradients):
        raise ValueError(
            "The residuals do not depend on the variables. Compute them from "
            "the model inside the function that is passed, or pass the "
            "variables that they depend on. Received: variables="
            f"{[variable.path for variable in variables]}"
        )
    gradients = [
        tf.zeros_like(v) if g is None else tf.convert_to_tensor(g)
        for g, v in zip(gradients, tensors, strict=True)
    ]
    factor: FisherRoot
    if points is not None and needs_jacobian:
        _check_rows(groups, arguments)
        jacobians = [
            pointwise_jacobian(function, own[0], tensors)
            for function, own in zip(functions, arguments, strict=True)
        ]
        factor = JacobianRoot(groups, tensors, jacobians)
    else:
        factor = TapeRoot(groups, tensors, tape)

    def objective() -> tf.Tensor:
        return tf.add_n([group.loss() for group in evaluate()])

    fine = all_finite(gradients) & tf.math.is_finite(loss)
    return (
        ResidualObservation(loss, objective, fine, tf.constant(True), factor),
        gradients,
    )


def _functions(
    residuals: Any, points: Any
) -> tuple[list[Callable[..., Any]], list[tuple[Any, ...]]]:
    """Returns the functions of residuals, and the arguments of each."""
    many = isinstance(residuals, (list, tuple))
    functions = list(residuals) if many else [residuals]
    if not functions or not all(callable(each) for each in functions):
        raise ValueError(
            "`residuals` must be a function, or a tuple of functions with one "
            f"element of `points` each. Received: residuals={residuals!r}"
        )
    if points is None:
        if many:
            raise ValueError(
                "A tuple of residual functions needs `points`, one element "
                "per function; or pass one function that returns a tuple. "
                "Received: points=None"
            )
        return functions, [()]
    own = list(points) if many else [points]
    if len(own) != len(functions):
        raise ValueError(
            "`points` must have one element per residual function. Received: "
            f"{len(functions)} functions and {len(own)} elements of points"
        )
    return functions, [(tf.nest.map_structure(_tensor, each),) for each in own]


def _tensor(value: Any) -> tf.Tensor:
    return tf.convert_to_tensor(value)


def _groups(
    values: Sequence[Any], weights: Sequence[float] | None
) -> list[ResidualGroup]:
    values = [tf.convert_to_tensor(value) for value in values]
    for value in values:
        if not value.dtype.is_floating:
            raise ValueError(
                "Residuals must be floating-point tensors. Received: a tensor "
                f"of shape {value.shape} and dtype {value.dtype.name}"
            )
    if weights is None:
        weights = [1.0] * len(values)
    if len(weights) != len(values):
        raise ValueError(
            "`weights` must have one entry per tensor of residuals. Received: "
            f"{len(weights)} weights and {len(values)} tensors"
        )
    for weight in weights:
        if not weight >= 0:
            raise ValueError(
                "`weights` must be non-negative. "
                f"Received: weights={list(weights)!r}"
            )
    return [
        ResidualGroup(value, float(weight))
        for value, weight in zip(values, weights, strict=True)
    ]


def _check_dtypes(loss: tf.Tensor, variables: Sequence[Any]) -> None:
    others = {variable.dtype for variable in variables} - {loss.dtype.name}
    if others:
        raise ValueError(
            "Residuals and variables must have one precision; write e.g. "
            "keras.config.set_floatx('float64') before building the model. "
            f"Received: residuals of dtype {loss.dtype.name} and variables of "
            f"dtype {sorted(others)}"
        )


def _check_rows(
    groups: Sequence[ResidualGroup], arguments: Sequence[tuple[Any, ...]]
) -> None:
    if len(groups) != len(arguments):
        raise ValueError(
            "With `points`, every function must return one tensor. Received: "
            f"{len(groups)} tensors from {len(arguments)} functions"
        )
    for group, (points,) in zip(groups, arguments, strict=True):
        count = tf.nest.flatten(points)[0].shape[0]
        shape = group.values.shape
        if shape.rank not in (1, 2) or shape[0] != count:
            raise ValueError(
                "A function of N points must return residuals of shape (N,) "
                f"or (N, k). Received: shape {shape} for {count} points"
            )
