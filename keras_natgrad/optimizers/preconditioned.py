"""Optimizers that precondition layer by layer: one step of theirs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import tensorflow as tf
from typing_extensions import override

from keras_natgrad import _compat
from keras_natgrad.capture import Plan
from keras_natgrad.capture.positions import known_positions
from keras_natgrad.curvature import (
    BlockDiagonal,
    BlockOptions,
    CapturedPass,
    estimated_gram,
    fisher_gram,
    random_cotangents,
)
from keras_natgrad.optimizers.base import Observation
from keras_natgrad.optimizers.retraction import RetractingOptimizer
from keras_natgrad.optimizers.state import StepState
from keras_natgrad.optimizers.summary import render_table
from keras_natgrad.step import (
    LevenbergMarquardt,
    Refresh,
    StepLength,
    TrialStep,
    is_multiple,
    norm_scale,
    quadratic_coefficients,
)
from keras_natgrad.step.directions import (
    Ridge,
    dot,
    in_metric,
    l2_curvature,
    pad_gram,
    pad_pair,
    ridge_gram,
)
from keras_natgrad.step.length import model_change, quadratic_form
from keras_natgrad.step.update import apply_update

# Examples of a batch that the estimated quadratic model looks at.
_MODEL_EXAMPLES = 256


class SolvedModel(NamedTuple):
    """What the quadratic model says of the chosen update δ.

    Attributes:
        change: Predicted change of the loss.
        fisher_share: `δᵀFδ / δᵀ(F + λI)δ`, in [0, 1].
    """

    change: tf.Tensor
    fisher_share: tf.Tensor


class PreconditionedOptimizer(RetractingOptimizer):
    """Base class of optimizers with one Fisher block per layer.

    A subclass sets the settings below in its constructor; what happens in a
    step is here, and is the same for every kind of block. `fisher` is one of
    `FISHER_KINDS`.

    Attributes:
        factor_decay: Decay of the running averages.
        refresh: `Refresh`, the periods.
        length: `StepLength`.
        block_options: `BlockOptions`.
        quadratic_model: `"exact"` or `"estimated"`.
        curvature: `BlockDiagonal`, once built.
    """

    factor_decay: float
    refresh: Refresh
    length: StepLength
    block_options: BlockOptions
    quadratic_model: str
    curvature: BlockDiagonal

    # -- State -----------------------------------------------------------

    @override
    def build_curvature(self, plan: Plan, variables: list[Any]) -> None:
        shapes = [tuple(v.shape) for v in variables]
        self._hide("curvature", self.make_blocks(plan, shapes))
        add = self.add_curvature_variable
        self._hide("state", StepState(add, self.add_variable))
        names = [
            f"{i}_{variable.path.replace('/', '_')}"
            for i, variable in enumerate(variables)
        ]
        self.curvature.build(names, add)
        velocities = []
        if self.length.momentum != 0 or self.length.spring:
            velocities = [
                add(f"{name}_velocity", shape, "zeros")
                for name, shape in zip(names, shapes, strict=True)
            ]
        self._hide("_velocities", velocities)
        if self.length.spring:
            # λ of the inverses in use.
            self._hide("_inverted_at", add("inverted_at", (), "zeros"))
        ridge = [l2_curvature(variable.regularizer) for variable in variables]
        self._hide("_ridge", ridge)
        pairs = [
            (e.variables[0], e.variables[-1]) for e in self.curvature.entries
        ]
        self._hide("_ridge_rows", [Ridge(ridge[i], ridge[j]) for i, j in pairs])

    def make_blocks(
        self, plan: Plan, shapes: Sequence[tuple[int, ...]]
    ) -> BlockDiagonal:
        """Returns the unbuilt blocks of the network."""
        return BlockDiagonal(plan, shapes, self.block_options)

    def summary(self, print_fn: Any = None) -> None:
        """Prints what each layer got, and why others fall back.

        A row has the block, the shape of the parameters, the positions at
        which one call applies them (if known), the approximation and its
        memory. For a compiled model, a line per output says how its Fisher is
        found. The last line says what share of the parameters is
        preconditioned.

        Args:
            print_fn: Function that prints one string. Defaults to `print`.
        """
        if not self._curvature_built:
            self.build(self.attached_model().trainable_variables)
        variables = _compat.optimizer_variables(self)
        positions = known_positions(
            self._plan, self.attached_model(), variables
        )
        text = render_table(
            self.curvature, variables, self.loss_rows(), positions
        )
        (print_fn or print)(text)

    # -- One step --------------------------------------------------------

    @override
    def observe(self, observation: Observation) -> None:
        batches = self.state.count("batches")
        seed = tf.stack([tf.constant(self.seed, tf.int32), batches])
        captured: CapturedPass | None = None
        if self._estimates_model:
            # The quadratic model needs this pass at every step; an update of
            # the statistics then shares it.
            captured = observation.captured = self._capture(observation)
            observation.backward = captured.backward(
                random_cotangents(observation.terms, self.fisher, seed)
            )

        def update() -> tf.Tensor:
            # Made here, it costs nothing on the steps between.
            own = captured or self._capture(observation)
            statistics = self.curvature.statistics(
                own, self.fisher, seed, observation.backward
            )
            self.curvature.accumulate(statistics, self.factor_decay)
            self.state.increment(curvature_updates=1)
            self.state.update_at.assign(
                self.refresh.next_due(batches, self.refresh.curvature_period)
            )
            return tf.constant(0)

        due = self.refresh.is_due(batches, self.state.update_at.value)
        tf.cond(due & observation.accepted, update, lambda: tf.constant(0))
        self.state.increment(batches=1)

    def _capture(self, observation: Observation) -> CapturedPass:
        """Returns the forward pass, ready to send cotangents back through."""
        variables = _compat.optimizer_variables(self)
        return CapturedPass(
            observation.tape.gradient_tape,
            observation.terms,
            observation.records,
            self.curvature.entries,
            [variable.value for variable in variables],
        )

    @override
    def curvature_step(
        self,
        observation: Observation,
        gradients: Sequence[tf.Tensor],
        learning_rate: Any,
    ) -> None:
        rate = tf.cast(learning_rate, self.curvature_dtype)
        self._set_damping()
        step = tf.convert_to_tensor(self.iterations)
        due = self.refresh.is_due(step, self.state.refresh_at.value)
        # Zero at the first step, and after one that was taken back: then the
        # inverses must not be used as they are.
        forced = tf.equal(self.state.refresh_at.value, 0)
        # Otherwise there was a step before this one, and it has held.
        self.state.end_surges(~forced)
        self._refresh_if(forced)
        matrices = self.curvature.to_matrices(gradients)
        solved = self.curvature.precondition(self._pulled(matrices))
        if self.line_search is not None:
            rate *= self._search(observation, solved)
        if self._needs_gram:
            coefficients, model = self._solve_model(
                observation, matrices, solved, rate
            )
        else:
            momentum = tf.constant(self.length.momentum, rate.dtype)
            coefficients, model = tf.stack([rate, momentum]), None
        self._move(solved, coefficients)
        if self._guarded:
            self.state.guard.accept(observation.tape.loss)
        self.state.note(
            learning_rate=coefficients[0],
            momentum=coefficients[1] + self.length.spring,
        )
        if model is not None:
            self.state.note(model_change=model.change)
            self._adapt_damping(observation, model)
        # An inverse that knows the batch it is applied to fits its noise: the
        # statistics of this batch serve the next ones.
        self._refresh_if(due & ~forced)

    def _pulled(self, gradients: Sequence[tf.Tensor]) -> Sequence[tf.Tensor]:
        """Returns `∇ + λ μ D φ₋₁` of SPRING, or the gradient as it is.

        D is the metric of the damping, `Block.damping_rows`.
        """
        if not self.length.spring:
            return gradients
        # The last update is −α φ₋₁; zero where it was taken back.
        pull = -tf.math.divide_no_nan(
            self.length.spring * self._inverted_at.value,
            self.state.last("learning_rate"),
        )
        last = self.curvature.to_matrices(self._velocities)
        metrics = [e.block.damping_rows() for e in self.curvature.entries]
        return [
            g + pull * in_metric(v, rows)
            for g, v, rows in zip(gradients, last, metrics, strict=True)
        ]

    def _search(
        self, observation: Observation, solved: Sequence[tf.Tensor]
    ) -> tf.Tensor:
        """Returns the best learning rate along −P∇ on the batch."""
        dtype = solved[0].dtype
        objective = observation.tape.objective
        if self.line_search is None or objective is None:
            return tf.ones([], dtype)
        trial = TrialStep(
            _compat.optimizer_variables(self),
            self.curvature.from_matrices(solved),
            objective,
        )
        loss = tf.cast(observation.tape.loss, dtype)
        rate, _ = self.line_search.search(trial.evaluate, loss)
        trial.take_back(tf.constant(True))
        return rate

    def _solve_model(
        self,
        observation: Observation,
        gradients: Sequence[tf.Tensor],
        solved: Sequence[tf.Tensor],
        rate: tf.Tensor,
    ) -> tuple[tf.Tensor, SolvedModel]:
        """Returns the coefficients of (−P∇, δ₋₁) and what they promise."""
        candidates = [list(solved)]
        if self.length.momentum != 0:
            candidates.append(self.curvature.to_matrices(self._velocities))
        # The first candidate enters with its sign here, once.
        signs = tf.constant([-1.0, 1.0], rate.dtype)
        gram = self._gram(observation, candidates)
        metrics = [e.block.damping_rows() for e in self.curvature.entries]
        damped = gram + ridge_gram(
            candidates, self.state.damping.value, self._ridge_rows, metrics
        )
        slopes = pad_pair([dot(gradients, each) for each in candidates])
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

    def _move(
        self, solved: Sequence[tf.Tensor], coefficients: tf.Tensor
    ) -> None:
        """Moves every variable by `δ = −α P∇ + μ δ₋₁`."""
        variables = _compat.optimizer_variables(self)
        directions = self.curvature.from_matrices(solved)
        velocities = self._velocities or [None] * len(variables)
        for variable, velocity, direction in zip(
            variables, velocities, directions, strict=True
        ):
            apply_update(
                variable, velocity, direction, coefficients[0], coefficients[1]
            )

    def _set_damping(self) -> None:
        """Starts the damping, or looks it up in its schedule."""
        if isinstance(self.damping, float):
            self.state.damping.assign(self.damping)
        elif isinstance(self.damping, LevenbergMarquardt):
            self.state.damping.assign(
                tf.cond(
                    tf.equal(self.state.count("refreshes"), 0),
                    lambda: self.damping.start(
                        self.curvature.mean_eigenvalue()
                    ),
                    lambda: self.state.damping.value,
                )
            )
        else:
            self.state.damping.assign(self.damping(self.iterations))

    def _refresh_if(self, due: tf.Tensor) -> None:
        """Recomputes the inverses when it is time."""
        step = tf.convert_to_tensor(self.iterations)

        def refresh() -> tf.Tensor:
            damping = self._inverse_damping()
            if self.length.spring:
                self._inverted_at.assign(damping)
            retries, failures = self.curvature.refresh(damping, self._ridge)
            self.state.increment(
                refreshes=1, retries=retries, failures=failures
            )
            self.state.refresh_at.assign(
                self.refresh.next_due(step, self.refresh.inverse_period)
            )
            return tf.constant(0)

        tf.cond(due, refresh, lambda: tf.constant(0))

    def _inverse_damping(self) -> tf.Tensor:
        """Returns the damping of the inverses."""
        damping = tf.convert_to_tensor(self.state.damping)
        if isinstance(self.damping, LevenbergMarquardt):
            damping *= self.damping.inverse_ratio
        return damping

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
        """Whether `δᵀFδ` comes from the random cotangents of the batch."""
        return (
            self._needs_gram
            and self.quadratic_model == "estimated"
            and self.fisher in ("propagated", "sampled")
            and not self.curvature.plan.fallback
        )

    def _gram(
        self, observation: Observation, candidates: Sequence[Any]
    ) -> tf.Tensor:
        """Returns `δ_iᵀ F δ_j` on the batch, zeros where nobody needs it."""
        if not self._needs_gram:
            return tf.zeros([2, 2], self.curvature_dtype)
        if observation.backward is not None:
            gram = estimated_gram(
                observation.captured,
                observation.backward,
                candidates,
                _MODEL_EXAMPLES,
            )
        else:
            variables = _compat.optimizer_variables(self)
            gram = fisher_gram(
                observation.tape.gradient_tape,
                observation.terms,
                [variable.value for variable in variables],
                [self.curvature.from_matrices(each) for each in candidates],
            )
        return pad_gram(tf.cast(gram, self.curvature_dtype))

    def _adapt_damping(
        self, observation: Observation, model: SolvedModel
    ) -> None:
        """Compares the model with the loss, where the damping adapts."""
        rule, objective = self.damping, observation.tape.objective
        if not isinstance(rule, LevenbergMarquardt) or objective is None:
            return
        loss = tf.cast(observation.tape.loss, model.change.dtype)

        def adapt() -> tf.Tensor:
            change = tf.cast(objective(), loss.dtype) - loss
            ratio = tf.math.divide_no_nan(change, model.change)
            self.state.note(reduction_ratio=ratio)
            self.state.damping.assign(
                rule.adapt(
                    self.state.damping.value,
                    ratio,
                    model.fisher_share,
                    self.curvature.mean_eigenvalue(),
                )
            )
            return tf.constant(0)

        step = tf.convert_to_tensor(self.iterations)
        tf.cond(is_multiple(step, rule.period), adapt, lambda: tf.constant(0))
