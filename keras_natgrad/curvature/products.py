"""Products with the exact Fisher of the whole network."""

from __future__ import annotations

from collections.abc import Sequence

import tensorflow as tf

from keras_natgrad.curvature.cotangents import OutputTerm


def jacobian_vector_products(
    tape: tf.GradientTape,
    terms: Sequence[OutputTerm],
    variables: Sequence[tf.Variable],
    direction: Sequence[tf.Tensor],
) -> list[tf.Tensor]:
    """Returns `J δ` at every output, without another forward pass.

    The gradient `Jᵀ u` is linear in `u`, so that the gradient of `⟨Jᵀu, δ⟩`
    with respect to `u` is `J δ` (the double-backward trick). In a graph the
    values of `Jᵀu` are never computed, only what depends on δ: two matrix
    products per layer.

    Args:
        tape: Persistent tape that recorded the forward pass.
        terms: The outputs of that pass.
        variables: The variables that δ moves.
        direction: δ, one tensor per variable.

    Returns:
        One tensor per term, shaped like its outputs.
    """
    with tf.GradientTape(watch_accessed_variables=False) as outer:
        probes = [tf.zeros_like(term.outputs) for term in terms]
        outer.watch(probes)
        gradients = tape.gradient(
            [term.outputs for term in terms],
            variables,
            output_gradients=probes,
        )
        inner = tf.add_n(
            [
                tf.reduce_sum(tf.convert_to_tensor(g) * tf.cast(d, g.dtype))
                for g, d in zip(gradients, direction, strict=True)
                if g is not None
            ]
        )
    tangents = outer.gradient(inner, probes)
    return [
        tf.zeros_like(term.outputs) if tangent is None else tangent
        for term, tangent in zip(terms, tangents, strict=True)
    ]


def fisher_gram(
    tape: tf.GradientTape,
    terms: Sequence[OutputTerm],
    variables: Sequence[tf.Variable],
    directions: Sequence[Sequence[tf.Tensor]],
) -> tf.Tensor:
    """Returns the matrix `δ_iᵀ F δ_j` of the batch's exact Fisher.

    With `F = Σ c Jᵀ L Lᵀ J` each entry is a dot product of `√c Lᵀ J δ`.

    Args:
        tape: Persistent tape that recorded the forward pass.
        terms: The outputs of that pass.
        variables: The variables that the directions move.
        directions: k directions, each one tensor per variable.

    Returns:
        Tensor `[k, k]`, symmetric positive semi-definite.
    """
    projected = []
    for direction in directions:
        tangents = jacobian_vector_products(tape, terms, variables, direction)
        rows = [
            tf.reshape(term.factor_transpose(tangent), [-1])
            for term, tangent in zip(terms, tangents, strict=True)
        ]
        projected.append(tf.concat(rows, axis=0))
    stacked = tf.stack(projected)
    return tf.matmul(stacked, stacked, transpose_b=True)
