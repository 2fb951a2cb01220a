"""The columns of L of all outputs of a network, in one order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from keras_natgrad.curvature.cotangents import OutputTerm
from keras_natgrad.heads.tensors import as_parameters

#: The ways to choose the columns of R.
COLUMN_KINDS = ("exact", "sampled", "empirical")


class Columns:
    """What the loss factors of a batch do to vectors over all columns.

    A vector `[M]` holds, example by example, the values of the first output's
    positions and columns, then those of the next output.

    - `"exact"`: `√c L`, all columns of the head's factor.
    - `"sampled"`: one column per position, `√c` times the score at a target
      drawn from the head.
    - `"empirical"`: the same at the observed target, so that F is the mean
      of the per-position outer products.

    Args:
        terms: The network's outputs.
        kind: One of the three names.
        seed: int32 `[2]`, for the draws.
    """

    def __init__(
        self, terms: Sequence[OutputTerm], kind: str, seed: tf.Tensor
    ) -> None:
        self.terms = list(terms)
        self.kind = kind
        first = self.terms[0].outputs
        #: Number of examples.
        self.batch: Any = first.shape[0] or tf.shape(first)[0]
        self._scores: list[tf.Tensor | None] = [None] * len(self.terms)
        if kind != "exact":
            seeds = tf.unstack(
                tf.random.split(seed, num=len(self.terms), alg="philox")
            )
            self._scores = [
                _score(term, kind, own)
                for term, own in zip(self.terms, seeds, strict=True)
            ]
        self._sizes = [
            term.column_count() if kind == "exact" else term.positions
            for term in self.terms
        ]
        #: Number of columns of one example, an integer if it is known.
        self.per_example: Any = sum(self._sizes)

    def cotangents(self, vector: tf.Tensor) -> list[tf.Tensor]:
        """Returns `√c L v` at every output."""
        table = tf.reshape(vector, [self.batch, self.per_example])
        parts = tf.split(table, self._sizes, axis=1)
        return [
            self._cotangent(index, part) for index, part in enumerate(parts)
        ]

    def project(self, tangents: Sequence[tf.Tensor]) -> tf.Tensor:
        """Returns `√c Lᵀ t`, `[M]`, for one tangent per output."""
        many = [tangent[..., tf.newaxis] for tangent in tangents]
        return self.project_many(many)[:, 0]

    def project_many(self, tangents: Sequence[tf.Tensor]) -> tf.Tensor:
        """Returns `√c Lᵀ T`, `[M, k]`, for tangents with a last axis k."""
        rows = []
        for index, tangent in enumerate(tangents):
            count = tangent.shape[-1]
            projected = self._transpose(index, tangent)
            shape = [self.batch, self._sizes[index], count]
            rows.append(tf.reshape(projected, shape))
        table = tf.concat(rows, axis=1)
        count = table.shape[-1]
        return tf.reshape(table, [self.batch * self.per_example, count])

    def residual(self, gradients: Sequence[tf.Tensor]) -> tf.Tensor:
        """Returns the whitened residuals u, `[M]`.

        Args:
            gradients: Gradient of the loss at every output.
        """
        rows = []
        for term, size, gradient in zip(
            self.terms, self._sizes, gradients, strict=True
        ):
            parameters = as_parameters(term.outputs)
            root = tf.cast(term.root, parameters.dtype)
            if self.kind == "exact":
                # L⁺ = Lᵀ (L Lᵀ)⁺.
                natural = term.head.natural_gradient(
                    parameters, tf.cast(gradient, parameters.dtype)
                )
                own = term.head.fisher_factor_transpose_product(
                    parameters, natural
                )
                own = tf.math.divide_no_nan(own, root)
            elif self.kind == "empirical":
                # The score is minus the gradient of the negative likelihood.
                own = -root
            else:
                own = tf.zeros_like(root)
            rows.append(tf.reshape(own, [self.batch, size]))
        table = tf.concat(rows, axis=1)
        flat = tf.reshape(table, [self.batch * self.per_example])
        return tf.stop_gradient(flat)

    def _cotangent(self, index: int, values: tf.Tensor) -> tf.Tensor:
        term, score = self.terms[index], self._scores[index]
        if score is not None:
            lead = tf.shape(term.outputs)[:-1]
            values = tf.reshape(values, tf.concat([lead, [1]], 0))
            sent = tf.cast(values, score.dtype) * score
            return tf.cast(sent, term.outputs.dtype)
        lead = tf.shape(term.outputs)[:-1]
        shape = tf.concat([lead, [term.rank]], axis=0)
        return term.cotangent(tf.reshape(values, shape))

    def _transpose(self, index: int, tangents: tf.Tensor) -> tf.Tensor:
        """Returns `√c Lᵀ T` with the columns before the last axis."""
        term, score = self.terms[index], self._scores[index]
        parameters = as_parameters(term.outputs)
        tangents = tf.cast(tangents, parameters.dtype)
        if score is not None:
            own = tf.cast(score, parameters.dtype)[..., tf.newaxis]
            return tf.reduce_sum(own * tangents, axis=-2, keepdims=True)
        product = term.head.fisher_factor_transpose_product(
            parameters[..., tf.newaxis, :], tf.linalg.matrix_transpose(tangents)
        )
        root = tf.cast(term.root, product.dtype)[..., tf.newaxis]
        return root * tf.linalg.matrix_transpose(product)


def _score(term: OutputTerm, kind: str, seed: tf.Tensor) -> tf.Tensor:
    if kind == "sampled":
        parameters = as_parameters(term.outputs)
        return term.score(term.head.sample(parameters, seed))
    if term.targets is None:
        raise ValueError(
            "The empirical Fisher needs the targets, which a custom training "
            "loop does not show. Use fisher='exact', or train with `fit`. "
            "Received: fisher='empirical'"
        )
    return term.score(term.targets)
