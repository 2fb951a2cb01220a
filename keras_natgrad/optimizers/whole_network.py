"""Optimizers that treat the whole network at once: one step of theirs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf
from typing_extensions import override

from keras_natgrad import _compat, replicas
from keras_natgrad.capture import Plan
from keras_natgrad.curvature import BlockDiagonal, BlockOptions, CapturedPass
from keras_natgrad.curvature.network_root import NetworkRoot
from keras_natgrad.curvature.root_columns import Columns
from keras_natgrad.optimizers.adaptive import AdaptiveOptimizer
from keras_natgrad.optimizers.observation import Observation
from keras_natgrad.optimizers.residuals import ResidualObservation
from keras_natgrad.optimizers.state import StepState
from keras_natgrad.optimizers.summary import render_solver
from keras_natgrad.solvers import (
    ConjugateGradient,
    Direction,
    FisherRoot,
    Solution,
    Solver,
    System,
    check_memory,
    choose,
)
from keras_natgrad.solvers.remainder import remainder
from keras_natgrad.solvers.root import inner, rounding_of, scale
from keras_natgrad.step import (
    LevenbergMarquardt,
    Refresh,
    TrialStep,
    is_multiple,
    norm_scale,
)

# Damping after a step that was taken back, over that before.
_REJECTION = 4.0
# Of the running averages of a preconditioner, and when it is inverted.
_DECAY = 0.95
_REFRESH = Refresh(1, 20, growth=0.15)


class WholeNetworkOptimizer(AdaptiveOptimizer):
    """Base class of optimizers that solve one system for all layers.

    A subclass sets the settings below in its constructor; `fisher` is one of
    `COLUMN_KINDS`.

    Attributes:
        solver: `Solver`, or `None` to choose one at the first step.
        chosen_solver: The solver in use, `None` before the first step.
        momentum: μ of SPRING.
        max_elements: Most elements of memory that a solver may use.
    """

    solver: Solver | None
    chosen_solver: Solver | None
    momentum: float
    max_elements: int

    # -- State -----------------------------------------------------------

    @override
    def choose_layers(self, plan: Plan) -> Plan:
        return plan.only_one_way("used as its transpose too")

    @override
    def build_curvature(self, plan: Plan, variables: list[Any]) -> None:
        shapes = [tuple(variable.shape) for variable in variables]
        kind = _preconditioner(self.solver)
        dtype = self.curvature_dtype

        def add_shape(
            name: str, shape: tuple[int, ...], initializer: str
        ) -> Any:
            return keras.Variable(initializer, shape, dtype, False, name=name)

        if kind == "none":
            # The blocks only say how variables form matrices; nothing of them
            # is state.
            options = BlockOptions(block="identity", fallback="first_order")
            add = add_shape
        else:
            options = BlockOptions(block=kind)
            add = self.add_curvature_variable
        layers = BlockDiagonal(plan, shapes, options)
        layers.build([str(i) for i in range(len(variables))], add)
        self._hide("_layers", layers)

    @override
    def warn_of_plan(self, plan: Plan, variables: Sequence[Any]) -> None:
        """Layers that are not captured are exact here too, only slower."""

    @override
    def build(self, variables: Sequence[Any]) -> None:
        if self.built:
            return
        super().build(variables)
        add = self.add_curvature_variable
        self._hide("state", StepState(add, self.add_variable))
        # The mean eigenvalue of the Fisher on the first batch.
        self._hide("_scale", add("scale", (), "zeros"))
        previous = []
        if self.momentum or isinstance(self.solver, ConjugateGradient):
            previous = [
                add(
                    f"{i}_{variable.path.replace('/', '_')}_direction",
                    tuple(variable.shape),
                    "zeros",
                )
                for i, variable in enumerate(variables)
            ]
        self._hide("_previous", previous)

    def summary(self, print_fn: Any = None) -> None:
        """Prints the solver and the layers that it covers.

        Args:
            print_fn: Function that prints one string. Defaults to `print`.
        """
        if not self._curvature_built:
            self.build(self.attached_model().trainable_variables)
        variables = _compat.optimizer_variables(self)
        text = render_solver(
            self._layers, variables, self.chosen_solver, self.loss_rows()
        )
        (print_fn or print)(text)

    # -- One step --------------------------------------------------------

    @override
    def check_replicas(self) -> None:
        replicas.refuse_replicas(
            type(self).__name__,
            "an exact solver",
            "it solves with all examples of the batch at once",
            "Use keras_natgrad.KFAC, or one device.",
        )

    @override
    def observe(self, observation: Observation) -> None:
        self.state.increment(batches=1)

    @override
    def has_surged(self, observation: Observation) -> tf.Tensor:
        return tf.constant(False)

    @override
    def skip_step(self, observation: Observation) -> None:
        self.state.note_skip(tf.constant(False), ~observation.is_finite)

    @override
    def curvature_step(
        self,
        observation: Any,
        gradients: Sequence[tf.Tensor],
        learning_rate: Any,
    ) -> None:
        factor = self._factor(observation)
        solver = self.solver
        if solver is None:
            solver = choose(factor.size, factor.column_count, self.max_elements)
            self._hide("chosen_solver", solver)
        check_memory(
            solver, factor.size, factor.column_count, self.max_elements
        )
        residual = factor.residual()
        self._set_damping(factor)
        gradient = factor.from_tensors(gradients)
        system = System(
            residual,
            self._damping_like(residual),
            remainder(factor, gradient),
            self._shift(factor),
        )
        solution = self._solve(solver, factor, system)
        self.state.increment(
            retries=solution.retries,
            failures=solution.failures,
        )
        self._move(
            observation, factor, solution.direction, gradient, learning_rate
        )

    def _factor(self, observation: Any) -> FisherRoot:
        if isinstance(observation, ResidualObservation):
            return observation.factor
        variables = _compat.optimizer_variables(self)
        captured = CapturedPass(
            observation.tape.gradient_tape,
            observation.terms,
            observation.records,
            self._layers.entries,
            [variable.value for variable in variables],
        )
        seed = tf.stack(
            [tf.constant(self.seed, tf.int32), self.state.count("batches")]
        )
        columns = Columns(observation.terms, self.fisher, seed)
        return NetworkRoot(
            captured, columns, observation.tape.loss, self.max_elements
        )

    def _set_damping(self, factor: FisherRoot) -> None:
        """Starts the damping, or looks it up in its schedule."""
        rule, raised = self.damping, self.state.damping_scale
        if isinstance(rule, float):
            self.state.damping.assign(rule * raised.value)
        elif isinstance(rule, LevenbergMarquardt):
            # Zero only before the first step.
            started = self.state.damping.value > 0

            def start() -> tf.Tensor:
                mean = tf.cast(
                    factor.trace_estimate() / factor.size,
                    self.state.damping.dtype,
                )
                self._scale.assign(mean)
                return rule.start(mean) * raised.value

            self.state.damping.assign(
                tf.cond(started, lambda: self.state.damping.value, start)
            )
        else:
            scheduled = tf.cast(rule(self.iterations), raised.dtype)
            self.state.damping.assign(scheduled * raised.value)

    def _shift(self, factor: FisherRoot) -> list[tf.Tensor] | None:
        if not self.momentum:
            return None
        previous = factor.from_tensors([v.value for v in self._previous])
        return scale(self.momentum, previous)

    def _solve(
        self, solver: Solver, factor: FisherRoot, system: System
    ) -> Solution:
        if not isinstance(solver, ConjugateGradient):
            exact = isinstance(self.damping, float) and self.damping == 0.0
            return solver.solve(factor, system, exact=exact)
        start = None
        if self._previous and not self.momentum:
            start = factor.from_tensors([v.value for v in self._previous])
        inverse = None
        if _preconditioner(solver) != "none":
            self._update_preconditioner(factor, system.damping)
            inverse = self._precondition
        return solver.solve(factor, system, start=start, preconditioner=inverse)

    def _precondition(self, direction: Direction) -> list[tf.Tensor]:
        """Returns the blocks' inverse times a matrix per layer."""
        layers = self._layers
        return layers.split(layers.precondition(layers.join(direction)))

    def _update_preconditioner(
        self, factor: FisherRoot, damping: tf.Tensor
    ) -> None:
        """Renews the blocks: averages at every step, inverses when due."""
        if not isinstance(factor, NetworkRoot):
            raise ValueError(
                "A preconditioner needs the layers of a network; residuals "
                "have none. Use ConjugateGradient(preconditioner='none'). "
                f"Received: solver={self.solver!r}"
            )
        step = tf.cast(self.iterations, tf.int32)
        seed = tf.stack([tf.constant(self.seed, tf.int32), step])
        statistics = self._layers.statistics(
            factor.captured, "propagated", seed
        )
        self._layers.accumulate(statistics, _DECAY)

        def refresh() -> tf.Tensor:
            retries, failures = self._layers.refresh(
                damping, [0.0] * len(_compat.optimizer_variables(self))
            )
            self.state.increment(
                refreshes=1, retries=retries, failures=failures
            )
            self.state.refresh_at.assign(
                _REFRESH.next_due(step, _REFRESH.inverse_period)
            )
            return tf.constant(0)

        due = _REFRESH.is_due(step, self.state.refresh_at.value)
        tf.cond(due, refresh, lambda: tf.constant(0))

    def _move(
        self,
        observation: Any,
        factor: FisherRoot,
        direction: Direction,
        gradient: Direction,
        learning_rate: Any,
    ) -> None:
        """Makes the step `−α φ`, and lets the damping learn from it."""
        tensors = factor.to_tensors(direction)
        objective = observation.tape.objective
        variables = _compat.optimizer_variables(self)
        trial = TrialStep(variables, tensors, objective)
        dtype = direction[0].dtype
        rate = tf.cast(learning_rate, dtype)
        loss = tf.cast(observation.tape.loss, dtype)
        rule = self.damping
        adapts = isinstance(rule, LevenbergMarquardt) and objective is not None
        norm = tf.zeros([], dtype)
        if self.norm_constraint is not None or adapts:
            image = factor.transpose_product(direction)
            norm = tf.reduce_sum(tf.square(image))
        if self.line_search is not None and objective is not None:
            found, _ = self.line_search.search(trial.evaluate, loss)
            rate *= found
        if self.norm_constraint is not None:
            rate *= norm_scale(rate**2 * norm, self.norm_constraint)
        trial.place(rate)
        self.state.note(
            learning_rate=rate, momentum=tf.constant(self.momentum, dtype)
        )
        if not isinstance(rule, LevenbergMarquardt) or objective is None:
            self._remember(tensors, tf.constant(False))
            return
        ridge = self._damping_like(loss) * inner(direction, direction)
        change = 0.5 * rate**2 * (norm + ridge)
        change -= rate * inner(gradient, direction)
        share = tf.math.divide_no_nan(norm, norm + ridge)

        def adapt() -> tf.Tensor:
            true_change = trial.evaluate(rate) - loss
            # Near the minimum the change is rounding, and says nothing.
            noise = rounding_of(loss.dtype) * tf.abs(loss)
            rejected = ~(true_change <= noise)
            self._adapt(rule, true_change, change, share, rejected)
            trial.take_back(rejected)
            return rejected

        due = is_multiple(tf.convert_to_tensor(self.iterations), rule.period)
        rejected = tf.cond(due, adapt, lambda: tf.constant(False))
        self._remember(tensors, rejected)

    def _remember(
        self, tensors: Sequence[tf.Tensor], rejected: tf.Tensor
    ) -> None:
        """Keeps the direction for the next step, unless it was rejected."""
        # Without momentum and warm start there are no such variables.
        for variable, tensor in zip(self._previous, tensors, strict=False):
            variable.assign(tf.where(rejected, variable.value, tensor))

    def _adapt(
        self,
        rule: LevenbergMarquardt,
        true_change: tf.Tensor,
        change: tf.Tensor,
        share: tf.Tensor,
        rejected: tf.Tensor,
    ) -> None:
        """Adapts the damping to how well the model foretold the change."""
        state = self.state
        ratio = tf.math.divide_no_nan(true_change, change)
        wide = state.damping.dtype
        adapted = rule.adapt(
            state.damping.value,
            tf.cast(ratio, wide),
            tf.cast(share, wide),
            self._scale.value,
        )
        raised = _REJECTION * state.damping.value
        state.damping.assign(tf.where(rejected, raised, adapted))
        state.note(reduction_ratio=ratio, model_change=change)
        state.increment(retracted=tf.cast(rejected, tf.int32))

    def _damping_like(self, tensor: tf.Tensor) -> tf.Tensor:
        return tf.cast(self.state.damping.value, tensor.dtype)


def _preconditioner(solver: Solver | None) -> str:
    if isinstance(solver, ConjugateGradient):
        return solver.preconditioner
    return "none"
