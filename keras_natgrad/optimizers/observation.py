"""The curvature of one batch, on its way from tape to step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from keras_natgrad import replicas
from keras_natgrad.capture import CurvatureTape, MapTrace
from keras_natgrad.curvature import OutputTerm
from keras_natgrad.training.terms import in_support, total_weight


class Observation:
    """The curvature of one batch, on its way from tape to step.

    It lives from `tape.gradient` to `optimizer.apply`, inside one trace.

    Attributes:
        tape: The `CurvatureTape`.
        terms: The network's outputs as `OutputTerm`s.
        records: One `MapTrace` per captured layer, in plan order.
        loss: Scalar loss of the batch, on all replicas together.
        is_finite: Scalar bool: loss and gradients finite, targets possible.
        has_weight: Scalar bool: some example has a weight.
        share: This replica's share of the examples' weights; `None` where
            there are no others.
        surged: Scalar bool: the last step has to be taken back.
    """

    surged: tf.Tensor

    def __init__(
        self,
        tape: CurvatureTape,
        terms: Sequence[OutputTerm],
        records: Sequence[MapTrace],
        gradients: Sequence[Any],
    ) -> None:
        self.tape = tape
        self.terms = terms
        self.records = records
        assert tape.loss is not None
        # Keras leaves the loss of an empty batch empty.
        self.loss = tf.reduce_sum(tape.loss)
        # A loss may be infinite where its gradient is not.
        fine = (
            all_finite(gradients)
            & in_support(terms)
            & tf.reduce_all(tf.math.is_finite(self.loss))
        )
        weight = total_weight(terms)
        self.share: tf.Tensor | None = None
        if replicas.replica_count() > 1:
            own = tf.cast([weight, tf.cast(~fine, weight.dtype)], weight.dtype)
            total, faults = tf.unstack(replicas.sum_over_replicas(own))
            self.share = tf.math.divide_no_nan(weight, total)
            self.loss = replicas.sum_over_replicas(self.loss)
            fine, weight = tf.equal(faults, 0), total
        self.is_finite = fine
        self.has_weight = weight > 0

    @property
    def is_usable(self) -> tf.Tensor:
        """Scalar bool: there is something to learn from the batch."""
        return self.is_finite & self.has_weight

    @property
    def accepted(self) -> tf.Tensor:
        """Scalar bool: the batch enters the statistics and makes a step."""
        return self.is_usable & tf.logical_not(self.surged)


def all_finite(gradients: Sequence[Any]) -> tf.Tensor:
    """Returns whether all gradients are finite; `None` counts as such."""
    sums = [tf.reduce_sum(_values(g)) for g in gradients if g is not None]
    return tf.reduce_all([tf.math.is_finite(total) for total in sums])


def _values(gradient: Any) -> tf.Tensor:
    if isinstance(gradient, tf.IndexedSlices):
        return gradient.values
    return gradient
