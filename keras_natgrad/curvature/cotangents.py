"""Cotangents at the outputs whose outer products average to the Fisher."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from keras_natgrad.heads import Head
from keras_natgrad.heads.tensors import as_parameters
from keras_natgrad.linalg import random_signs

#: The ways to estimate the Fisher, by what is sent back through the network.
FISHER_KINDS = ("exact", "propagated", "sampled", "empirical")


@dataclass(frozen=True)
class OutputTerm:
    """One output of the network and its part in the loss.

    The training loss is `Σ_terms Σ_positions c · (−log p(y | outputs))`.

    Attributes:
        outputs: Head parameters η, `[batch, ..., K]`.
        head: The `Head` that reads them.
        coefficients: Loss coefficients c, `[batch, ...]`, non-negative.
        targets: Observed targets, for the empirical Fisher only.
    """

    outputs: tf.Tensor
    head: Head
    coefficients: tf.Tensor
    targets: tf.Tensor | None = None

    @property
    def root(self) -> tf.Tensor:
        """√c with a last axis of one."""
        return tf.sqrt(self.coefficients)[..., tf.newaxis]

    @property
    def rank(self) -> int:
        """Columns of the loss factor L at one position."""
        return self.head.factor_rank(int(self.outputs.shape[-1]))

    @property
    def positions(self) -> Any:
        """Positions per example, an integer where it is known."""
        sides = self.outputs.shape[1:-1]
        if sides.is_fully_defined():
            return math.prod(sides)
        return tf.reduce_prod(tf.shape(self.outputs)[1:-1])

    def column_count(self) -> Any:
        """Columns of L for one example: positions times rank."""
        return self.positions * self.rank

    def cotangent(self, column_values: tf.Tensor) -> tf.Tensor:
        """Returns `√c L e` for `e` of shape `[batch, ..., rank]`."""
        parameters = as_parameters(self.outputs)
        product = self.head.fisher_factor_product(parameters, column_values)
        return tf.stop_gradient(
            tf.cast(
                tf.cast(self.root, product.dtype) * product,
                self.outputs.dtype,
            )
        )

    def score(self, targets: tf.Tensor) -> tf.Tensor:
        """Returns `√c ∂ log p(targets | η) / ∂η`."""
        parameters = as_parameters(self.outputs)
        score = self.head.score(parameters, targets)
        return tf.stop_gradient(
            tf.cast(tf.cast(self.root, score.dtype) * score, self.outputs.dtype)
        )

    def factor_transpose(self, tangents: tf.Tensor) -> tf.Tensor:
        """Returns `√c Lᵀ t` for tangents `t = J δ` at the outputs."""
        parameters = as_parameters(self.outputs)
        product = self.head.fisher_factor_transpose_product(
            parameters, tf.cast(tangents, parameters.dtype)
        )
        return tf.cast(self.root, product.dtype) * product


def example_weights(terms: Sequence[OutputTerm]) -> tf.Tensor:
    """Returns one relative weight per example, `[batch]`.

    The weight of an example is the sum of its loss coefficients: an example
    without weight must not enter the statistics of the inputs either.
    """
    weights = [
        tf.reduce_sum(
            tf.reshape(term.coefficients, [tf.shape(term.coefficients)[0], -1]),
            axis=1,
        )
        for term in terms
    ]
    return tf.stop_gradient(tf.add_n(weights))


def random_cotangents(
    terms: Sequence[OutputTerm], kind: str, seed: tf.Tensor
) -> list[tf.Tensor]:
    """Returns one random cotangent per term, for the one-pass kinds.

    - `"propagated"`: `√c L ε` with independent signs ε, so that the mean of
      `u uᵀ` over the signs is `c F` (curvature propagation, Martens et al.
      2012).
    - `"sampled"`: `√c` times the score at a target drawn from the head.
    - `"empirical"`: `ε √c` times the score at the observed target, with one
      sign per position. The sign changes no outer product of one position,
      and makes sums over positions and examples uncorrelated.

    Args:
        terms: The network's outputs.
        kind: One of the three names.
        seed: int32 `[2]`.
    """
    seeds = tf.unstack(tf.random.split(seed, num=len(terms), alg="philox"))
    cotangents = []
    for term, term_seed in zip(terms, seeds, strict=True):
        if kind == "propagated":
            shape = tf.concat([tf.shape(term.outputs)[:-1], [term.rank]], 0)
            signs = _signs(shape, term_seed, term.outputs)
            cotangents.append(term.cotangent(signs))
        elif kind == "sampled":
            targets = term.head.sample(as_parameters(term.outputs), term_seed)
            cotangents.append(term.score(targets))
        else:
            shape = tf.concat([tf.shape(term.outputs)[:-1], [1]], 0)
            signs = _signs(shape, term_seed, term.outputs)
            assert term.targets is not None
            score = term.score(term.targets)
            cotangents.append(tf.cast(signs, score.dtype) * score)
    return cotangents


def column_cotangents(
    terms: Sequence[OutputTerm],
    index: int,
    column: tf.Tensor,
    seed: tf.Tensor,
) -> list[tf.Tensor]:
    """Returns the cotangents of one column of L, for the exact Fisher.

    Column `column` of term `index` is one unit vector over the positions and
    the rank of every example, with a random sign per example. The sign
    changes no outer product of one example, and makes gradients summed over
    the batch uncorrelated, which the fallback blocks use.

    Args:
        terms: The network's outputs.
        index: Which term.
        column: Scalar int, below `terms[index].column_count()`.
        seed: int32 `[2]`.
    """
    cotangents = [tf.zeros_like(term.outputs) for term in terms]
    term = terms[index]
    shape = tf.shape(term.outputs)
    signs = _signs(shape[:1], seed, term.outputs)[:, tf.newaxis]
    unit = tf.one_hot(column, term.column_count(), dtype=signs.dtype)
    values = tf.reshape(
        signs * unit, tf.concat([shape[:-1], [term.rank]], axis=0)
    )
    cotangents[index] = term.cotangent(values)
    return cotangents


def _signs(shape: tf.Tensor, seed: tf.Tensor, outputs: tf.Tensor) -> tf.Tensor:
    """Returns independent ±1, in the dtype that heads compute in."""
    return random_signs(shape, seed, as_parameters(outputs).dtype)


def sum_over_columns(
    terms: Sequence[OutputTerm],
    contribution: Callable[[list[tf.Tensor]], Any],
    seed: tf.Tensor,
) -> Any:
    """Sums a function of the cotangents over all columns of L of all terms.

    Args:
        terms: Outputs.
        contribution: Takes one cotangent per output.
        seed: int32 `[2]`.
    """
    total: Any = None
    for index, term in enumerate(terms):

        def one(column: tf.Tensor, index: int = index) -> Any:
            folded = tf.random.fold_in(seed, column, alg="philox")
            return contribution(column_cotangents(terms, index, column, folded))

        summed = sum_over(one, term.column_count())
        total = summed if total is None else _add(total, summed)
    return total


def _add(left: Any, right: Any) -> Any:
    return tf.nest.map_structure(tf.add, left, right)


def sum_over(function: Callable[[tf.Tensor], Any], count: tf.Tensor) -> Any:
    """Returns `function(0) + … + function(count − 1)`, in a loop.

    Args:
        function: Takes an int32 scalar, returns tensors.
        count: int32 scalar, at least one.
    """
    _, total = tf.while_loop(
        lambda index, _: index < count,
        lambda index, sums: (index + 1, _add(sums, function(index))),
        (tf.constant(1, tf.int32), function(tf.constant(0, tf.int32))),
    )
    return total
