"""One training step, made of parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import tensorflow as tf

from keras_natgrad import replicas
from keras_natgrad.optimizers.observation import Verdict
from keras_natgrad.optimizers.refreshing import NoRefreshing, Refreshing
from keras_natgrad.step import (
    Damping,
    DampingState,
    Decision,
    Direction,
    LocalDirection,
    LossModel,
    QuadraticModel,
    Situation,
    StateFactory,
    StepRejection,
    StepRule,
    StepState,
    is_multiple,
)
from keras_natgrad.step.guard import loss_before
from keras_natgrad.step.update import move, restore


@dataclass(frozen=True)
class Parts:
    """What an engine is assembled of.

    Attributes:
        direction: Where the preconditioned gradient comes from.
        rule: How far to go along it.
        damping: λ, step by step.
        refreshing: When cached inverses are renewed.
        model: How the quadratic model knows the curvature.
        norm_constraint: Largest `δᵀFδ` of an update, or `None`.
        rejection: Takes back steps that raise the loss of their own batch,
            or `None`. Needs a damping that adapts.
        seed: Seed of what is drawn.
    """

    direction: Direction
    rule: StepRule
    damping: Damping
    refreshing: Refreshing = field(default_factory=NoRefreshing)
    model: QuadraticModel = field(
        default_factory=lambda: QuadraticModel("exact", period=1, decay=0.0)
    )
    norm_constraint: float | None = None
    rejection: StepRejection | None = None
    seed: int = 0


class Engine:
    """Makes training steps from the parts it is given.

    A step is judged by the next batch, observed, and made:

        judge    has the last step made the loss surge?
        observe  the batch's statistics enter the curvature
        step     damping → refresh → direction → rule → move → verify
        skip     or: take the last step back

    Args:
        parts: `Parts`.

    Attributes:
        state: `StepState`, once built.
    """

    state: StepState
    model: LossModel | None
    variables: list[Any]
    updates: list[Any]

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self.direction, self.rule = parts.direction, parts.rule
        self.damping, self.refreshing = parts.damping, parts.refreshing
        self.is_built = False

    # -- State -----------------------------------------------------------

    def build(
        self,
        plan: Any,
        variables: Sequence[Any],
        factory: StateFactory,
        iterations: Any,
    ) -> None:
        """Creates the state from the plan and the variables alone.

        Args:
            plan: `capture.Plan`, or `None` if there is no model.
            variables: `keras.Variable`s.
            factory: `StateFactory`.
            iterations: The variable that counts the steps.
        """
        self.variables, self.iterations = list(variables), iterations
        self.state = StepState(factory)
        self.direction.build(plan, variables, factory, self.state)
        shapes = [tuple(variable.shape) for variable in variables]
        self.updates = []
        if self.rule.needs.update:
            self.updates = [
                factory.add(f"{i}_velocity", shape, "zeros")
                for i, shape in enumerate(shapes)
            ]
        self.memory = self.rule.build(shapes, factory)
        self.model = None
        if self.needs_model:
            self.model = LossModel(
                self.parts.model,
                self.refreshing.periods,
                self.parts.norm_constraint,
                self.direction.parts if self.rule.needs.parts else 1,
                factory,
            )
        # Steps that are judged on their own batch need no other judge, and
        # without the last step there is nothing to take back.
        rejects = self.parts.rejection is not None
        self.guard = self.damping.guard
        if rejects or not self.updates:
            self.guard = None
        if self.guard is not None:
            self.losses = self.guard.build(factory.add)
        self.refreshing.build(self)
        self.is_built = True

    @property
    def needs_objective(self) -> bool:
        """Whether a step may evaluate the loss of its batch again."""
        return self.rule.needs.objective or self.damping.adapts

    @property
    def needs_model(self) -> bool:
        """Whether anything asks for the quadratic model."""
        bounded = self.parts.norm_constraint is not None
        return self.rule.needs.model or self.needs_objective or bounded

    def check_replicas(self, name: str) -> None:
        """Raises ValueError for what several replicas cannot do.

        Args:
            name: Name of the optimizer's class.
        """
        if self.rule.needs.objective:
            replicas.refuse_replicas(
                name,
                "a LineSearch",
                "every trial needs the loss of the whole batch",
                "Use learning_rate='auto'.",
            )
        if self.refreshing.is_outside:
            replicas.refuse_replicas(
                name,
                f"refresh_where={self.refreshing.periods.where!r}",
                "the inverses are those of one device",
                "Use refresh_where='graph'.",
            )
        self.direction.check_replicas(name)

    # -- The batch before the step ---------------------------------------

    def judge(self, observation: Any) -> Verdict:
        """Returns whether the last step has to be taken back."""
        if self.guard is None:
            return Verdict(observation, tf.constant(False))
        guard, loss = self.guard, observation.loss
        surge = guard.is_surge(self.losses, loss) & observation.is_usable
        objective = observation.objective
        if objective is not None:

            def before() -> tf.Tensor:
                found = loss_before(objective, self.variables, self.updates)
                return tf.cast(found, loss.dtype)

            found = tf.cond(surge, before, lambda: tf.zeros_like(loss))
            found = replicas.sum_over_replicas(found)
            surge &= guard.is_blamed(self.losses, loss, found)
        # One batch that is not finite has bad data; a second one in a row
        # says that the weights are bad.
        again = ~observation.is_finite & self.state.skipped_last()
        return Verdict(observation, (surge | again) & self.state.has_moved())

    def observe(self, verdict: Verdict) -> Verdict:
        """Lets the batch's statistics enter the curvature.

        Returns:
            The verdict, with what the direction has seen.
        """
        batches = self.state.count("batches")
        seed = replicas.replica_seed(
            tf.stack([tf.constant(self.parts.seed, tf.int32), batches])
        )
        self.refreshing.before_statistics(verdict.accepted)
        seen = self.direction.observe(
            verdict.observation, verdict.accepted, seed
        )
        self.state.increment(batches=1)
        return replace(verdict, seen=seen)

    # -- The step --------------------------------------------------------

    def step(
        self,
        verdict: Verdict,
        gradients: Sequence[tf.Tensor],
        learning_rate: Any,
    ) -> None:
        """Moves the variables by `δ = −α Δ + μ δ₋₁`.

        Args:
            verdict: What the tape saw; the batch is accepted.
            gradients: One gradient per variable, zeros where the loss does
                not depend on it.
            learning_rate: The current learning rate.
        """
        observation = verdict.observation
        here = self.direction.at(observation, verdict.seen, gradients)
        stale = self.state.inverses_stale()
        # Otherwise there was a step before this one, and it has held.
        self.state.end_surges(~stale)
        self.set_damping(here.first_scale, stale)
        self.refreshing.before_solving(stale)
        # In the bases of the inverses that it is about to meet.
        here.observe_gradient()
        situation = self._situation(here, observation, learning_rate)
        damping = tf.convert_to_tensor(self.state.damping.value)
        pulled = self.rule.pull(self.memory, here.gradient, situation)
        solved = here.solve(pulled, damping)
        solved = self.rule.direct(self.memory, solved, situation)
        decision = self._decide(here, pulled, solved, situation)
        coefficients = decision.coefficients
        # Nothing moves if the model is not finite.
        finite = tf.reduce_all(tf.math.is_finite(coefficients))
        coefficients = tf.where(finite, coefficients, 0.0)
        tensors = here.to_tensors(solved)
        before: list[tf.Tensor] = []
        if self._may_reject(observation):
            before = [tf.identity(v.value) for v in self.variables]
        move(
            self.variables,
            self.updates,
            tensors,
            coefficients,
            self.direction.part_of_variable,
        )
        if self.guard is not None:
            self.guard.accept(self.losses, observation.loss)
            self.state.note_move(coefficients)
        kept = self.rule.spring + self.direction.spring
        self.state.note(
            learning_rate=tf.where(finite, decision.learning_rate, 0.0),
            momentum=coefficients[-1] + kept,
        )
        rejected = self._verify(here, observation, decision, before)
        here.remember(tensors, rejected)
        self.refreshing.after_step(stale)

    def set_damping(
        self,
        typical: Callable[[], tf.Tensor],
        stale: tf.Tensor | None = None,
    ) -> None:
        """Sets λ of this step.

        Args:
            typical: Returns a typical eigenvalue, for a damping that starts.
            stale: Scalar bool: λ was raised since the last step.
        """
        if stale is None or not self.direction.has_inverses:
            stale = tf.constant(False)
        state = DampingState(
            value=self.state.damping.value,
            factor=self.state.damping_scale.value,
            iterations=self.iterations,
            raised=stale,
            typical=typical,
        )
        self.state.damping.assign(self.damping.value(state))

    def _situation(
        self, here: LocalDirection, observation: Any, learning_rate: Any
    ) -> Situation:
        """Returns what the rule may look at."""
        dtype = here.gradient[0].dtype
        return Situation(
            here=here,
            learning_rate=tf.cast(learning_rate, dtype),
            last=here.to_vector(self.updates) if self.updates else None,
            loss=observation.loss,
            objective=observation.objective,
            variables=self.variables,
            state=self.state,
        )

    def _decide(
        self,
        here: LocalDirection,
        pulled: Any,
        solved: Any,
        situation: Situation,
    ) -> Decision:
        """Returns the rates and the momentum of this step."""
        form = None
        if self.model is not None:
            vectors = [solved]
            if self.rule.needs.along_update:
                vectors.append(situation.last)
            form = self.model.form(
                here,
                vectors,
                pulled,
                tf.convert_to_tensor(self.state.damping.value),
                tf.convert_to_tensor(self.iterations),
            )
        return self.rule.decide(self.memory, solved, form, situation)

    def _may_reject(self, observation: Any) -> bool:
        """Whether a step can be taken back as soon as it is made."""
        adapts = self.damping.adapts and observation.objective is not None
        return adapts and self.parts.rejection is not None

    def _verify(
        self,
        here: LocalDirection,
        observation: Any,
        decision: Decision,
        before: Sequence[tf.Tensor],
    ) -> tf.Tensor:
        """Compares the model with the loss, if the damping adapts.

        Args:
            here: The curvature at the batch.
            observation: The batch.
            decision: What the quadratic model promised.
            before: The weights before the step, if it may be rejected.

        Returns:
            Scalar bool: the step was taken back.
        """
        objective, change = observation.objective, decision.change
        if change is not None:
            self.state.note(model_change=change)
        if not self.damping.adapts or objective is None or change is None:
            return tf.constant(False)

        def adapt() -> tf.Tensor:
            rejected = tf.constant(False)
            loss = tf.cast(observation.loss, change.dtype)
            now = replicas.sum_over_replicas(tf.cast(objective(), loss.dtype))
            ratio = tf.math.divide_no_nan(now - loss, change)
            self.state.note(reduction_ratio=ratio)
            damping = self.state.damping.value
            wide = damping.dtype
            adapted = self.damping.adapt(
                damping,
                tf.cast(ratio, wide),
                tf.cast(decision.fisher_share, wide),
                replicas.across_replicas(here.scale),
            )
            rejection = self.parts.rejection
            if rejection is not None:
                rejected = rejection.is_rejected(now - loss, loss)
                restore(self.variables, before, rejected)
                for update in self.updates:
                    kept = tf.cast(~rejected, update.dtype)
                    update.assign(kept * update.value)
                self.state.increment(retracted=rejected)
                raised = rejection.growth * damping
                adapted = tf.where(rejected, raised, adapted)
            self.state.damping.assign(adapted)
            return rejected

        step = tf.convert_to_tensor(self.iterations)
        due = is_multiple(step, self.damping.period)
        if self.parts.rejection is None:
            replicas.cond(due, adapt)
            return tf.constant(False)
        return tf.cond(due, adapt, lambda: tf.constant(False))

    # -- No step ---------------------------------------------------------

    def skip(self, verdict: Verdict) -> None:
        """Counts a bad batch; takes the last step back if it is to blame."""
        self.state.note_skip(verdict.surged, ~verdict.observation.is_finite)
        guard = self.guard
        if guard is None:
            return

        def retract() -> tf.Tensor:
            for variable, update in zip(
                self.variables, self.updates, strict=True
            ):
                step = tf.convert_to_tensor(update)
                variable.value.assign_sub(tf.cast(step, variable.dtype))
                update.assign(tf.zeros_like(step))
            self.state.note_return()
            surges = self.state.add_surge()
            damping = self.state.damping.value
            self.state.damping.assign(guard.raised(damping, surges))
            self.state.mark_inverses(stale=True)
            return tf.constant(0)

        tf.cond(verdict.surged, retract, lambda: tf.constant(0))

    # -- Between steps ---------------------------------------------------

    def inverse_damping(self) -> tf.Tensor:
        """Returns the damping of the inverses, a scalar."""
        damping = tf.convert_to_tensor(self.state.damping.value)
        ratio = self.damping.inverse_ratio
        return damping if ratio == 1 else damping * ratio

    def raise_damping(self, factor: float) -> None:
        """Multiplies the damping from the next step on."""
        for variable in (self.state.damping, self.state.damping_scale):
            variable.assign(factor * variable.value)
        self.state.mark_inverses(stale=True)
