"""Products with the Fisher of the whole network, layers coupled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import tensorflow as tf

from keras_natgrad.curvature.captured_pass import Backward, CapturedPass
from keras_natgrad.curvature.cotangents import OutputTerm
from keras_natgrad.linalg import (
    Rows,
    TwoWayCotangents,
    TwoWayRows,
    example_dots,
    take_examples,
    tangent_rows,
)

#: For every direction and layer, `δᵀ ā_s`: see `own_tangents`.
OwnTangents: TypeAlias = "list[list[tf.Tensor | TwoWayCotangents]]"

# Where the first of the equal parts is sampled: at no simple fraction, or
# equal sizes would put points between two rows, where rounding decides.
_FIRST_POINT = (5**0.5 - 1) / 2


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
                _inner(g, tf.cast(d, g.dtype))
                for g, d in zip(gradients, direction, strict=True)
                if g is not None
            ]
        )
    tangents = outer.gradient(inner, probes)
    return [
        tf.zeros_like(term.outputs) if tangent is None else tangent
        for term, tangent in zip(terms, tangents, strict=True)
    ]


def _inner(gradient: Any, direction: tf.Tensor) -> tf.Tensor:
    """Returns `⟨gradient, direction⟩`; that of an embedding stays sparse."""
    if isinstance(gradient, tf.IndexedSlices):
        direction = tf.gather(direction, gradient.indices)
        gradient = gradient.values
    return tf.reduce_sum(tf.convert_to_tensor(gradient) * direction)


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
    gram = tf.matmul(stacked, stacked, transpose_b=True)
    return tf.ensure_shape(gram, [len(directions), len(directions)])


def estimated_gram(
    captured: CapturedPass,
    backward: Backward,
    directions: Sequence[Sequence[tf.Tensor]],
    examples: int,
    by_layer: bool = False,
) -> tf.Tensor:
    """Returns an unbiased estimate of `δ_iᵀ F δ_j` from one backward pass.

    With cotangents `u_n` whose outer products average to the Fisher of the
    outputs, `E[(u_nᵀ J_n δ_i)(u_nᵀ J_n δ_j)]` is the Fisher product of one
    example, and `u_nᵀ J_n δ = Σ_layers Σ_s g_sᵀ (δᵀ ā_s)` costs one matrix
    product per layer and direction. In a large batch only some examples are
    used, drawn in proportion to `‖u_n‖²` and weighted by its reciprocal:
    late in the training of a classifier a few examples hold most of the
    Fisher, and a plain sample would miss them.

    Args:
        captured: The forward pass; it must have no fallback entries.
        backward: A backward pass of random cotangents.
        directions: k directions, each one tensor per stack.
        examples: How many examples to use at most.
        by_layer: Whether every layer's part of the first direction is a
            direction of its own. The products are the same.

    Returns:
        Tensor `[k, k]`, symmetric positive semi-definite, with the number of
        layers for one of the k where the first direction is divided.
    """
    sample = sample_examples(captured, backward, examples)
    own = own_tangents(sample.inputs, directions)
    return gram_of_tangents(own, sample.cotangents, by_layer, sample.weights)


class Sample(NamedTuple):
    """Some examples of a batch.

    Attributes:
        inputs: Canonical inputs, one per captured layer.
        cotangents: Canonical cotangents, likewise.
        weights: Tensor `[examples]`: a sum over the examples with these
            weights estimates that over the batch.
    """

    inputs: list[Any]
    cotangents: list[Any]
    weights: tf.Tensor


def sample_examples(
    captured: CapturedPass, backward: Backward, examples: int
) -> Sample:
    """Returns the whole batch if it is small, otherwise some of its examples.

    Args:
        captured: The forward pass.
        backward: A backward pass of random cotangents.
        examples: Most examples, see `estimated_gram`.
    """
    batch = captured.batch
    rows, weights = tf.cond(
        batch <= examples,
        lambda: (tf.range(batch), tf.ones([batch], backward.sizes.dtype)),
        lambda: proportional_sample(backward.sizes, examples),
    )
    cotangents = tf.nest.map_structure(
        lambda g: tf.gather(g, rows, axis=-3), backward.cotangents
    )
    inputs = [_take(a, rows) for a in captured.inputs]
    return Sample(inputs, cotangents, weights)


def own_tangents(
    inputs: Sequence[Rows | TwoWayRows],
    directions: Sequence[Sequence[tf.Tensor]],
) -> OwnTangents:
    """Returns how the weights of every layer move its own responses.

    Args:
        inputs: Canonical inputs, one per layer.
        directions: k directions, each one tensor `[layers, ...]` per stack.

    Returns:
        k lists of `δᵀ ā_s`, of the shapes of the cotangents.
    """
    return [
        [
            tangent_rows(a, matrix)
            for a, matrix in zip(inputs, _layers(each), strict=True)
        ]
        for each in directions
    ]


def _layers(direction: Sequence[tf.Tensor]) -> list[tf.Tensor]:
    """Returns one matrix per layer."""
    return [layer for stack in direction for layer in tf.unstack(stack)]


def gram_of_tangents(
    own: OwnTangents,
    cotangents: Sequence[tf.Tensor | TwoWayCotangents],
    by_layer: bool = False,
    weights: tf.Tensor | None = None,
) -> tf.Tensor:
    """Returns `Σ_n w_n (u_nᵀ J_n δ_i)(u_nᵀ J_n δ_j)`.

    Args:
        own: See `own_tangents`.
        cotangents: Those of every layer, from one backward pass of u.
        by_layer: See `estimated_gram`.
        weights: Tensor `[examples]`, w; ones if it is `None`.

    Returns:
        See `estimated_gram`.
    """
    projected: list[tf.Tensor] = []
    for index, layers in enumerate(own):
        dots = [
            example_dots(g, tangent)
            for g, tangent in zip(cotangents, layers, strict=True)
        ]
        projected += dots if by_layer and index == 0 else [tf.add_n(dots)]
    stacked = tf.stack(projected)
    weighted = stacked
    if weights is not None:
        weighted *= tf.cast(weights, stacked.dtype)
    gram = tf.matmul(weighted, stacked, transpose_b=True)
    return tf.ensure_shape(gram, [len(projected), len(projected)])


def _take(inputs: Rows | TwoWayRows, rows: tf.Tensor) -> Rows | TwoWayRows:
    if isinstance(inputs, TwoWayRows):
        return inputs.take(rows)
    return take_examples(inputs, rows)


def proportional_sample(
    sizes: tf.Tensor, count: int
) -> tuple[tf.Tensor, tf.Tensor]:
    """Draws rows with probability proportional to their sizes.

    The draw is systematic: `count` points at equal distances on the running
    sum of the sizes, so that a row is drawn `count · size / total` times, up
    to one. With the returned weights `Σ w_j f(row_j)` estimates the sum of f
    over all rows, exactly so for f proportional to the sizes.

    Args:
        sizes: Tensor `[rows]`, non-negative.
        count: Number of draws.

    Returns:
        The rows, int32 `[count]`, and their weights `[count]`.
    """
    total = tf.cumsum(sizes)
    points = tf.range(count, dtype=sizes.dtype) + _FIRST_POINT
    points *= total[-1] / count
    # Comparing all pairs compiles everywhere, and is small.
    below = tf.cast(total[tf.newaxis] <= points[:, tf.newaxis], tf.int32)
    rows = tf.minimum(tf.reduce_sum(below, axis=1), tf.size(sizes) - 1)
    weights = tf.math.divide_no_nan(total[-1] / count, tf.gather(sizes, rows))
    return rows, weights
