"""Optimizers with a quadratic model of the loss along their directions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from keras_natgrad import _compat, distribution
from keras_natgrad.curvature import (
    BlockDiagonal,
    CapturedPass,
    estimated_gram,
    fisher_gram,
    random_cotangents,
    sum_over,
)
from keras_natgrad.optimizers.observation import Observation
from keras_natgrad.optimizers.retraction import RetractingOptimizer
from keras_natgrad.optimizers.state import StepState
from keras_natgrad.step import (
    AveragedGram,
    QuadraticModel,
    Refresh,
    StepLength,
    norm_scale,
    quadratic_coefficients,
)
from keras_natgrad.step.directions import (
    Ridge,
    dot,
    metric_dot,
    pad_gram,
    pad_pair,
    ridge_gram,
)
from keras_natgrad.step.length import model_change, quadratic_form

# Examples of a batch that the estimated quadratic model looks at.
_MODEL_EXAMPLES = 256
# Most estimates on one batch, of which a small batch takes several.
_MOST_ESTIMATES = 4


class SolvedModel(NamedTuple):
    """What the quadratic model says of the chosen update δ.

    Attributes:
        change: Predicted change of the loss.
        fisher_share: `δᵀFδ / δᵀ(F + λD)δ`, in [0, 1], D the metric of the
            damping.
    """

    change: tf.Tensor
    fisher_share: tf.Tensor


class ModelledOptimizer(RetractingOptimizer):
    """Base class of optimizers that choose the step by a quadratic model.

    Attributes:
        refresh: `Refresh`, the periods.
        length: `StepLength`.
        quadratic_model: `QuadraticModel`.
        curvature: `BlockDiagonal`, once built.
    """

    refresh: Refresh
    length: StepLength
    quadratic_model: QuadraticModel
    curvature: BlockDiagonal
    state: StepState
    _ridge_rows: list[Ridge]
    _average: AveragedGram

    def build_model(self) -> None:
        """Creates the state of the quadratic model, where there is one."""
        if self._needs_gram:
            average = AveragedGram(
                self.quadratic_model,
                self.refresh,
                self.add_curvature_variable,
                self.add_variable,
                self.add_summed_variable,
            )
            self._hide("_average", average)

    def _solve_model(
        self,
        observation: Observation,
        gradients: Sequence[tf.Tensor],
        pulled: Sequence[tf.Tensor],
        solved: Sequence[tf.Tensor],
        rate: tf.Tensor,
    ) -> tuple[tf.Tensor, SolvedModel]:
        """Returns the coefficients of (−P∇, δ₋₁) and what they promise."""
        candidates = [list(solved)]
        if self.length.momentum != 0:
            candidates.append(self.curvature.to_matrices(self._velocities))
        metrics = self.curvature.damping_rows()
        squares = [dot(pulled, solved)]
        for velocity in candidates[1:]:
            squares.append(metric_dot(velocity, velocity, metrics))
        norms = pad_pair([tf.sqrt(tf.maximum(each, 0)) for each in squares])
        gram = self._gram(observation, candidates, norms)
        damped = gram + ridge_gram(
            candidates, self.state.damping.value, self._ridge_rows, metrics
        )
        slopes = pad_pair([dot(gradients, each) for each in candidates])
        # The first candidate enters with its sign here, once.
        signs = tf.constant([-1.0, 1.0], rate.dtype)
        gram *= signs[:, tf.newaxis] * signs
        damped *= signs[:, tf.newaxis] * signs
        slopes *= signs
        length = self.length
        coefficients = quadratic_coefficients(damped, slopes, length, rate)
        if length.automatic_rate:
            coefficients *= tf.stack([rate, tf.ones_like(rate)])
        if self.norm_constraint is not None:
            coefficients *= norm_scale(
                quadratic_form(gram, coefficients), self.norm_constraint
            )
        model = SolvedModel(
            change=model_change(damped, slopes, coefficients),
            fisher_share=tf.math.divide_no_nan(
                quadratic_form(gram, coefficients),
                quadratic_form(damped, coefficients),
            ),
        )
        return coefficients, model

    @property
    def _needs_gram(self) -> bool:
        """Whether anything asks for `δᵀFδ`."""
        return (
            self.length.needs_model
            or self.needs_objective
            or self.norm_constraint is not None
        )

    @property
    def _estimates_model(self) -> bool:
        """Whether `δᵀFδ` comes from random cotangents."""
        return (
            self.quadratic_model.kind == "estimated"
            and self.fisher in ("propagated", "sampled")
            and not self.curvature.plan.fallback
        )

    def _gram(
        self,
        observation: Observation,
        candidates: Sequence[Any],
        norms: tf.Tensor,
    ) -> tf.Tensor:
        """Returns `δ_iᵀ F δ_j`, averaged as the quadratic model says.

        Args:
            observation: The batch.
            candidates: One or two directions, `P∇` first.
            norms: Tensor `[2]`, (n₁, n₂) of `QuadraticModel`.
        """
        step = tf.convert_to_tensor(self.iterations)

        def update() -> tf.Tensor:
            gram = self._batch_gram(observation, candidates)
            gram = pad_gram(tf.cast(gram, self.curvature_dtype))
            self._average.add(gram, norms, step)
            return tf.constant(0)

        tf.cond(self._average.is_due(step), update, lambda: tf.constant(0))
        return distribution.sum_over_replicas(self._average.read(norms))

    def _batch_gram(
        self, observation: Observation, candidates: Sequence[Any]
    ) -> tf.Tensor:
        """Returns `δ_iᵀ F δ_j` on the batch."""
        if self._estimates_model:
            return self._estimated_gram(observation, candidates)
        variables = _compat.optimizer_variables(self)
        return fisher_gram(
            observation.tape.gradient_tape,
            observation.terms,
            [variable.value for variable in variables],
            [self.curvature.from_matrices(each) for each in candidates],
        )

    def _estimated_gram(
        self, observation: Observation, candidates: Sequence[Any]
    ) -> tf.Tensor:
        """Returns the mean of as many estimates as a small batch needs."""
        captured = self._capture(observation)
        batches = self.state.count("batches") - 1
        seed = distribution.replica_seed(
            tf.stack([tf.constant(self.seed, tf.int32), batches])
        )

        def once(index: tf.Tensor) -> tf.Tensor:
            folded = tf.random.fold_in(seed, index, alg="philox")
            backward = captured.backward(
                random_cotangents(observation.terms, self.fisher, folded)
            )
            return estimated_gram(
                captured, backward, candidates, _MODEL_EXAMPLES
            )

        count = tf.clip_by_value(
            _MODEL_EXAMPLES // tf.maximum(captured.batch, 1), 1, _MOST_ESTIMATES
        )
        total = sum_over(once, count)
        return total / tf.cast(count, total.dtype)

    def _capture(self, observation: Observation) -> CapturedPass:
        """Returns the forward pass, ready to send cotangents back through."""
        variables = _compat.optimizer_variables(self)
        return CapturedPass(
            observation.tape.gradient_tape,
            observation.terms,
            observation.records,
            self.curvature.entries,
            [variable.value for variable in variables],
            observation.share,
        )
