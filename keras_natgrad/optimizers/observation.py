"""The curvature of one batch, on its way from tape to step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import tensorflow as tf

from keras_natgrad import replicas
from keras_natgrad.capture import CurvatureTape, MapTrace
from keras_natgrad.curvature import OutputTerm
from keras_natgrad.training.terms import in_support, mean_terms, total_weight


@dataclass(frozen=True)
class Observation:
    """What a tape saw of one batch.

    It lives from `tape.gradient` to `optimizer.apply`, inside one trace.

    Attributes:
        loss: Scalar loss of the batch, on all replicas together.
        objective: Returns the loss at the current weights, or `None`.
        is_finite: Scalar bool: loss and gradients are finite, and the targets
            possible.
        has_weight: Scalar bool: some example has a weight.
    """

    loss: tf.Tensor
    objective: Callable[[], Any] | None
    is_finite: tf.Tensor
    has_weight: tf.Tensor

    @property
    def is_usable(self) -> tf.Tensor:
        """Scalar bool: there is something to learn from the batch."""
        return self.is_finite & self.has_weight


@dataclass(frozen=True)
class NetworkObservation(Observation):
    """What a tape saw of the layers of a network.

    Attributes:
        tape: The `CurvatureTape`.
        terms: The network's outputs as `OutputTerm`s.
        records: One `MapTrace` per captured layer, in plan order.
        share: This replica's share of the examples' weights; `None` if there
            are no others.
    """

    tape: CurvatureTape
    terms: Sequence[OutputTerm]
    records: Sequence[MapTrace]
    share: tf.Tensor | None


@dataclass(frozen=True)
class Verdict:
    """An observation, and whether the step before it held.

    Attributes:
        observation: `Observation`.
        surged: Scalar bool: the last step has to be taken back.
        seen: What the direction keeps of the batch until the step.
    """

    observation: Any
    surged: tf.Tensor
    seen: Any = None

    @property
    def accepted(self) -> tf.Tensor:
        """Scalar bool: the batch enters the statistics and makes a step."""
        return self.observation.is_usable & tf.logical_not(self.surged)

    def with_gradients(self, gradients: Sequence[Any]) -> Verdict:
        """Returns it with the gradients that were accumulated until now."""
        seen = self.observation
        finite = seen.is_finite & all_finite(gradients)
        return replace(self, observation=replace(seen, is_finite=finite))


def terms_of(tape: CurvatureTape, head: Any) -> Sequence[OutputTerm]:
    """Returns what the loss of a tape is made of.

    Args:
        tape: The tape, after the forward pass.
        head: The attached head, or `None`.

    Raises:
        ValueError: If neither the tape nor the head says so.
    """
    if tape.terms is not None:
        return tape.terms
    if head is None or tape.model_outputs is None:
        raise ValueError(
            "The tape does not know what distribution the model's outputs "
            "parametrise. Write `optimizer.attach(model, "
            "head=keras_natgrad.heads.<Head>(...))`, and call the model "
            "inside the tape."
        )
    return mean_terms(tape.model_outputs, head)


def observe_network(
    tape: CurvatureTape,
    terms: Sequence[OutputTerm],
    records: Sequence[MapTrace],
    gradients: Sequence[Any],
    objective: Callable[[], Any] | None,
) -> NetworkObservation:
    """Returns what a tape saw, agreed on by all replicas.

    Args:
        tape: The tape, after the backward pass.
        terms: The network's outputs.
        records: One per captured layer.
        gradients: The gradient of the loss, one per variable or `None`.
        objective: Returns the loss at the current weights; `None` if nobody
            asks for it.
    """
    assert tape.loss is not None
    # Keras leaves the loss of an empty batch empty.
    loss = tf.reduce_sum(tape.loss)
    # A loss may be infinite where its gradient is not.
    is_finite = (
        all_finite(gradients) & in_support(terms) & tf.math.is_finite(loss)
    )
    weight = total_weight(terms)
    share: tf.Tensor | None = None
    if replicas.replica_count() > 1:
        own = tf.cast([weight, tf.cast(~is_finite, weight.dtype)], weight.dtype)
        total, faults = tf.unstack(replicas.sum_over_replicas(own))
        share = tf.math.divide_no_nan(weight, total)
        loss = replicas.sum_over_replicas(loss)
        is_finite, weight = tf.equal(faults, 0), total
    if objective is not None:
        objective = replicas.traced_here(objective)
    return NetworkObservation(
        loss, objective, is_finite, weight > 0, tape, terms, records, share
    )


def all_finite(gradients: Sequence[Any]) -> tf.Tensor:
    """Returns whether all gradients are finite; `None` counts as such."""
    sums: dict[tf.DType, list[tf.Tensor]] = {}
    axes: dict[Any, tf.Tensor] = {}
    for gradient in gradients:
        if gradient is not None:
            values = tf.convert_to_tensor(_values(gradient))
            rank = values.shape.rank
            if rank is not None and rank not in axes:
                # One constant serves many variables.
                axes[rank] = tf.constant([*range(rank)], tf.int32)
            total = tf.reduce_sum(values, axis=axes.get(rank))
            sums.setdefault(total.dtype, []).append(total)
    finite = tf.constant(True)
    for totals in sums.values():
        finite &= tf.reduce_all(tf.math.is_finite(tf.stack(totals)))
    return finite


def _values(gradient: Any) -> tf.Tensor:
    if isinstance(gradient, tf.IndexedSlices):
        return gradient.values
    return gradient
