"""The exact natural gradient of a whole network."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_natgrad import _compat
from keras_natgrad.checks import (
    check_integer,
    check_positive,
    check_seed,
)
from keras_natgrad.curvature import WholeNetwork, WholeNetworkOptions
from keras_natgrad.curvature.root_columns import COLUMN_KINDS
from keras_natgrad.optimizers.base import CurvatureOptimizer
from keras_natgrad.optimizers.engine import Parts
from keras_natgrad.optimizers.observation import Verdict
from keras_natgrad.optimizers.residuals import observe_residuals
from keras_natgrad.optimizers.settings import Settings
from keras_natgrad.solvers import ConjugateGradient, Solver
from keras_natgrad.solvers import get as get_solver
from keras_natgrad.step import (
    Damping,
    FixedStep,
    LevenbergMarquardt,
    LineSearch,
    SearchedStep,
    Spring,
    StepRejection,
    StepRule,
    get_damping,
    get_learning_rate,
    get_momentum,
)

# Exact solutions ask for a quadratic model that follows every step.
_EXACT_DAMPING = LevenbergMarquardt(
    relative=1.0, decay=0.5, period=1, minimum=1e-12, inverse_ratio=1.0
)


@dataclasses.dataclass(frozen=True)
class NaturalGradientSettings(Settings):
    """The arguments of `NaturalGradient`, checked; see there."""

    damping: Damping = _EXACT_DAMPING
    solver: Solver | str = "auto"
    momentum: float | Spring = 0.0
    fisher: str = "exact"
    norm_constraint: float | None = None
    max_elements: int = 2**28
    seed: int = 0

    def __post_init__(self) -> None:
        if self.fisher not in COLUMN_KINDS:
            raise ValueError(
                f"`fisher` must be one of {COLUMN_KINDS}. "
                f"Received: fisher={self.fisher!r}"
            )
        if self.norm_constraint is not None:
            check_positive("norm_constraint", self.norm_constraint)
        check_integer("max_elements", self.max_elements, 1)
        check_seed(self.seed)

    def parts(self) -> Parts:
        """Returns the parts of the engine."""
        spring = momentum = 0.0
        if isinstance(self.momentum, Spring):
            spring = self.momentum.momentum
        else:
            momentum = self.momentum
        rule: StepRule = FixedStep(momentum)
        if isinstance(self.rate, StepRule):
            rule = self.rate
        if isinstance(self.rate, LineSearch):
            rule = SearchedStep(self.rate, rule)
        options = WholeNetworkOptions(
            self.solver if isinstance(self.solver, Solver) else None,
            self.fisher,
            spring,
            self.max_elements,
            self.damping.is_zero,
            self.seed,
        )
        return Parts(
            direction=WholeNetwork(options),
            rule=rule,
            damping=self.damping,
            norm_constraint=self.norm_constraint,
            rejection=StepRejection(),
            seed=self.seed,
        )


@keras.saving.register_keras_serializable(package="keras_natgrad")
class NaturalGradient(CurvatureOptimizer):
    r"""The natural gradient with the exact Fisher of the whole network.

    Each step solves

        (F + λI) φ = ∇,    θ ← θ + δ,    δ = −α φ + μ δ₋₁,

    with the Fisher `F = (1/N) Σ w_i J_iᵀ F_η,i J_i` of the batch, all layers
    coupled. For batches and networks of up to some thousands of columns
    (examples × outputs) or parameters, where accuracy counts: physics-informed
    networks, nonlinear least squares, small probabilistic models.
    `minimize_residuals` trains on residuals without a Keras loss.

    With `momentum=keras_natgrad.Spring(μ)` the system is that of SPRING,
    `(F + λI) φ = ∇ + λ μ φ₋₁`: the last direction is kept where the batch says
    nothing about it.

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
        momentum: μ, a float in [0, 1), or a `keras_natgrad.Spring`. Defaults
            to `0.0`.
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
        momentum: float | Spring = 0.0,
        fisher: str = "exact",
        norm_constraint: float | None = None,
        max_elements: int = 2**28,
        log_statistics: bool = False,
        seed: int = 0,
        name: str = "natural_gradient",
        **kwargs: Any,
    ) -> None:
        learning_rate, rate = get_learning_rate(learning_rate, False)
        if isinstance(damping, str) and damping == "auto":
            damping = _EXACT_DAMPING
        settings = NaturalGradientSettings(
            log_statistics=bool(log_statistics),
            rate=rate,
            damping=get_damping(damping),
            solver=get_solver(solver) or "auto",
            momentum=_momentum(momentum),
            fisher=fisher,
            norm_constraint=norm_constraint,
            max_elements=max_elements,
            seed=seed,
        )
        super().__init__(
            learning_rate, settings, settings.parts(), name=name, **kwargs
        )

    @property
    def chosen_solver(self) -> Solver | None:
        """The solver in use, `None` before the first step chooses one."""
        direction = self.engine.direction
        assert isinstance(direction, WholeNetwork)
        return direction.solver

    # -- State -----------------------------------------------------------

    def build(self, variables: Sequence[Any]) -> None:
        """Creates the state; residuals need no model.

        Args:
            variables: The trainable variables, `keras.Variable`s.
        """
        super().build(variables)
        if not self.engine.is_built:
            self._build_engine(list(variables))

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
        self.check_replicas()
        if not self.built:
            self.build(variables)
        own = _compat.optimizer_variables(self)
        needs_jacobian = not isinstance(self.chosen_solver, ConjugateGradient)
        observation, gradients = observe_residuals(
            residuals, own, points, weights, needs_jacobian
        )
        self._receive(Verdict(observation, tf.constant(False)))
        self.apply(gradients, own)
        return observation.loss


def _momentum(value: Any) -> float | Spring:
    """Returns a momentum; there is no quadratic model to choose one."""
    found = get_momentum(value, automatic=False)
    assert not isinstance(found, str)
    return found
