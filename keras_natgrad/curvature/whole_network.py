"""The exact natural gradient: one system for all layers of a network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import tensorflow as tf
from typing_extensions import override

from keras_natgrad import replicas
from keras_natgrad.curvature.assignment import BlockOptions
from keras_natgrad.curvature.block_curvature import variable_names
from keras_natgrad.curvature.captured_pass import CapturedPass
from keras_natgrad.curvature.estimator import BlockDiagonal
from keras_natgrad.curvature.network_root import NetworkRoot
from keras_natgrad.curvature.root_columns import Columns
from keras_natgrad.solvers import (
    ConjugateGradient,
    FisherRoot,
    Solution,
    Solver,
    System,
    check_memory,
    choose,
)
from keras_natgrad.solvers.remainder import remainder
from keras_natgrad.solvers.root import inner, scale
from keras_natgrad.step.direction import Direction, LocalDirection, Vector
from keras_natgrad.step.directions import pad
from keras_natgrad.step.refresh import Refresh
from keras_natgrad.step.state import StateFactory, StepState


@dataclass(frozen=True)
class WholeNetworkOptions:
    """How the system of a whole network is solved.

    Attributes:
        solver: `Solver`, or `None` to choose one at the first step.
        fisher: One of `COLUMN_KINDS`.
        momentum: μ of SPRING.
        max_elements: Most elements of memory that a solver may use.
        undamped: Whether λ is zero at all times; then the Moore–Penrose
            inverse takes the place of `(F + λI)⁻¹`.
        seed: Seed of the draws of `fisher="sampled"`.
        decay: Decay of the running averages of a preconditioner.
        refresh: `Refresh` of a preconditioner.
    """

    solver: Solver | None
    fisher: str = "exact"
    momentum: float = 0.0
    max_elements: int = 2**28
    undamped: bool = False
    seed: int = 0
    decay: float = 0.95
    refresh: Refresh = Refresh(1, 20, growth=0.15)

    @property
    def preconditioner(self) -> str:
        """Name of the blocks that precondition conjugate gradients."""
        if isinstance(self.solver, ConjugateGradient):
            return self.solver.preconditioner
        return "none"


class WholeNetwork(Direction):
    """Solves `(F + λI) φ = ∇` for all layers of a network at once.

    Args:
        options: `WholeNetworkOptions`.

    Attributes:
        layers: How the variables form matrices; the blocks of the
            preconditioner, if there is one.
        solver: The solver in use, `None` before the first step if it is still
            to be chosen.
        previous: φ of the last step that held, one `keras.Variable` per
            variable, if anything needs it.
        started_at: The mean eigenvalue of the Fisher on the first batch.
    """

    has_inverses = False
    layers: BlockDiagonal
    state: StepState
    variables: list[Any]
    previous: list[Any]
    started_at: Any

    def __init__(self, options: WholeNetworkOptions) -> None:
        self.options = options
        self.solver = options.solver
        self.spring = options.momentum

    @override
    def choose_layers(self, plan: Any) -> Any:
        return plan.only_one_way("used as its transpose too")

    @override
    def check_replicas(self, name: str) -> None:
        replicas.refuse_replicas(
            name,
            "an exact solver",
            "it solves with all examples of the batch at once",
            "Use keras_natgrad.KFAC, or one device.",
        )

    @override
    def build(
        self,
        plan: Any,
        variables: Sequence[Any],
        factory: StateFactory,
        state: StepState,
    ) -> None:
        self.variables = list(variables)
        self.state = state
        if plan is not None:
            self._build_layers(plan, factory)
        self.started_at = factory.add("scale", (), "zeros")
        self.previous = []
        if self.spring or isinstance(self.solver, ConjugateGradient):
            self.previous = [
                factory.add(f"{name}_direction", tuple(v.shape), "zeros")
                for name, v in zip(
                    variable_names(variables), variables, strict=True
                )
            ]

    def _build_layers(self, plan: Any, factory: StateFactory) -> None:
        kind = self.options.preconditioner
        shapes = [tuple(variable.shape) for variable in self.variables]
        add: Callable[..., Any] = factory.add
        if kind != "none":
            options = BlockOptions(block=kind)
        else:
            # The blocks only say how variables form matrices; nothing of them
            # is state.
            options = BlockOptions(block="identity", fallback="first_order")
            dtype = self.state.damping.dtype

            def add(name: str, shape: tuple[int, ...], initializer: str) -> Any:
                return keras.Variable(
                    initializer, shape, dtype, False, name=name
                )

        self.layers = BlockDiagonal(plan, shapes, options)
        self.layers.build([str(i) for i in range(len(self.variables))], add)

    @override
    def observe(
        self, observation: Any, accepted: tf.Tensor, seed: tf.Tensor
    ) -> None:
        """Nothing is kept of a batch."""

    @override
    def refresh(self, damping: tf.Tensor) -> None:
        """There are no inverses."""

    @override
    def at(
        self, observation: Any, seen: Any, gradients: Sequence[tf.Tensor]
    ) -> WholeDirection:
        root = getattr(observation, "root", None)
        if root is None:
            root = self._root(observation)
        if self.solver is None:
            self.solver = choose(
                root.size, root.column_count, self.options.max_elements
            )
        check_memory(
            self.solver,
            root.size,
            root.column_count,
            self.options.max_elements,
        )
        return WholeDirection(self, self.solver, root, gradients)

    def _root(self, observation: Any) -> FisherRoot:
        """Returns the root of the batch's Fisher."""
        captured = CapturedPass(
            observation.tape.gradient_tape,
            observation.terms,
            observation.records,
            self.layers.entries,
            [variable.value for variable in self.variables],
        )
        seed = tf.stack(
            [
                tf.constant(self.options.seed, tf.int32),
                self.state.count("batches"),
            ]
        )
        return NetworkRoot(
            captured,
            Columns(observation.terms, self.options.fisher, seed),
            observation.tape.loss,
            self.options.max_elements,
        )

    def preconditioner(
        self, root: FisherRoot, damping: tf.Tensor
    ) -> Callable[..., Any]:
        """Renews the blocks: averages at every step, inverses when due.

        Returns:
            The function that applies their inverse.
        """
        if not isinstance(root, NetworkRoot):
            raise ValueError(
                "A preconditioner needs the layers of a network; residuals "
                "have none. Use ConjugateGradient(preconditioner='none'). "
                f"Received: solver={self.solver!r}"
            )
        step = self.state.count("batches") - 1
        seed = tf.stack([tf.constant(self.options.seed, tf.int32), step])
        self.layers.accumulate(
            self.layers.statistics(root.captured, "propagated", seed),
            self.options.decay,
        )
        periods = self.options.refresh

        def refresh() -> tf.Tensor:
            retries, failures = self.layers.refresh(
                damping, [0.0] * len(self.variables)
            )
            self.state.increment(
                refreshes=1, retries=retries, failures=failures
            )
            self.state.refresh_at.assign(
                periods.next_due(step, periods.inverse_period)
            )
            return tf.constant(0)

        due = periods.is_due(step, self.state.refresh_at.value)
        tf.cond(due, refresh, lambda: tf.constant(0))
        return self._precondition

    def _precondition(self, vector: Vector) -> list[tf.Tensor]:
        """Returns the blocks' inverse times a matrix per layer."""
        layers = self.layers
        return layers.split(layers.precondition(layers.join(vector)))


class WholeDirection(LocalDirection):
    """The exact Fisher of one batch.

    Args:
        network: `WholeNetwork`, built.
        solver: `Solver`.
        root: `FisherRoot` of the batch.
        gradients: One gradient per variable.
    """

    def __init__(
        self,
        network: WholeNetwork,
        solver: Solver,
        root: FisherRoot,
        gradients: Sequence[tf.Tensor],
    ) -> None:
        self.network = network
        self.solver = solver
        self.root = root
        self.residual = root.residual()
        self.gradient = root.from_tensors(gradients)
        self.parts = 1

    @override
    def to_vector(self, tensors: Sequence[Any]) -> Vector:
        return self.root.from_tensors(tensors)

    @override
    def to_tensors(self, vector: Vector) -> list[tf.Tensor]:
        return self.root.to_tensors(vector)

    @override
    def solve(self, gradient: Vector, damping: tf.Tensor) -> Vector:
        system = System(
            self.residual,
            tf.cast(damping, self.residual.dtype),
            remainder(self.root, gradient),
            self._shift(),
        )
        solution = self._solution(system)
        self.network.state.increment(
            retries=solution.retries, failures=solution.failures
        )
        return solution.direction

    def _shift(self) -> Vector | None:
        """Returns `μ φ₋₁` of SPRING."""
        if not self.network.spring:
            return None
        return scale(self.network.spring, self._previous())

    def _previous(self) -> list[tf.Tensor]:
        return self.root.from_tensors([v.value for v in self.network.previous])

    def _solution(self, system: System) -> Solution:
        solver, network = self.solver, self.network
        if not isinstance(solver, ConjugateGradient):
            return solver.solve(
                self.root, system, exact=network.options.undamped
            )
        start = None
        if network.previous and not network.spring:
            start = self._previous()
        inverse = None
        if network.options.preconditioner != "none":
            inverse = network.preconditioner(self.root, system.damping)
        return solver.solve(
            self.root, system, start=start, preconditioner=inverse
        )

    @override
    def gram(self, vectors: Sequence[Vector], by_part: bool) -> tf.Tensor:
        images = tf.stack(
            [self.root.transpose_product(each) for each in vectors]
        )
        return tf.matmul(images, images, transpose_b=True)

    @override
    def dots(self, left: Vector, right: Vector) -> tf.Tensor:
        return inner(left, right)[tf.newaxis]

    @override
    def metric_dots(self, left: Vector, right: Vector) -> tf.Tensor:
        return self.dots(left, right)

    @override
    def in_metric(self, vector: Vector) -> Vector:
        return vector

    @override
    def ridge_gram(
        self, vectors: Sequence[Vector], damping: tf.Tensor, by_part: bool
    ) -> tf.Tensor:
        rows = [
            tf.stack([inner(left, right) for right in vectors])
            for left in vectors
        ]
        return pad(tf.cast(damping, rows[0].dtype) * tf.stack(rows), 2)

    @override
    def first_scale(self) -> tf.Tensor:
        mean = self.root.trace_estimate() / self.root.size
        mean = tf.cast(mean, self.network.started_at.dtype)
        self.network.started_at.assign(mean)
        return mean

    @override
    def scale(self) -> tf.Tensor:
        return tf.convert_to_tensor(self.network.started_at.value)

    @override
    def batch_size(self) -> tf.Tensor:
        return tf.shape(self.residual)[0]

    @override
    def remember(
        self, tensors: Sequence[tf.Tensor], rejected: tf.Tensor
    ) -> None:
        # Without momentum and warm start there are no such variables.
        for variable, tensor in zip(
            self.network.previous, tensors, strict=False
        ):
            variable.assign(tf.where(rejected, variable.value, tensor))
