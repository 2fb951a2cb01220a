"""The direction of K-FAC and its relatives: one block per layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import tensorflow as tf
from typing_extensions import override

from keras_natgrad import replicas
from keras_natgrad.capture import Plan
from keras_natgrad.curvature.assignment import BlockOptions
from keras_natgrad.curvature.captured_pass import Backward, CapturedPass
from keras_natgrad.curvature.estimator import BlockDiagonal
from keras_natgrad.curvature.products import (
    fisher_gram,
    gram_of_tangents,
    own_tangents,
    sample_examples,
)
from keras_natgrad.step.damping import least_scale
from keras_natgrad.step.direction import Direction, LocalDirection, Vector
from keras_natgrad.step.directions import (
    Ridge,
    dots,
    in_metric,
    l2_curvature,
    metric_dots,
    ridge_gram,
)
from keras_natgrad.step.quadratic import QuadraticModel
from keras_natgrad.step.refresh import Refresh
from keras_natgrad.step.state import StateFactory, StepState


@dataclass(frozen=True)
class CurvatureOptions:
    """How the statistics of the blocks are gathered.

    Attributes:
        fisher: How the Fisher is estimated, one of `FISHER_KINDS`.
        decay: Decay β of the running averages, in [0, 1).
        refresh: `Refresh`, the periods.
        model: `QuadraticModel`: how `δᵀFδ` is computed.
        least_scale: Smallest typical eigenvalue that the damping starts from,
            see `step.damping.least_scale`.
        with_ridge: Whether the curvature of L2 regularizers counts.
        seed: Seed of the random cotangents.
    """

    fisher: str
    decay: float
    refresh: Refresh
    model: QuadraticModel
    least_scale: float = 5e-6
    with_ridge: bool = True
    seed: int = 0


class BlockCurvature(Direction):
    """Preconditions layer by layer.

    Args:
        blocks: `BlockOptions`, which block each layer gets.
        options: `CurvatureOptions`.
        only_matrices: Why layers without a matrix of their own get the
            fallback block; `None` if they do not.
    """

    blocks: BlockDiagonal
    state: StepState
    variables: list[Any]
    ridge: list[float]
    ridge_rows: list[Ridge]

    def __init__(
        self,
        blocks: BlockOptions,
        options: CurvatureOptions,
        only_matrices: str | None = None,
    ) -> None:
        self.block_options = blocks
        self.options = options
        self._only_matrices = only_matrices

    @override
    def choose_layers(self, plan: Plan) -> Plan:
        if self._only_matrices is None:
            return plan
        return plan.only_matrices(self._only_matrices)

    # -- State -----------------------------------------------------------

    def make_blocks(
        self, plan: Plan, shapes: Sequence[tuple[int, ...]]
    ) -> BlockDiagonal:
        """Returns the unbuilt blocks of the network."""
        return BlockDiagonal(plan, shapes, self.block_options)

    @override
    def build(
        self,
        plan: Plan,
        variables: Sequence[Any],
        factory: StateFactory,
        state: StepState,
    ) -> None:
        self.variables = list(variables)
        self.state = state
        shapes = [tuple(v.shape) for v in variables]
        self.blocks = self.make_blocks(plan, shapes)
        self.blocks.build(
            variable_names(variables), factory.add, factory.add_sum
        )
        self.note_ridge()

    def copy_blocks(self) -> BlockDiagonal:
        """Returns the blocks once more, unbuilt."""
        shapes = [tuple(v.shape) for v in self.variables]
        return self.make_blocks(self.blocks.plan, shapes)

    def note_ridge(self) -> None:
        """Notes the curvature of the variables' L2 regularizers."""
        curvatures = [l2_curvature(v.regularizer) for v in self.variables]
        pairs = [(e.variables[0], e.variables[-1]) for e in self.blocks.entries]
        self.ridge_rows = [
            Ridge(curvatures[i], curvatures[j]) for i, j in pairs
        ]
        self.ridge = curvatures
        if not self.options.with_ridge:
            self.ridge = [0.0 for _ in curvatures]

    @property
    @override
    def parts(self) -> int:
        return len(self.blocks.entries) if self.estimates_model else 1

    @property
    @override
    def part_of_variable(self) -> list[int]:
        parts = [0] * len(self.variables)
        for part, entry in enumerate(self.blocks.entries):
            for index in entry.variables:
                parts[index] = part
        return parts

    @property
    def estimates_model(self) -> bool:
        """Whether `δᵀFδ` comes from random cotangents."""
        return (
            self.options.model.kind == "estimated"
            and self.options.fisher in ("propagated", "sampled")
            and not self.blocks.plan.fallback
        )

    # -- One step --------------------------------------------------------

    @override
    def observe(
        self, observation: Any, accepted: tf.Tensor, seed: tf.Tensor
    ) -> CapturedPass:
        captured = self.capture(observation)
        batches = self.state.count("batches")
        refresh = self.options.refresh

        def update() -> tf.Tensor:
            statistics = self.statistics(captured, observation, seed)
            self.blocks.accumulate(
                statistics, self.options.decay, keep_finite=True
            )
            self.state.increment(curvature_updates=1)
            self.state.update_at.assign(
                refresh.next_due(batches, refresh.curvature_period)
            )
            return tf.constant(0)

        due = refresh.is_due(batches, self.state.update_at.value)
        tf.cond(due & accepted, update, lambda: tf.constant(0))
        return captured

    def statistics(
        self, captured: CapturedPass, observation: Any, seed: tf.Tensor
    ) -> Any:
        """Returns the statistics of one batch, see `BlockDiagonal`."""
        return self.blocks.statistics(captured, self.options.fisher, seed)

    @override
    def refresh(self, damping: tf.Tensor) -> None:
        retries, failures = self.blocks.refresh(
            damping, self.ridge, replicas.refresh_devices()
        )
        self.state.increment(refreshes=1, retries=retries, failures=failures)

    def capture(self, observation: Any) -> CapturedPass:
        """Returns the forward pass, ready to send cotangents back through."""
        captured = CapturedPass(
            observation.tape.gradient_tape,
            observation.terms,
            observation.records,
            self.blocks.entries,
            [variable.value for variable in self.variables],
            observation.share,
        )
        if self.options.fisher != "exact" and self.blocks.uses_cotangents:
            captured.trace_backward(self.options.fisher)
        return captured

    @override
    def at(
        self, observation: Any, seen: Any, gradients: Sequence[tf.Tensor]
    ) -> BlockDirection:
        return BlockDirection(self, observation, seen, gradients)


class BlockDirection(LocalDirection):
    """The blocks at one batch.

    Args:
        curvature: `BlockCurvature`, built.
        observation: `NetworkObservation`.
        captured: `CapturedPass` of the batch.
        gradients: One gradient per variable.
    """

    def __init__(
        self,
        curvature: BlockCurvature,
        observation: Any,
        captured: CapturedPass,
        gradients: Sequence[tf.Tensor],
    ) -> None:
        self.curvature = curvature
        self.blocks = curvature.blocks
        self.observation = observation
        self.captured = captured
        self.gradient = self.blocks.to_matrices(gradients)
        self.parts = curvature.parts

    @property
    def metrics(self) -> list[tf.Tensor | None]:
        """The metric of the damping, that of the inverses in use."""
        return self.blocks.damping_rows()

    @override
    def observe_gradient(self) -> None:
        if self.blocks.uses_gradients:
            self.blocks.observe_gradients(self.gradient)

    @override
    def to_vector(self, tensors: Sequence[Any]) -> Vector:
        return self.blocks.to_matrices(tensors)

    @override
    def to_tensors(self, vector: Vector) -> list[tf.Tensor]:
        return self.blocks.from_matrices(vector)

    @override
    def solve(self, gradient: Vector, damping: tf.Tensor) -> Vector:
        return self.blocks.precondition(gradient)

    @override
    def dots(self, left: Vector, right: Vector) -> tf.Tensor:
        return dots(left, right)

    @override
    def metric_dots(self, left: Vector, right: Vector) -> tf.Tensor:
        return metric_dots(left, right, self.metrics)

    @override
    def in_metric(self, vector: Vector) -> Vector:
        return [
            in_metric(matrix, rows)
            for matrix, rows in zip(vector, self.metrics, strict=True)
        ]

    @override
    def ridge_gram(
        self, vectors: Sequence[Vector], damping: tf.Tensor, by_part: bool
    ) -> tf.Tensor:
        return ridge_gram(
            vectors, damping, self.curvature.ridge_rows, self.metrics, by_part
        )

    @override
    def scale(self) -> tf.Tensor:
        return self.blocks.mean_eigenvalue()

    @override
    def first_scale(self) -> tf.Tensor:
        least = least_scale(
            self.gradient,
            self.observation.loss,
            self.curvature.options.least_scale,
        )
        mean = self.blocks.mean_eigenvalue()
        return tf.maximum(mean, tf.cast(least, mean.dtype))

    @override
    def batch_size(self) -> tf.Tensor:
        own = tf.shape(self.observation.terms[0].outputs)[0]
        total = replicas.sum_over_replicas(tf.cast(own, tf.float32))
        return tf.cast(total / replicas.replica_count(), tf.int32)

    @override
    def gram(self, vectors: Sequence[Vector], by_part: bool) -> tf.Tensor:
        if self.curvature.estimates_model:
            return self._estimated_gram(vectors, by_part)
        gram = fisher_gram(
            self.observation.tape.gradient_tape,
            self.observation.terms,
            [variable.value for variable in self.curvature.variables],
            [self.to_tensors(each) for each in vectors],
        )
        return tf.cast(gram, self.gradient[0].dtype)

    def _estimated_gram(
        self, vectors: Sequence[Vector], by_part: bool
    ) -> tf.Tensor:
        """Returns the mean of as many estimates as a small batch needs."""
        settings, captured = self.curvature.options.model, self.captured
        batches = self.curvature.state.count("batches") - 1
        seed = replicas.replica_seed(
            tf.stack(
                [tf.constant(self.curvature.options.seed, tf.int32), batches]
            )
        )

        def backward(index: Any) -> Backward:
            folded = tf.random.fold_in(seed, index, alg="philox")
            return captured.random_backward(
                self.curvature.options.fisher, folded
            )

        # The cotangents differ from estimate to estimate, the products of the
        # inputs with the vectors do not.
        sample = sample_examples(captured, backward(0), settings.examples)
        own = own_tangents(sample.inputs, vectors)
        first = gram_of_tangents(
            own, sample.cotangents, by_part, sample.weights
        )
        dtype = self.gradient[0].dtype
        count = settings.estimates(captured.batch)

        def add(
            index: tf.Tensor, total: tf.Tensor
        ) -> tuple[tf.Tensor, tf.Tensor]:
            gram = gram_of_tangents(own, backward(index).cotangents, by_part)
            return index + 1, total + tf.cast(gram, dtype)

        # A batch that is sampled makes one estimate.
        _, total = tf.while_loop(
            lambda index, _: index < count,
            add,
            (tf.constant(1, tf.int32), tf.cast(first, dtype)),
        )
        return total / tf.cast(count, dtype)


def variable_names(variables: Sequence[Any]) -> list[str]:
    """Returns a unique name for the state of every variable."""
    return [
        f"{i}_{variable.path.replace('/', '_')}"
        for i, variable in enumerate(variables)
    ]
