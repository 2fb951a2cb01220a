"""The length of a step by trying powers of two."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import keras
import tensorflow as tf

from keras_natgrad.checks import check_period, is_number


@keras.saving.register_keras_serializable(package="keras_natgrad")
@dataclass(frozen=True)
class LineSearch:
    """Tries the learning rates `largest · 2⁰, 2⁻¹, …` on the batch.

    The loss of the batch is evaluated at each, from the largest down, until
    it rises again after it was below the loss before the step. The best rate
    is taken; where none lowers the loss, the smallest one.

    Args:
        largest: First rate.
        halvings: Most halvings.

    Raises:
        ValueError: If an argument is not positive.
    """

    largest: float = 1.0
    halvings: int = 30

    def __post_init__(self) -> None:
        if not is_number(self.largest) or not self.largest > 0:
            raise ValueError(
                "`largest` must be positive. "
                f"Received: largest={self.largest!r}"
            )
        check_period("halvings", self.halvings)

    def search(
        self, evaluate: Callable[[tf.Tensor], tf.Tensor], loss: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns the best rate and its loss.

        Args:
            evaluate: Returns the loss at a rate, a scalar tensor.
            loss: The loss before the step.
        """
        infinity = tf.constant(float("inf"), loss.dtype)
        first = tf.constant(self.largest, loss.dtype)

        def going(
            count: tf.Tensor, rate: tf.Tensor, best: tf.Tensor, last: tf.Tensor
        ) -> tf.Tensor:
            passed = (best < loss) & (last > best)
            return (count <= self.halvings) & ~passed

        def body(
            count: tf.Tensor, rate: tf.Tensor, best: tf.Tensor, last: tf.Tensor
        ) -> tuple[tf.Tensor, ...]:
            trial = first * tf.pow(
                tf.constant(0.5, loss.dtype), tf.cast(count, loss.dtype)
            )
            value = tf.cast(evaluate(trial), loss.dtype)
            value = tf.where(tf.math.is_finite(value), value, infinity)
            better = value < best
            return (
                count + 1,
                tf.where(better | (best >= loss), trial, rate),
                tf.minimum(value, best),
                value,
            )

        _, rate, best, _ = tf.while_loop(
            going,
            body,
            (tf.constant(0), tf.zeros_like(loss), infinity, infinity),
        )
        return rate, best

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        return asdict(self)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> LineSearch:
        """Recreates the rule from `get_config`."""
        return cls(**config)


def get(identifier: Any) -> LineSearch | None:
    """Returns a `LineSearch` from itself or its config, else `None`.

    Raises:
        ValueError: If it is the class.
    """
    if identifier is LineSearch:
        raise ValueError(
            "`learning_rate` must be an instance of LineSearch: write "
            f"`keras_natgrad.LineSearch()`. Received: {identifier!r}"
        )
    if isinstance(identifier, dict):
        identifier = keras.saving.deserialize_keras_object(identifier)
    return identifier if isinstance(identifier, LineSearch) else None
