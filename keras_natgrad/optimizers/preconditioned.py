"""Optimizers that precondition layer by layer: one step of theirs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf
from typing_extensions import override

from keras_natgrad import _compat, replicas
from keras_natgrad.capture import Plan
from keras_natgrad.capture.positions import known_positions
from keras_natgrad.curvature import (
    BlockDiagonal,
    BlockOptions,
)
from keras_natgrad.optimizers.host_refresh import HostRefresh
from keras_natgrad.optimizers.modelled import ModelledOptimizer, SolvedModel
from keras_natgrad.optimizers.observation import Observation
from keras_natgrad.optimizers.state import StepState
from keras_natgrad.optimizers.summary import render_table
from keras_natgrad.step import (
    LevenbergMarquardt,
    QuadraticModel,
    Refresh,
    StepLength,
    TrialStep,
    is_multiple,
)
from keras_natgrad.step.damping import least_scale
from keras_natgrad.step.directions import (
    Ridge,
    in_metric,
    l2_curvature,
)
from keras_natgrad.step.update import apply_update


class PreconditionedOptimizer(ModelledOptimizer):
    """Base class of optimizers with one Fisher block per layer.

    A subclass sets the settings below in its constructor; what happens in a
    step is here, and is the same for every kind of block. `fisher` is one of
    `FISHER_KINDS`.

    Attributes:
        factor_decay: Decay of the running averages.
        refresh: `Refresh`, the periods.
        length: `StepLength`.
        block_options: `BlockOptions`.
        quadratic_model: `QuadraticModel`.
        curvature: `BlockDiagonal`, once built.
    """

    factor_decay: float
    refresh: Refresh
    length: StepLength
    block_options: BlockOptions
    quadratic_model: QuadraticModel
    curvature: BlockDiagonal
    _host_refresh: HostRefresh | None = None

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
        self.curvature.build(names, add, self.add_summed_variable)
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
        self.build_model()
        self.note_ridge(variables)

    def note_ridge(self, variables: Sequence[Any]) -> None:
        """Notes the curvature of the variables' L2 regularizers."""
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
            self._plan,
            self.attached_model(),
            self.model_variables(variables),
        )
        text = render_table(
            self.curvature, variables, self.loss_rows(), positions
        )
        (print_fn or print)(text)

    # -- One step --------------------------------------------------------

    @override
    def check_replicas(self) -> None:
        super().check_replicas()
        if self.line_search is not None:
            replicas.refuse_replicas(
                type(self).__name__,
                "a LineSearch",
                "every trial needs the loss of the whole batch",
                "Use learning_rate='auto'.",
            )
        if self.refresh.where != "graph":
            replicas.refuse_replicas(
                type(self).__name__,
                f"refresh_where={self.refresh.where!r}",
                "the inverses are those of one device",
                "Use refresh_where='graph'.",
            )

    @override
    def observe(self, observation: Observation) -> None:
        batches = self.state.count("batches")
        seed = replicas.replica_seed(
            tf.stack([tf.constant(self.seed, tf.int32), batches])
        )

        def update() -> tf.Tensor:
            # Captured here, it costs nothing on the steps between.
            captured = self._capture(observation)
            self.curvature.accumulate(
                self.curvature.statistics(captured, self.fisher, seed),
                self.factor_decay,
                keep_finite=True,
            )
            self.state.increment(curvature_updates=1)
            self.state.update_at.assign(
                self.refresh.next_due(batches, self.refresh.curvature_period)
            )
            return tf.constant(0)

        due = self.refresh.is_due(batches, self.state.update_at.value)
        tf.cond(due & observation.accepted, update, lambda: tf.constant(0))
        self.state.increment(batches=1)

    @override
    def curvature_step(
        self,
        observation: Observation,
        gradients: Sequence[tf.Tensor],
        learning_rate: Any,
    ) -> None:
        rate = tf.cast(learning_rate, self.curvature_dtype)
        self._set_damping(gradients, observation.loss)
        step = tf.convert_to_tensor(self.iterations)
        due = self.refresh.is_due(step, self.state.refresh_at.value)
        # Zero at the first step, and after one that was taken back: then the
        # inverses must not be used as they are.
        forced = tf.equal(self.state.refresh_at.value, 0)
        # Otherwise there was a step before this one, and it has held.
        self.state.end_surges(~forced)
        refresh = replicas.traced_once(self._refresh)
        self._refresh_if(forced, refresh)
        matrices = self.curvature.to_matrices(gradients)
        if self.curvature.uses_gradients:
            self.curvature.observe_gradients(matrices)
        pulled = self._pulled(matrices)
        solved = self.curvature.precondition(pulled)
        if self.line_search is not None:
            rate *= self._search(observation, solved)
        if self._needs_gram:
            coefficients, model = self._solve_model(
                observation, matrices, pulled, solved, rate
            )
        else:
            momentum = tf.constant(self.length.momentum, rate.dtype)
            coefficients, model = tf.stack([rate, momentum]), None
        # Nothing moves where the model is not finite.
        finite = tf.reduce_all(tf.math.is_finite(coefficients))
        coefficients = tf.where(finite, coefficients, 0.0)
        self._move(solved, coefficients)
        if self._guarded:
            self.state.guard.accept(observation.loss)
        self.state.note(
            learning_rate=coefficients[0]
            if model is None
            else model.learning_rate,
            momentum=coefficients[-1] + self.length.spring,
        )
        if model is not None:
            self.state.note(model_change=model.change)
            self._adapt_damping(observation, model)
        # An inverse that knows the batch it is applied to fits its noise: the
        # statistics of this batch serve the next ones.
        if self.steps_outside:
            self._ask_if(due & ~forced)
        else:
            self._refresh_if(due & ~forced, refresh)

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
        metrics = self.curvature.damping_rows()
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
        loss = tf.cast(observation.loss, dtype)
        rate, _ = self.line_search.search(trial.evaluate, loss)
        trial.take_back(tf.constant(True))
        return rate

    def _move(
        self, solved: Sequence[tf.Tensor], coefficients: tf.Tensor
    ) -> None:
        """Moves every variable by `δ = −α P∇ + μ δ₋₁`.

        Args:
            solved: `P∇`, one matrix per block.
            coefficients: One α, or one per block; then μ.
        """
        variables = _compat.optimizer_variables(self)
        directions = self.curvature.from_matrices(solved)
        velocities = self._velocities or [None] * len(variables)
        *rates, momentum = tf.unstack(coefficients)
        if len(rates) == 1:
            rates *= len(self.curvature.entries)
        for rate, entry in zip(rates, self.curvature.entries, strict=True):
            for index in entry.variables:
                apply_update(
                    variables[index],
                    velocities[index],
                    directions[index],
                    rate,
                    momentum,
                )

    def _set_damping(
        self, gradients: Sequence[tf.Tensor], loss: tf.Tensor
    ) -> None:
        """Starts the damping, or looks it up in its schedule."""
        rule, scale = self.damping, self.state.damping_scale
        if isinstance(rule, float):
            self.state.damping.assign(rule * scale.value)
        elif isinstance(rule, LevenbergMarquardt):
            first = tf.equal(self.state.count("refreshes"), 0)
            # Again and again, steps taken back would raise it without end.
            raised = tf.equal(self.state.refresh_at.value, 0)

            def start() -> tf.Tensor:
                least = least_scale(gradients, loss)
                mean = self.curvature.mean_eigenvalue()
                mean = tf.maximum(mean, tf.cast(least, mean.dtype))
                highest = rule.maximum * mean
                value = self.state.damping.value
                self.state.damping.assign(
                    tf.where(
                        first,
                        rule.start(mean) * scale.value,
                        tf.minimum(value, highest),
                    )
                )
                return tf.constant(0)

            replicas.across_replicas(
                lambda: tf.cond(first | raised, start, lambda: tf.constant(0))
            )
        else:
            scheduled = tf.cast(rule(self.iterations), scale.dtype)
            self.state.damping.assign(scheduled * scale.value)

    def _refresh(self) -> tf.Tensor:
        """Recomputes the inverses."""
        damping = self.inverse_damping()
        self.note_inverses(damping)
        retries, failures = self.curvature.refresh(
            damping, self._ridge, replicas.refresh_devices()
        )
        self.state.increment(refreshes=1, retries=retries, failures=failures)
        self._plan_refresh()
        return tf.constant(0)

    def _refresh_if(
        self, due: tf.Tensor, refresh: Callable[[], tf.Tensor]
    ) -> None:
        """Recomputes the inverses when it is time."""
        replicas.across_replicas(
            lambda: tf.cond(due, refresh, lambda: tf.constant(0))
        )

    def _ask_if(self, due: tf.Tensor) -> None:
        """Asks for a refresh when it is time, see `after_step`."""

        def ask() -> tf.Tensor:
            self.state.refresh_asked.assign(1)
            self._plan_refresh()
            return tf.constant(0)

        tf.cond(due, ask, lambda: tf.constant(0))

    def _plan_refresh(self) -> None:
        """Sets the step of the next refresh."""
        step = tf.convert_to_tensor(self.iterations)
        self.state.refresh_at.assign(
            self.refresh.next_due(step, self.refresh.inverse_period)
        )

    def refresh_inverses(self) -> None:
        """Recomputes the inverses from the statistics as they are now.

        Steps do so by themselves when it is due.
        """
        self._refresh_if(tf.constant(True), self._refresh)

    def after_step(self) -> None:
        """Refreshes inverses outside the graph, with `refresh_where`.

        `fit` and `train_on_batch` call it after every step. A training loop
        of one's own does so between two steps, outside any `tf.function`.
        """
        if not self.steps_outside or not self._curvature_built:
            return
        host_refresh = self._host_refresh
        if host_refresh is None:
            shapes = [tuple(v.shape) for v in _compat.optimizer_variables(self)]
            host_refresh = HostRefresh(
                self,
                self.make_blocks(self._plan, shapes),
                self.refresh.where == "async",
                self.refresh.inverse_period,
            )
            self._hide("_host_refresh", host_refresh)
        host_refresh.after_step()

    @property
    def steps_outside(self) -> bool:
        """Whether `after_step` has something to do."""
        return self.refresh.where != "graph"

    @property
    def ridge(self) -> Sequence[float]:
        """Per variable, the curvature of its L2 regularizer."""
        return self._ridge

    def note_inverses(self, damping: tf.Tensor) -> None:
        """Keeps the damping of the inverses in use, where SPRING needs it."""
        if self.length.spring:
            self._inverted_at.assign(damping)

    def inverse_damping(self) -> tf.Tensor:
        """Returns the damping of the inverses, a scalar."""
        damping = tf.convert_to_tensor(self.state.damping)
        if isinstance(self.damping, LevenbergMarquardt):
            damping *= self.damping.inverse_ratio
        return damping

    def _adapt_damping(
        self, observation: Observation, model: SolvedModel
    ) -> None:
        """Compares the model with the loss, where the damping adapts."""
        rule, objective = self.damping, observation.tape.objective
        if not isinstance(rule, LevenbergMarquardt) or objective is None:
            return
        loss = tf.cast(observation.loss, model.change.dtype)

        def adapt() -> None:
            now = replicas.sum_over_replicas(tf.cast(objective(), loss.dtype))
            ratio = tf.math.divide_no_nan(now - loss, model.change)
            self.state.note(reduction_ratio=ratio)
            mean = replicas.across_replicas(self.curvature.mean_eigenvalue)
            self.state.damping.assign(
                rule.adapt(
                    self.state.damping.value, ratio, model.fisher_share, mean
                )
            )

        step = tf.convert_to_tensor(self.iterations)
        replicas.cond(is_multiple(step, rule.period), adapt)
