"""What a step needs of the curvature: the contract of a direction."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Any, TypeAlias

import tensorflow as tf

from keras_natgrad.step.state import StateFactory, StepState

#: A point in parameter space, in the direction's own form: for example one
#: matrix per block.
Vector: TypeAlias = Sequence[tf.Tensor]


class LocalDirection(abc.ABC):
    """The curvature at one batch: how to solve and to measure there.

    A vector has one or more parts, usually the layers; products are returned
    part by part, so that parts may get learning rates of their own.

    Attributes:
        gradient: The gradient ∇ of the batch's loss, a `Vector`.
        parts: Number of parts.
    """

    gradient: Vector
    parts: int

    @abc.abstractmethod
    def to_vector(self, tensors: Sequence[Any]) -> Vector:
        """Returns the vector of one tensor per variable."""

    @abc.abstractmethod
    def to_tensors(self, vector: Vector) -> list[tf.Tensor]:
        """Returns one tensor per variable."""

    @abc.abstractmethod
    def solve(self, gradient: Vector, damping: tf.Tensor) -> Vector:
        """Returns the preconditioned gradient `(F + λI)⁻¹ ∇`.

        Args:
            gradient: ∇, or what a step rule made of it.
            damping: Scalar λ. Cached inverses have the λ of their refresh.
        """

    @abc.abstractmethod
    def gram(self, vectors: Sequence[Vector], by_part: bool) -> tf.Tensor:
        """Returns `δ_iᵀ F δ_j` on the batch.

        Args:
            vectors: One or two vectors.
            by_part: Whether each part of the first one is a vector of its
                own.

        Returns:
            Tensor `[k, k]`, with `parts` for one of the k if `by_part`. This
            replica's share where there are several.
        """

    @abc.abstractmethod
    def dots(self, left: Vector, right: Vector) -> tf.Tensor:
        """Returns the inner products of the parts, `[parts]`."""

    @abc.abstractmethod
    def ridge_gram(
        self, vectors: Sequence[Vector], damping: tf.Tensor, by_part: bool
    ) -> tf.Tensor:
        """Returns `δ_iᵀ (λD + R) δ_j`.

        D is the metric of the damping, R the curvature of the regularizers.

        Args:
            vectors: One or two vectors.
            damping: Scalar λ.
            by_part: As in `gram`.

        Returns:
            Tensor of the shape of `gram`, padded with zeros to two vectors.
        """

    @abc.abstractmethod
    def metric_dots(self, left: Vector, right: Vector) -> tf.Tensor:
        """Returns the products `δᵢᵀ D δⱼ` of the parts, `[parts]`."""

    @abc.abstractmethod
    def in_metric(self, vector: Vector) -> Vector:
        """Returns `D δ`."""

    @abc.abstractmethod
    def first_scale(self) -> tf.Tensor:
        """Returns the typical eigenvalue that the damping starts from."""

    @abc.abstractmethod
    def scale(self) -> tf.Tensor:
        """Returns the typical eigenvalue that bounds the damping."""

    @abc.abstractmethod
    def batch_size(self) -> tf.Tensor:
        """Returns the examples per replica, an int32 scalar."""

    def observe_gradient(self) -> None:  # noqa: B027 (few directions do)
        """Shows the gradient of the step to what asks for it."""

    def remember(  # noqa: B027 (most directions remember nothing)
        self, tensors: Sequence[tf.Tensor], rejected: tf.Tensor
    ) -> None:
        """Notes the preconditioned gradient of a step that was made.

        Args:
            tensors: It, one tensor per variable.
            rejected: Scalar bool: the step was taken back.
        """


class Direction(abc.ABC):
    """Turns gradients into preconditioned gradients, with saved state.

    Attributes:
        spring: μ of SPRING, where the direction itself keeps it.
    """

    #: Whether it has inverses that are refreshed now and then.
    has_inverses = True
    spring: float = 0.0

    def choose_layers(self, plan: Any) -> Any:
        """Returns the part of a `capture.Plan` that it can treat."""
        return plan

    def attach(  # noqa: B027 (most directions need only the plan)
        self, model: Any, plan: Any, variables: Sequence[Any]
    ) -> None:
        """Looks at the model, once its layers are planned.

        Args:
            model: The attached model.
            plan: Its `capture.Plan`.
            variables: What its layers hold, in the optimizer's order.
        """

    def check_replicas(self, name: str) -> None:  # noqa: B027
        """Raises ValueError if it cannot run on several replicas.

        Args:
            name: Name of the optimizer's class.
        """

    @property
    def parts(self) -> int:
        """Number of parts that may get learning rates of their own."""
        return 1

    @property
    def part_of_variable(self) -> Sequence[int]:
        """The part that each variable belongs to, if there are several."""
        return ()

    @abc.abstractmethod
    def build(
        self,
        plan: Any,
        variables: Sequence[Any],
        factory: StateFactory,
        state: StepState,
    ) -> None:
        """Creates the state from the plan and the variables alone.

        Args:
            plan: `capture.Plan`.
            variables: `keras.Variable`s.
            factory: Creates saved variables.
            state: The scalars of the step; its counters count events here.
        """

    @abc.abstractmethod
    def observe(
        self, observation: Any, accepted: tf.Tensor, seed: tf.Tensor
    ) -> Any:
        """Updates the statistics from one batch, if it is time.

        Args:
            observation: `Observation`.
            accepted: Scalar bool: the batch is one to learn from.
            seed: int32 `[2]`, of this batch and replica.

        Returns:
            What it has seen, for `at`.
        """

    @abc.abstractmethod
    def refresh(self, damping: tf.Tensor) -> None:
        """Recomputes cached inverses with the damping λ."""

    @abc.abstractmethod
    def at(
        self, observation: Any, seen: Any, gradients: Sequence[tf.Tensor]
    ) -> LocalDirection:
        """Returns the curvature at a batch.

        Args:
            observation: `Observation`.
            seen: What `observe` returned for it.
            gradients: One gradient per variable.
        """
