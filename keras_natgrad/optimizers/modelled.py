"""Optimizers with a quadratic model of the loss along their directions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from keras_natgrad import _compat, replicas
from keras_natgrad.curvature import (
    Backward,
    BlockDiagonal,
    CapturedPass,
    estimated_gram,
    fisher_gram,
    gram_of_tangents,
    own_tangents,
    random_cotangents,
)
from keras_natgrad.optimizers.observation import Observation
from keras_natgrad.optimizers.retraction import RetractingOptimizer
from keras_natgrad.optimizers.state import StepState
from keras_natgrad.step import (
    AveragedGram,
    QuadraticModel,
    Refresh,
    StepLength,
    layer_coefficients,
    norm_scale,
    quadratic_coefficients,
)
from keras_natgrad.step.directions import (
    Ridge,
    dots,
    metric_dots,
    pad,
    ridge_gram,
)
from keras_natgrad.step.quadratic import (
    for_each_layer,
    model_change,
    of_all_layers,
    quadratic_form,
)

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
        learning_rate: The rate, or the mean of the layers' rates, weighted by
            their slopes `∇ᵀP∇`.
    """

    change: tf.Tensor
    fisher_share: tf.Tensor
    learning_rate: tf.Tensor


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
    _common: AveragedGram

    def build_model(self) -> None:
        """Creates the state of the quadratic model, where there is one."""
        if self._needs_gram:
            self._hide("_average", self._averaged(self._directions))
        if self._needs_gram and self._by_layer:
            self._hide("_common", self._averaged(2, "common_quotient"))

    def _averaged(self, size: int, name: str = "quotient") -> AveragedGram:
        return AveragedGram(
            self.quadratic_model,
            self.refresh,
            self.add_curvature_variable,
            self.add_variable,
            self.add_summed_variable,
            size,
            name,
        )

    def _solve_model(
        self,
        observation: Observation,
        gradients: Sequence[tf.Tensor],
        pulled: Sequence[tf.Tensor],
        solved: Sequence[tf.Tensor],
        rate: tf.Tensor,
    ) -> tuple[tf.Tensor, SolvedModel]:
        """Returns the coefficients of (−P∇, δ₋₁) and what they promise.

        By layer, the coefficients have one for each layer's part of −P∇.
        """
        by_layer = self._by_layer
        candidates = [list(solved)]
        if self.length.momentum != 0:
            candidates.append(self.curvature.to_matrices(self._velocities))
        metrics = self.curvature.damping_rows()
        squares = self._joined(
            dots(pulled, solved),
            [metric_dots(each, each, metrics) for each in candidates[1:]],
        )
        batch = _batch_size(observation)
        gram, common = self._grams(observation, candidates, squares, batch)
        ridge = ridge_gram(
            candidates,
            self.state.damping.value,
            self._ridge_rows,
            metrics,
            by_layer,
        )
        slopes = self._joined(
            dots(gradients, candidates[0]),
            [dots(gradients, each) for each in candidates[1:]],
        )
        if not by_layer:
            return self._minimum(common, ridge, slopes, rate)

        def one_rate() -> tuple[tf.Tensor, SolvedModel]:
            coefficients, model = self._minimum(
                common, of_all_layers(ridge), of_all_layers(slopes), rate
            )
            return for_each_layer(coefficients, self._directions - 1), model

        def several_rates() -> tuple[tf.Tensor, SolvedModel]:
            return self._minimum(gram, ridge, slopes, rate, _samples(batch))

        # Of few examples, the slopes and quotients by layer are mostly noise: a
        # transformer surged on batches of 32 (docs, "a rate for each layer").
        few = replicas.replica_count() * batch < _MODEL_EXAMPLES
        return tf.cond(few, one_rate, several_rates)

    def _minimum(
        self,
        gram: tf.Tensor,
        ridge: tf.Tensor,
        slopes: tf.Tensor,
        rate: tf.Tensor,
        samples: tf.Tensor | None = None,
    ) -> tuple[tf.Tensor, SolvedModel]:
        """Returns the best coefficients and what they promise.

        Args:
            gram: Tensor `[n, n]`, `δ_iᵀ F δ_j`, with δ₋₁ last and P∇ or its
                parts before.
            ridge: The same of the damping and of regularizers.
            slopes: Tensor `[n]`.
            rate: Scalar, the learning rate.
            samples: In the estimate of the Gram matrix; `None` where P∇ is
                one direction.
        """
        # P∇ enters with its sign here, once.
        ones = tf.ones([int(slopes.shape[0]) - 1], rate.dtype)
        signs = tf.concat([-ones, [1.0]], axis=0)
        gram = gram * signs[:, tf.newaxis] * signs
        damped = gram + ridge * signs[:, tf.newaxis] * signs
        slopes = slopes * signs
        length = self.length
        if samples is None:
            coefficients = quadratic_coefficients(damped, slopes, length, rate)
        else:
            coefficients = layer_coefficients(
                damped, slopes, length, rate, samples
            )
        if length.automatic_rate:
            coefficients *= tf.concat([rate * ones, [1.0]], axis=0)
        if self.norm_constraint is not None:
            coefficients *= norm_scale(
                quadratic_form(gram, coefficients), self.norm_constraint
            )
        mean = coefficients[0]
        if samples is not None:
            shares = tf.math.divide_no_nan(slopes, tf.reduce_sum(slopes[:-1]))
            mean = tf.tensordot(shares[:-1], coefficients[:-1], axes=1)
        model = SolvedModel(
            change=model_change(damped, slopes, coefficients),
            fisher_share=tf.math.divide_no_nan(
                quadratic_form(gram, coefficients),
                quadratic_form(damped, coefficients),
            ),
            learning_rate=mean,
        )
        return coefficients, model

    def _joined(
        self, first: tf.Tensor, others: Sequence[tf.Tensor]
    ) -> tf.Tensor:
        """Joins products of every block with P∇ and with δ₋₁.

        Args:
            first: Tensor `[blocks]`, of P∇.
            others: The same of δ₋₁, where there is one.

        Returns:
            Tensor `[directions]`.
        """
        if not self._by_layer:
            first = tf.reduce_sum(first, keepdims=True)
        parts = [first, *(tf.reduce_sum(e, keepdims=True) for e in others)]
        return pad(tf.concat(parts, axis=0), self._directions)

    @property
    def _by_layer(self) -> bool:
        """Whether layers have rates of their own, on large batches."""
        return (
            self.quadratic_model.by_layer
            and self._estimates_model
            and self.length.automatic_rate
            and not self.length.spring
        )

    @property
    def _directions(self) -> int:
        """Number of directions of the quadratic model, δ₋₁ included."""
        return 1 + (len(self.curvature.entries) if self._by_layer else 1)

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

    def _grams(
        self,
        observation: Observation,
        candidates: Sequence[Any],
        squares: tf.Tensor,
        batch: tf.Tensor,
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns `δ_iᵀ F δ_j`, averaged as the quadratic model says.

        Args:
            observation: The batch.
            candidates: One or two directions, `P∇` first.
            squares: Tensor `[directions]`, the n_i² of `QuadraticModel`.
            batch: See `_batch_size`.

        Returns:
            Tensors `[directions, directions]`, and `[2, 2]` with P∇ as one
            direction: the same where the layers have one rate.
        """
        step = tf.convert_to_tensor(self.iterations)
        averages = [(self._average, squares)]
        if self._by_layer:
            averages.append((self._common, of_all_layers(squares)))
        norms = [tf.sqrt(tf.maximum(each, 0)) for _, each in averages]

        def update() -> tf.Tensor:
            gram = self._batch_gram(observation, candidates)
            gram = pad(tf.cast(gram, self.curvature_dtype), self._directions)
            few = batch < _MODEL_EXAMPLES
            self._average.add(gram, norms[0], step, few)
            if self._by_layer:
                self._common.add(of_all_layers(gram), norms[1], step, few)
            return tf.constant(0)

        tf.cond(self._average.is_due(step), update, lambda: tf.constant(0))
        found = [
            replicas.sum_over_replicas(average.read(each))
            for (average, _), each in zip(averages, norms, strict=True)
        ]
        return found[0], found[-1]

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
        seed = replicas.replica_seed(
            tf.stack([tf.constant(self.seed, tf.int32), batches])
        )
        count = _estimates(captured.batch)

        def backward(index: Any) -> Backward:
            folded = tf.random.fold_in(seed, index, alg="philox")
            return captured.backward(
                random_cotangents(observation.terms, self.fisher, folded)
            )

        def one() -> tf.Tensor:
            gram = estimated_gram(
                captured,
                backward(0),
                candidates,
                _MODEL_EXAMPLES,
                self._by_layer,
            )
            return tf.cast(gram, self.curvature_dtype)

        def several() -> tf.Tensor:
            # The cotangents differ, the products with the directions do not.
            own = own_tangents(captured.inputs, candidates)

            def add(
                index: tf.Tensor, total: tf.Tensor
            ) -> tuple[tf.Tensor, tf.Tensor]:
                cotangents = backward(index).cotangents
                gram = gram_of_tangents(own, cotangents, self._by_layer)
                return index + 1, total + tf.cast(gram, total.dtype)

            zeros = tf.zeros([size, size], self.curvature_dtype)
            _, total = tf.while_loop(
                lambda index, _: index < count,
                add,
                (tf.constant(0, tf.int32), zeros),
            )
            return total / tf.cast(count, total.dtype)

        size = len(candidates)
        if self._by_layer:
            size += len(self.curvature.entries) - 1
        return tf.cond(count > 1, several, one)

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


def _batch_size(observation: Observation) -> tf.Tensor:
    """Returns the examples of a replica, the mean over all: the same on all."""
    own = tf.shape(observation.terms[0].outputs)[0]
    total = replicas.sum_over_replicas(tf.cast(own, tf.float32))
    return tf.cast(total / replicas.replica_count(), tf.int32)


def _estimates(batch: tf.Tensor) -> tf.Tensor:
    """Returns how many estimates of the model a batch takes."""
    return tf.clip_by_value(
        _MODEL_EXAMPLES // tf.maximum(batch, 1), 1, _MOST_ESTIMATES
    )


def _samples(batch: tf.Tensor) -> tf.Tensor:
    """Returns how many samples all replicas' estimates are the mean of."""
    used = tf.clip_by_value(batch, 1, _MODEL_EXAMPLES)
    return replicas.replica_count() * used * _estimates(batch)
