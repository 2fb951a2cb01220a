"""The quadratic model of the loss at one step, from curvature and damping."""

from __future__ import annotations

from collections.abc import Sequence

import tensorflow as tf

from keras_natgrad import replicas
from keras_natgrad.step.averaged_gram import AveragedGram
from keras_natgrad.step.coefficients import (
    Quadratic,
    QuadraticForm,
    of_all_layers,
)
from keras_natgrad.step.direction import LocalDirection, Vector
from keras_natgrad.step.directions import pad
from keras_natgrad.step.quadratic import QuadraticModel
from keras_natgrad.step.refresh import Refresh
from keras_natgrad.step.state import StateFactory


class LossModel:
    """Builds the quadratic model of each step, and remembers its curvature.

    Args:
        settings: `QuadraticModel`.
        refresh: `Refresh`, for its warm-up.
        bound: Largest `δᵀFδ` of an update, or `None`.
        parts: Number of parts with rates of their own; one for none.
        factory: `StateFactory`.
    """

    def __init__(
        self,
        settings: QuadraticModel,
        refresh: Refresh,
        bound: float | None,
        parts: int,
        factory: StateFactory,
    ) -> None:
        self.settings = settings
        self.bound = bound
        self.size = parts + 1
        self.average: AveragedGram | None = None
        self.common: AveragedGram | None = None
        if settings.is_averaged:
            self.average = AveragedGram(settings, refresh, factory, self.size)
            if self.by_part:
                self.common = AveragedGram(
                    settings, refresh, factory, 2, "common_quotient"
                )

    @property
    def by_part(self) -> bool:
        """Whether parts have rates of their own."""
        return self.size > 2

    def form(
        self,
        here: LocalDirection,
        vectors: Sequence[Vector],
        pulled: Vector,
        damping: tf.Tensor,
        step: tf.Tensor,
    ) -> QuadraticForm:
        """Returns the quadratic model along Δ and δ₋₁.

        Args:
            here: The curvature at the batch.
            vectors: Δ, and δ₋₁ if there is one.
            pulled: What was preconditioned to Δ.
            damping: Scalar λ.
            step: Scalar integer, counted from zero.
        """
        batch = here.batch_size()
        few = batch < self.settings.examples
        gram, common = self._grams(here, vectors, pulled, step, few)
        ridge = here.ridge_gram(vectors, damping, self.by_part)
        first, *others = [here.dots(here.gradient, each) for each in vectors]
        slopes = self._joined(first, others)
        if not self.by_part:
            return QuadraticForm(
                Quadratic.along(common, ridge, slopes, self.bound)
            )
        count = replicas.replica_count()
        used = tf.clip_by_value(batch, 1, self.settings.examples)
        return QuadraticForm(
            Quadratic.along(
                common, of_all_layers(ridge), of_all_layers(slopes), self.bound
            ),
            Quadratic.along(gram, ridge, slopes, self.bound),
            count * batch < self.settings.examples,
            count * used * self.settings.estimates(batch),
        )

    def _joined(
        self, first: tf.Tensor, others: Sequence[tf.Tensor]
    ) -> tf.Tensor:
        """Joins products of every part with Δ and with δ₋₁.

        Args:
            first: Tensor `[parts]`, of Δ.
            others: The same of δ₋₁, if there is one.

        Returns:
            Tensor `[size]`.
        """
        if not self.by_part:
            first = tf.reduce_sum(first, keepdims=True)
        rest = [tf.reduce_sum(each, keepdims=True) for each in others]
        return pad(tf.concat([first, *rest], axis=0), self.size)

    def _grams(
        self,
        here: LocalDirection,
        vectors: Sequence[Vector],
        pulled: Vector,
        step: tf.Tensor,
        few: tf.Tensor,
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns `δ_iᵀ F δ_j`, averaged as the settings say.

        Returns:
            Tensors `[size, size]`, and `[2, 2]` with Δ as one direction: the
            same if the parts have one rate.
        """

        def of_batch() -> tf.Tensor:
            return pad(here.gram(vectors, self.by_part), self.size)

        if self.average is None:
            gram = replicas.sum_over_replicas(of_batch())
            return gram, gram
        # The n_i² of `QuadraticModel`.
        squares = self._joined(
            here.dots(pulled, vectors[0]),
            [here.metric_dots(each, each) for each in vectors[1:]],
        )
        averages = [(self.average, squares)]
        if self.common is not None:
            averages.append((self.common, of_all_layers(squares)))
        norms = [tf.sqrt(tf.maximum(each, 0)) for _, each in averages]

        def update() -> tf.Tensor:
            gram = of_batch()
            averages[0][0].add(gram, norms[0], step, few)
            if self.common is not None:
                self.common.add(of_all_layers(gram), norms[1], step, few)
            return tf.constant(0)

        tf.cond(self.average.is_due(step), update, lambda: tf.constant(0))
        found = [
            replicas.sum_over_replicas(average.read(each))
            for (average, _), each in zip(averages, norms, strict=True)
        ]
        return found[0], found[-1]
