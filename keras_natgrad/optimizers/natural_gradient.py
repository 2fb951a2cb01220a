"""The exact natural gradient of a whole network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf
from typing_extensions import override

from keras_natgrad import _compat
from keras_natgrad.capture import Plan
from keras_natgrad.curvature import BlockDiagonal, BlockOptions, CapturedPass
from keras_natgrad.curvature.factor_columns import COLUMN_KINDS, Columns
from keras_natgrad.curvature.network_factor import NetworkFactor
from keras_natgrad.optimizers.base import CurvatureOptimizer, Observation
from keras_natgrad.optimizers.residuals import (
    ResidualObservation,
    observe_residuals,
)
from keras_natgrad.optimizers.state import StepState
from keras_natgrad.optimizers.summary import render_solver
from keras_natgrad.solvers import (
    ConjugateGradient,
    Direction,
    FisherFactor,
    Solution,
    Solver,
    System,
    check_memory,
    choose,
)
from keras_natgrad.solvers import get as get_solver
from keras_natgrad.solvers.factor import inner, scale
from keras_natgrad.step import (
    LevenbergMarquardt,
    LineSearch,
    get_damping,
    is_multiple,
    norm_scale,
)
from keras_natgrad.step.damping import check_positive

# Gradients that differ from `A u` by less than this many rounding units of
# its terms are taken for equal to it.
_ROUNDING = 64.0
# Damping after a step that was taken back, over that before.
_REJECTION = 4.0


@keras.saving.register_keras_serializable(package="keras_natgrad")
class NaturalGradient(CurvatureOptimizer):
    r"""The natural gradient with the exact Fisher of the whole network.

    Each step solves

        (F + λI) φ = ∇ + λ μ φ₋₁,    θ ← θ − α φ,

    with the Fisher `F = (1/N) Σ w_i J_iᵀ F_η,i J_i` of the batch, all layers
    coupled. For batches and networks of up to some thousands of columns
    (examples × outputs) or parameters, where accuracy counts: physics-informed
    networks, nonlinear least squares, small probabilistic models.
    `minimize_residuals` trains on residuals without a Keras loss.

    With a momentum μ this is SPRING: the previous direction is kept where the
    batch says nothing about it.

    Args:
        learning_rate: α: a float, a
            `keras.optimizers.schedules.LearningRateSchedule`, a callable, or
            a `keras_natgrad.LineSearch` that tries powers of two on the
            batch. Defaults to `1.0`.
        damping: λ: `"auto"`, a non-negative float, a schedule of the
            iteration, or a `keras_natgrad.LevenbergMarquardt`. In units of
            the loss per squared unit of a weight. `"auto"` starts at the mean
            eigenvalue of the Fisher and follows the reduction ratio at every
            step; a step that raises the loss of its batch is taken back. `0`
            is the Moore–Penrose natural gradient. Defaults to `"auto"`.
        solver: `"kernel"`, `"dense"`, `"cg"`, a solver of
            `keras_natgrad.solvers`, or `"auto"`: the dense one where there
            are fewer parameters than columns, else the kernel, conjugate
            gradients where neither fits into `max_elements`. Defaults to
            `"auto"`.
        momentum: μ of SPRING, in [0, 1). Defaults to `0.0`.
        fisher: `"exact"`, `"sampled"` (one target per position drawn from
            the model) or `"empirical"` (the observed targets; the mean of
            the outer products of the per-position gradients). Defaults to
            `"exact"`.
        norm_constraint: Largest `δᵀFδ` of an update, or `None`.
        max_elements: Most elements of memory that a solver may use. Defaults
            to `2**28` (1 GiB in float32).
        log_statistics: Whether `fit` logs `statistics` beside the metrics.
        seed: Seed of the draws of `fisher="sampled"`.
        name: Name of the optimizer.
        **kwargs: Further arguments of `keras.optimizers.Optimizer`. Clipping
            and gradient accumulation change the gradient, not the Fisher,
            which is that of the last batch.

    Raises:
        ValueError: If an argument is out of range.

    Example:

    ```python
    optimizer = keras_natgrad.NaturalGradient().attach(model)
    model.compile(optimizer, loss="mse")
    model.fit(x, y, batch_size=len(x), epochs=50)
    ```

    References:
        - Amari, 1998, "Natural gradient works efficiently in learning".
        - Ren & Goldfarb, 2019, arXiv:1906.02353.
        - Goldshlager, Abrahamsen & Lin, 2024, arXiv:2401.10190 (SPRING).
    """

    def __init__(
        self,
        learning_rate: Any = 1.0,
        damping: Any = "auto",
        solver: Any = "auto",
        momentum: float = 0.0,
        fisher: str = "exact",
        norm_constraint: float | None = None,
        max_elements: int = 2**28,
        log_statistics: bool = False,
        seed: int = 0,
        name: str = "natural_gradient",
        **kwargs: Any,
    ) -> None:
        search = _line_search(learning_rate)
        super().__init__(1.0 if search else learning_rate, name=name, **kwargs)
        self._hide("line_search", search)
        if damping == "auto":
            # Exact solutions ask for a model that follows every step.
            damping = LevenbergMarquardt(
                relative=1.0,
                decay=0.5,
                period=1,
                minimum=1e-12,
                inverse_ratio=1.0,
            )
        self._hide("damping", get_damping(damping))
        self._hide("solver", get_solver(solver))
        self._hide("chosen_solver", self.solver)
        if isinstance(momentum, bool) or not 0 <= momentum < 1:
            raise ValueError(
                f"`momentum` must be in [0, 1). Received: momentum={momentum!r}"
            )
        self.momentum = float(momentum)
        if fisher not in COLUMN_KINDS:
            raise ValueError(
                f"`fisher` must be one of {COLUMN_KINDS}. "
                f"Received: fisher={fisher!r}"
            )
        self.fisher = fisher
        if norm_constraint is not None:
            check_positive("norm_constraint", norm_constraint)
        self.norm_constraint = norm_constraint
        check_positive("max_elements", max_elements)
        self.max_elements = max_elements
        self.log_statistics = log_statistics
        self.seed = seed

    # -- State -----------------------------------------------------------

    @override
    def build_curvature(self, plan: Plan, variables: list[Any]) -> None:
        shapes = [tuple(variable.shape) for variable in variables]
        layers = BlockDiagonal(
            plan, shapes, BlockOptions(block="identity", fallback="first_order")
        )
        dtype = self.curvature_dtype

        def add_shape(name: str, shape: tuple[int, ...], init: str) -> Any:
            # The blocks only say how variables form matrices; nothing of them
            # is state.
            return keras.Variable(init, shape, dtype, False, name=name)

        layers.build([str(i) for i in range(len(variables))], add_shape)
        self._hide("_layers", layers)
        self._build_state(variables)

    def _build_state(self, variables: list[Any]) -> None:
        add = self.add_curvature_variable
        self._hide("state", StepState(add, self.add_variable))
        # The mean eigenvalue of the Fisher on the first batch.
        self._hide("_scale", add("scale", (), "zeros"))
        self._hide("_previous", [])
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
        self._hide("_state_built", True)

    @property
    def statistics(self) -> dict[str, float]:
        """What happened so far, as Python numbers.

        Damping, reduction ratio, predicted loss change and learning rate of
        the last step; counts of batches, raised dampings, failed solutions,
        batches skipped and steps taken back (retracted).
        """
        return self.state.to_dict() if self._has_state else {}

    def summary(self, print_fn: Any = None) -> None:
        """Prints the solver and the layers that it covers.

        Args:
            print_fn: Function that prints one string. Defaults to `print`.
        """
        if not self._curvature_built:
            self.build(self.attached_model().trainable_variables)
        variables = _compat.optimizer_variables(self)
        text = render_solver(self._layers, variables, self.chosen_solver)
        (print_fn or print)(text)

    # -- Residuals -------------------------------------------------------

    def minimize_residuals(
        self,
        residuals: Any,
        variables: Sequence[Any] | None = None,
        points: Any = None,
        weights: Sequence[float] | None = None,
    ) -> tf.Tensor:
        r"""Makes one step on the loss `Σ_k ½ w_k mean(r_k²)`.

        For physics-informed networks, inverse problems and nonlinear least
        squares. Traceable; wrap it in `tf.function(jit_compile=True)`, which
        is several times faster.

        Args:
            residuals: Function without arguments that returns a tensor of
                residuals, or a tuple of them. With `points`, a function of
                points that returns `[N]` or `[N, k]` residuals, or a tuple of
                such functions, one per element of `points`; row i must depend
                on point i alone. The Jacobian is then one vectorised
                backward pass, and hundreds of times faster.
            variables: The variables to train, `keras.Variable`s. Defaults to
                the attached model's.
            points: Tensor `[N, d]`, or a tuple of them.
            weights: One w per tensor of residuals. Defaults to ones.

        Returns:
            The loss before the step, a scalar.

        Raises:
            ValueError: If the residuals are not floating-point tensors, do
                not depend on the variables, or do not fit points or weights.

        Example:

        ```python
        optimizer = keras_natgrad.NaturalGradient(keras_natgrad.LineSearch())

        @tf.function(jit_compile=True)
        def step():
            return optimizer.minimize_residuals(
                (interior, boundary), model.trainable_variables, (x, x_edge)
            )
        ```
        """
        if variables is None:
            variables = self.attached_model().trainable_variables
        variables = list(variables)
        if not self.built:
            self.build(variables)
        if not self._has_state:
            self._build_state(_compat.optimizer_variables(self))
        own = _compat.optimizer_variables(self)
        needs_jacobian = not isinstance(self.solver, ConjugateGradient)
        observation, gradients = observe_residuals(
            residuals, own, points, weights, needs_jacobian
        )
        self.state.increment(batches=1)
        self._hide("_observation", observation)
        self.apply(gradients, own)
        return observation.loss

    @property
    def _has_state(self) -> bool:
        return bool(getattr(self, "_state_built", False))

    # -- One step --------------------------------------------------------

    @override
    @property
    def needs_objective(self) -> bool:
        return self.line_search is not None or isinstance(
            self.damping, LevenbergMarquardt
        )

    @override
    def step_logs(self) -> dict[str, tf.Tensor]:
        if not self.log_statistics:
            return {}
        tensors = self.state.to_tensors()
        return {f"{self.name}_{key}": value for key, value in tensors.items()}

    @override
    def observe(self, observation: Observation) -> None:
        self.state.increment(batches=1)

    @override
    def has_surged(self, observation: Observation) -> tf.Tensor:
        return tf.constant(False)

    @override
    def skip_step(self, observation: Observation) -> None:
        self.state.note_skip(tf.constant(False))

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
        damping = tf.cast(self.state.damping.value, residual.dtype)
        gradient = factor.from_tensors(gradients)
        system = System(
            residual,
            damping,
            _remainder(factor, gradient),
            self._shift(factor),
        )
        solution = self._solve(solver, factor, system)
        self.state.increment(
            retries=solution.retries,
            failures=tf.cast(~solution.succeeded, tf.int32),
        )
        self._move(observation, factor, solution, gradient, learning_rate)

    def _factor(self, observation: Any) -> FisherFactor:
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
        return NetworkFactor(
            captured, columns, observation.tape.loss, self.max_elements
        )

    def _set_damping(self, factor: FisherFactor) -> None:
        """Starts the damping, or looks it up in its schedule."""
        rule = self.damping
        if isinstance(rule, float):
            self.state.damping.assign(rule)
        elif isinstance(rule, LevenbergMarquardt):
            # Zero only before the first step.
            started = self.state.damping.value > 0

            def start() -> tf.Tensor:
                mean = tf.cast(
                    factor.trace_estimate() / factor.size,
                    self.state.damping.dtype,
                )
                self._scale.assign(mean)
                return rule.start(mean)

            self.state.damping.assign(
                tf.cond(started, lambda: self.state.damping.value, start)
            )
        else:
            self.state.damping.assign(rule(self.iterations))

    def _shift(self, factor: FisherFactor) -> list[tf.Tensor] | None:
        if not self.momentum:
            return None
        previous = factor.from_tensors([v.value for v in self._previous])
        return scale(self.momentum, previous)

    def _solve(
        self, solver: Solver, factor: FisherFactor, system: System
    ) -> Solution:
        if not isinstance(solver, ConjugateGradient):
            exact = isinstance(self.damping, float) and self.damping == 0.0
            return solver.solve(factor, system, exact=exact)
        start = None
        if self._previous and not self.momentum:
            start = factor.from_tensors([v.value for v in self._previous])
        return solver.solve(factor, system, start=start)

    def _move(
        self,
        observation: Any,
        factor: FisherFactor,
        solution: Solution,
        gradient: Direction,
        learning_rate: Any,
    ) -> None:
        """Makes the step `−α φ`, as long as it lowers the loss."""
        direction = solution.direction
        dtype = direction[0].dtype
        rate = tf.cast(learning_rate, dtype)
        variables = _compat.optimizer_variables(self)
        tensors = factor.to_tensors(direction)
        before = [tf.identity(variable.value) for variable in variables]
        objective = observation.tape.objective
        loss = tf.cast(observation.tape.loss, dtype)

        def evaluate(trial: tf.Tensor) -> tf.Tensor:
            _place(variables, before, tensors, trial)
            return tf.cast(objective(), dtype)

        needs_norm = self.norm_constraint is not None
        adapts = isinstance(self.damping, LevenbergMarquardt) and objective
        if needs_norm or adapts:
            image = factor.transpose_product(direction)
            fisher_norm = tf.reduce_sum(tf.square(image))
        if self.line_search is not None and objective is not None:
            found, _ = self.line_search.search(evaluate, loss)
            rate *= found
        if self.norm_constraint is not None:
            rate *= norm_scale(rate**2 * fisher_norm, self.norm_constraint)
        _place(variables, before, tensors, rate)
        for variable, tensor in zip(self._previous, tensors, strict=False):
            variable.assign(tensor)
        self.state.note(
            learning_rate=rate, momentum=tf.constant(self.momentum, dtype)
        )
        if adapts:
            damping = tf.cast(self.state.damping.value, dtype)
            ridge = damping * inner(direction, direction)
            bend = fisher_norm + ridge
            change = -rate * inner(gradient, direction) + 0.5 * rate**2 * bend
            share = tf.math.divide_no_nan(fisher_norm, bend)

            def adapt() -> tf.Tensor:
                self._adapt(evaluate, rate, loss, change, share, before)
                return tf.constant(0)

            step = tf.convert_to_tensor(self.iterations)
            due = is_multiple(step, self.damping.period)
            tf.cond(due, adapt, lambda: tf.constant(0))

    def _adapt(
        self,
        evaluate: Callable[[tf.Tensor], tf.Tensor],
        rate: tf.Tensor,
        loss: tf.Tensor,
        change: tf.Tensor,
        share: tf.Tensor,
        before: Sequence[tf.Tensor],
    ) -> None:
        """Adapts the damping; takes a step back that raised the loss."""
        true_change = evaluate(rate) - loss
        ratio = tf.math.divide_no_nan(true_change, change)
        # Near the minimum the change is rounding, and says nothing.
        rejected = ~(true_change <= _noise(loss))
        state = self.state
        wide = state.damping.dtype
        adapted = self.damping.adapt(
            state.damping.value,
            tf.cast(ratio, wide),
            tf.cast(share, wide),
            self._scale.value,
        )
        raised = _REJECTION * state.damping.value
        state.damping.assign(tf.where(rejected, raised, adapted))
        state.note(reduction_ratio=ratio, model_change=change)
        state.increment(retracted=tf.cast(rejected, tf.int32))
        for variable, value in zip(
            _compat.optimizer_variables(self), before, strict=True
        ):
            variable.assign(tf.where(rejected, value, variable.value))

    # -- Saving ----------------------------------------------------------

    @override
    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        serialize = keras.saving.serialize_keras_object
        if self.line_search is not None:
            config["learning_rate"] = serialize(self.line_search)
        damping = self.damping
        if not isinstance(damping, float):
            damping = serialize(damping)
        config.update(
            damping=damping,
            solver="auto" if self.solver is None else serialize(self.solver),
            momentum=self.momentum,
            fisher=self.fisher,
            norm_constraint=self.norm_constraint,
            max_elements=self.max_elements,
            log_statistics=self.log_statistics,
            seed=self.seed,
        )
        return config


def _line_search(learning_rate: Any) -> LineSearch | None:
    if isinstance(learning_rate, dict):
        learning_rate = keras.saving.deserialize_keras_object(learning_rate)
    return learning_rate if isinstance(learning_rate, LineSearch) else None


def _place(
    variables: Sequence[Any],
    before: Sequence[tf.Tensor],
    direction: Sequence[tf.Tensor],
    rate: tf.Tensor,
) -> None:
    """Sets the variables to `θ − α φ`."""
    for variable, value, part in zip(variables, before, direction, strict=True):
        variable.assign(value - tf.cast(rate * part, value.dtype))


def _noise(loss: tf.Tensor) -> tf.Tensor:
    """Returns what rounding may change about a loss."""
    return _ROUNDING * _unit(loss.dtype) * tf.abs(loss)


def _unit(dtype: tf.DType) -> tf.Tensor:
    return tf.constant(1.2e-7 if dtype == tf.float32 else 2.3e-16, dtype)


def _remainder(factor: FisherFactor, gradient: Direction) -> list[tf.Tensor]:
    """Returns `∇ − A u`, zero where it is within rounding.

    The terms of `A u` may cancel near a minimum; their size without the
    cancellation is that of `A (ε ∘ u)` with random signs ε.
    """
    residual = factor.residual()
    bits = tf.random.stateless_uniform(
        tf.shape(residual), (0, 1), 0, 2, tf.int32, alg="philox"
    )
    signs = tf.cast(2 * bits - 1, residual.dtype)
    known, size = factor.product(residual), factor.product(signs * residual)
    rest = [g - k for g, k in zip(gradient, known, strict=True)]
    bound = (_ROUNDING * _unit(residual.dtype)) ** 2 * (
        inner(size, size) + inner(known, known)
    )
    small = inner(rest, rest) <= bound
    return [tf.where(small, tf.zeros_like(part), part) for part in rest]
