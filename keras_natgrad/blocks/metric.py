"""What the blocks of a relative metric have in common."""

from __future__ import annotations

import abc
from typing import Any

import tensorflow as tf
from typing_extensions import override

from keras_natgrad.blocks.base import Block, Statistics
from keras_natgrad.blocks.state import count_failures, identities
from keras_natgrad.linalg import (
    Rows,
    contract_rows,
    damped_inverses,
    scalar,
    to_dense,
)


class MetricBlock(Block):
    """A block that averages and inverts k matrices `[n, n]` at once.

    The damping of each matrix may follow its own scale,

        (M_i + (λ + ρ tr M_i) I)⁻¹.

    Where a matrix has no inverse, zero without damping, the last good one
    stays; before the first there is none, and the gradient is not followed.

    Args:
        relative_damping: ρ.
        identity_start: Whether the running average starts at the identity,
            and keeps its share of it, rather than at the first batch.
        response: What the metric is that of, for the summary.
    """

    def __init__(
        self,
        relative_damping: float = 0.0,
        identity_start: bool = False,
        response: str = "",
    ) -> None:
        self.relative_damping = relative_damping
        self.identity_start = identity_start
        self.response = response

    @property
    @abc.abstractmethod
    def state_shape(self) -> tuple[int, int, int]:
        """Shape `(k, n, n)` of the metric."""

    @override
    def build(self, add_variable: Any, add_sum: Any = None) -> None:
        def add(name: str, shape: tuple[int, ...], initializer: Any) -> Any:
            if self.identity_start and name == "weight":
                initializer = "ones"
            return add_variable(name, shape, initializer)

        def add_metric(
            name: str, shape: tuple[int, ...], initializer: Any
        ) -> Any:
            if self.identity_start:
                initializer = identities if name == "metric" else "ones"
            return (add_sum or add_variable)(name, shape, initializer)

        super().build(add, add_metric)

    @override
    def build_state(self) -> None:
        self._metric = self.add_average("metric", self.state_shape)
        self._inverse = self.add_cache("inverse", self.state_shape)

    @override
    def input_statistics(self, inputs: Rows, weights: tf.Tensor) -> Statistics:
        return {}

    @override
    def cotangent_statistics(
        self, inputs: Rows, cotangents: tf.Tensor
    ) -> Statistics:
        dense = to_dense(inputs)

        def one_position() -> Statistics:
            moment = self.moment(cotangents[:, 0])
            return self.metrics_of(dense[:, 0], moment)

        def several_positions() -> Statistics:
            return self.metrics_of_gradients(contract_rows(dense, cotangents))

        single = tf.equal(tf.shape(dense)[1], 1)
        found: Statistics = tf.cond(single, one_position, several_positions)
        return found

    @abc.abstractmethod
    def moment(self, cotangents: tf.Tensor) -> tf.Tensor:
        """Returns what `metrics_of` needs of cotangents `[batch, columns]`.

        Moments of several columns of the loss factor may be summed.
        """

    @abc.abstractmethod
    def moment_of(self, information: tf.Tensor) -> tf.Tensor:
        """Returns the moment of an information V of `[batch, m, m]`.

        It is what the moments of all columns of a root of V sum to.
        """

    @abc.abstractmethod
    def metrics_of(self, inputs: tf.Tensor, moment: tf.Tensor) -> Statistics:
        """Returns the statistics of inputs `[batch, rows]` and moments."""

    @abc.abstractmethod
    def metrics_of_gradients(self, gradients: tf.Tensor) -> Statistics:
        """Returns the statistics of `[batch, rows, columns]` gradients."""

    @override
    def refresh(
        self, damping: tf.Tensor, ratio: tf.Tensor | None = None
    ) -> tuple[tf.Tensor, tf.Tensor]:
        metric = self.average("metric")
        relative = scalar(self.relative_damping, metric.dtype)
        dampings = tf.cast(damping, metric.dtype) + relative * tf.linalg.trace(
            metric
        )
        result = damped_inverses(metric, dampings)
        self._inverse.assign(
            tf.where(
                result.succeeded[:, tf.newaxis, tf.newaxis],
                result.inverses,
                self._inverse.value,
            )
        )
        return result.retries, count_failures(result.succeeded)

    @override
    @property
    def spectrum_side(self) -> int:
        return self.state_shape[-1]

    @override
    def describe(self) -> str:
        parts = [self.response] if self.response else []
        return ", ".join([*parts, self.describe_state()])

    @abc.abstractmethod
    def describe_state(self) -> str:
        """Says what is stored."""


class UnitMetricBlock(MetricBlock):
    """A metric of every unit, which takes the squares of its cotangents."""

    @override
    def moment(self, cotangents: tf.Tensor) -> tf.Tensor:
        return tf.square(cotangents)

    @override
    def moment_of(self, information: tf.Tensor) -> tf.Tensor:
        return tf.linalg.diag_part(information)
