"""K-FAC: natural gradient with Kronecker-factored curvature."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from typing_extensions import override

from keras_natgrad import _compat
from keras_natgrad.blocks import check_kind
from keras_natgrad.capture import Plan
from keras_natgrad.curvature import (
    FISHER_KINDS,
    BlockDiagonal,
    BlockOptions,
    CapturedPass,
    estimated_gram,
    fisher_gram,
    random_cotangents,
)
from keras_natgrad.optimizers.base import CurvatureOptimizer, Observation
from keras_natgrad.optimizers.state import StepState
from keras_natgrad.optimizers.summary import render_table
from keras_natgrad.step import (
    LevenbergMarquardt,
    StepLength,
    get_damping,
    is_due,
    norm_scale,
    quadratic_coefficients,
)
from keras_natgrad.step.damping import check_positive
from keras_natgrad.step.directions import (
    dot,
    l2_curvature,
    pad_gram,
    pad_pair,
    ridge_gram,
)
from keras_natgrad.step.length import model_change, quadratic_form
from keras_natgrad.step.refresh import check_period
from keras_natgrad.step.update import apply_update

# Examples of a batch that the estimated quadratic model looks at.
_MODEL_EXAMPLES = 256


@keras.saving.register_keras_serializable(package="keras_natgrad")
class KFAC(CurvatureOptimizer):
    r"""Natural gradient descent with Kronecker-factored curvature (K-FAC).

    The gradient is preconditioned by an approximation of the Fisher
    information of the model's output distribution, one block per layer:
    `Δ = −(F + λI)⁻¹ ∇`. The update is `δ = α Δ + μ δ₋₁`. By default α and μ
    minimise the exact quadratic model of the loss on the batch, and the
    damping λ is set from the first batch and adapted, so that nothing needs
    to be searched for. The Fisher is that of the model's own predictions; the
    targets do not enter it.

    The optimizer must see the layers: attach it to the model.

    Args:
        learning_rate: `"auto"` for α from the quadratic model, or a float, a
            `keras.optimizers.schedules.LearningRateSchedule` or a callable.
            With `"auto"` the attribute `learning_rate` is 1.0 and multiplies
            α, so that callbacks may lower it. Defaults to `"auto"`.
        momentum: `"auto"` for μ from the quadratic model, or a float in
            [0, 1). Defaults to `"auto"`.
        damping: `"auto"`, a non-negative float, a schedule of the iteration,
            or a `keras_natgrad.LevenbergMarquardt`. In units of the loss per
            squared unit of a weight. Defaults to `"auto"`.
        fisher: How the Fisher is estimated. `"propagated"` sends one random
            combination of the columns of the loss factor back per batch,
            `"exact"` every column (one backward pass each), `"sampled"` the
            score at a target drawn from the model, `"empirical"` the score
            at the observed target. Defaults to `"propagated"`.
        factor_decay: Decay β of the running averages of the factors, in
            [0, 1). Defaults to `0.95`.
        curvature_update_period: Steps between updates of the statistics.
        inverse_update_period: Steps between refreshes of the inverses.
        quadratic_model: How the quadratic model's `δᵀFδ` is computed.
            `"exact"` multiplies by the batch's Fisher; `"estimated"` uses
            the random cotangents of the statistics on about 256 examples of
            the batch, at a third of the cost and a relative error of some
            9 %. Networks with fallback variables, and `fisher="exact"` or
            `"empirical"`, always use the exact one. Defaults to
            `"estimated"`.
        norm_constraint: Largest `δᵀFδ` of an update, or `None`.
        block: Block of captured layers: `"kronecker"`, `"diagonal"`,
            `"full"`, or a name given to `keras_natgrad.register_block`.
        weight_sharing: `"expand"` or `"reduce"`, for layers that are applied
            at several positions.
        max_factor_size: A Kronecker factor with a longer side is kept as its
            diagonal. Defaults to `4096`.
        fallback: Block of variables that no captured layer owns:
            `"diagonal"` or `"first_order"`.
        log_statistics: Whether `fit` logs `statistics` beside the metrics.
        seed: Seed of the random cotangents.
        weight_decay: See `keras.optimizers.Optimizer`, as for all that
            follow. Decoupled: it enters neither gradient nor curvature.
        clipnorm: Applied to the gradient before it is preconditioned.
        clipvalue: Likewise.
        global_clipnorm: Likewise.
        use_ema: Whether to keep a moving average of the weights.
        ema_momentum: Its momentum.
        ema_overwrite_frequency: How often it overwrites the weights.
        loss_scale_factor: Factor of the loss, divided out of the gradient.
        gradient_accumulation_steps: Batches per update. The statistics see
            every batch.
        name: Name of the optimizer.
        **kwargs: Further arguments of `keras.optimizers.Optimizer`.

    Raises:
        ValueError: If an argument is out of range.

    Example:

    ```python
    optimizer = keras_natgrad.KFAC().attach(model)
    model.compile(optimizer, loss="sparse_categorical_crossentropy")
    model.fit(x, y, batch_size=512)
    ```

    References:
        - Martens & Grosse, 2015, arXiv:1503.05671.
        - Martens, 2014, arXiv:1412.1193 (the quadratic model, damping).
    """

    def __init__(
        self,
        learning_rate: Any = "auto",
        momentum: float | str = "auto",
        damping: Any = "auto",
        fisher: str = "propagated",
        factor_decay: float = 0.95,
        curvature_update_period: int = 1,
        inverse_update_period: int = 5,
        quadratic_model: str = "estimated",
        norm_constraint: float | None = None,
        block: str = "kronecker",
        weight_sharing: str = "expand",
        max_factor_size: int = 4096,
        fallback: str = "diagonal",
        log_statistics: bool = False,
        seed: int = 0,
        name: str = "kfac",
        **kwargs: Any,
    ) -> None:
        automatic = isinstance(learning_rate, str)
        if automatic and learning_rate != "auto":
            raise ValueError(
                "`learning_rate` must be 'auto', a float, a schedule or a "
                f"callable. Received: learning_rate={learning_rate!r}"
            )
        super().__init__(
            1.0 if automatic else learning_rate, name=name, **kwargs
        )
        self.automatic_rate = automatic
        self.momentum = _check_momentum(momentum)
        self._hide("damping", get_damping(damping))
        if fisher not in FISHER_KINDS:
            raise ValueError(
                f"`fisher` must be one of {FISHER_KINDS}. "
                f"Received: fisher={fisher!r}"
            )
        self.fisher = fisher
        if not 0 <= factor_decay < 1:
            raise ValueError(
                "`factor_decay` must be in [0, 1). "
                f"Received: factor_decay={factor_decay!r}"
            )
        self.factor_decay = factor_decay
        self.curvature_update_period = check_period(
            "curvature_update_period", curvature_update_period
        )
        self.inverse_update_period = check_period(
            "inverse_update_period", inverse_update_period
        )
        if quadratic_model not in ("exact", "estimated"):
            raise ValueError(
                "`quadratic_model` must be 'exact' or 'estimated'. "
                f"Received: quadratic_model={quadratic_model!r}"
            )
        self.quadratic_model = quadratic_model
        if norm_constraint is not None:
            check_positive("norm_constraint", norm_constraint)
        self.norm_constraint = norm_constraint
        check_kind(block)
        self.block_options = BlockOptions(
            block, weight_sharing, max_factor_size, fallback
        )
        self.log_statistics = log_statistics
        self.seed = seed
        self._hide("curvature", None)
        self._hide("state", None)
        self._hide("_velocities", [])

    # -- State -----------------------------------------------------------

    @override
    def build_curvature(self, plan: Plan, variables: list[Any]) -> None:
        shapes = [tuple(v.shape) for v in variables]
        self._hide("curvature", BlockDiagonal(plan, shapes, self.block_options))
        add = self.add_curvature_variable
        self._hide("state", StepState(add, self.add_variable))
        names = [
            f"{i}_{variable.path.replace('/', '_')}"
            for i, variable in enumerate(variables)
        ]
        self.curvature.build(names, add)
        velocities = []
        if self.momentum != 0:
            velocities = [
                add(f"{name}_velocity", shape, "zeros")
                for name, shape in zip(names, shapes, strict=True)
            ]
        self._hide("_velocities", velocities)
        ridge = [l2_curvature(variable.regularizer) for variable in variables]
        self._hide("_ridge", ridge)
        self._hide("_ridge_rows", ridge_rows(self.curvature.entries, ridge))

    @property
    def statistics(self) -> dict[str, float]:
        """What happened so far, as Python numbers.

        Damping, reduction ratio, predicted loss change, learning rate,
        momentum and norms of the last step; counts of batches, updates of
        the statistics, refreshes of the inverses, dampings raised by a failed
        factorisation, factorisations given up, and steps skipped.
        """
        return {} if self.state is None else self.state.to_dict()

    def summary(self, print_fn: Any = None) -> None:
        """Prints what each layer got: block, shapes, memory, approximation.

        Args:
            print_fn: Function that prints one string. Defaults to `print`.
        """
        if self.curvature is None:
            self.build(self.attached_model().trainable_variables)
        variables = _compat.optimizer_variables(self)
        (print_fn or print)(render_table(self.curvature, variables))

    # -- One step --------------------------------------------------------

    @override
    @property
    def needs_objective(self) -> bool:
        return isinstance(self.damping, LevenbergMarquardt)

    @override
    def step_logs(self) -> dict[str, tf.Tensor]:
        if not self.log_statistics or self.state is None:
            return {}
        tensors = self.state.to_tensors()
        return {f"{self.name}_{key}": value for key, value in tensors.items()}

    @override
    def observe(self, observation: Observation) -> None:
        variables = _compat.optimizer_variables(self)
        captured = CapturedPass(
            observation.tape.gradient_tape,
            observation.terms,
            observation.records,
            self.curvature.entries,
            [variable.value for variable in variables],
        )
        observation.captured = captured
        batches = self.state.count("batches")
        seed = tf.stack([tf.constant(self.seed, tf.int32), batches])
        if self._estimates_model:
            # The quadratic model needs this pass at every step; an update of
            # the statistics then shares it.
            observation.backward = captured.backward(
                random_cotangents(observation.terms, self.fisher, seed)
            )

        def update() -> tf.Tensor:
            statistics = self.curvature.statistics(
                captured, self.fisher, seed, observation.backward
            )
            self.curvature.accumulate(statistics, self.factor_decay)
            self.state.increment(curvature_updates=1)
            return tf.constant(0)

        due = is_due(batches, self.curvature_update_period)
        tf.cond(due & observation.usable, update, lambda: tf.constant(0))
        self.state.increment(batches=1)

    @override
    def curvature_step(
        self,
        observation: Observation,
        gradients: Sequence[tf.Tensor],
        learning_rate: Any,
    ) -> None:
        rate = tf.cast(learning_rate, self.curvature_dtype)
        self._set_damping()
        self._refresh_if_due()
        matrices = self.curvature.to_matrices(gradients)
        solved = self.curvature.precondition(matrices)
        if self._needs_gram:
            coefficients, predicted = self._solve_model(
                observation, matrices, solved, rate
            )
        else:
            momentum = tf.constant(self.momentum, rate.dtype)
            coefficients, predicted = tf.stack([rate, momentum]), None
        self._move(solved, coefficients)
        self.state.note(learning_rate=coefficients[0], momentum=coefficients[1])
        if predicted is not None:
            self.state.note(model_change=predicted)
            self._adapt_damping(observation, predicted)

    def _solve_model(
        self,
        observation: Observation,
        gradients: Sequence[tf.Tensor],
        solved: Sequence[tf.Tensor],
        rate: tf.Tensor,
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns the coefficients of (−P∇, δ₋₁) and the predicted change."""
        candidates = [list(solved)]
        if self._velocities:
            candidates.append(self.curvature.to_matrices(self._velocities))
        # The first candidate enters with its sign here, once.
        signs = tf.constant([-1.0, 1.0], rate.dtype)
        gram = self._gram(observation, candidates)
        damped = gram + ridge_gram(
            candidates, self.state.damping.value, self._ridge_rows
        )
        slopes = pad_pair([dot(gradients, each) for each in candidates])
        gram *= signs[:, tf.newaxis] * signs
        damped *= signs[:, tf.newaxis] * signs
        slopes *= signs
        length = self._length
        coefficients = quadratic_coefficients(damped, slopes, length, rate)
        if length.automatic_rate:
            coefficients *= tf.stack([rate, tf.ones_like(rate)])
        if self.norm_constraint is not None:
            coefficients *= norm_scale(
                quadratic_form(gram, coefficients), self.norm_constraint
            )
        return coefficients, model_change(damped, slopes, coefficients)

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

    @override
    def count_skipped_step(self) -> None:
        self.state.increment(skipped=1)

    @property
    def _length(self) -> StepLength:
        if isinstance(self.momentum, float):
            return StepLength(self.automatic_rate, self.momentum)
        return StepLength(self.automatic_rate, None)

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

    def _refresh_if_due(self) -> None:
        """Recomputes the inverses every `inverse_update_period` steps."""
        due = is_due(self.iterations.value, self.inverse_update_period)
        first = tf.equal(self.state.count("refreshes"), 0)

        def refresh() -> tf.Tensor:
            retries, failures = self.curvature.refresh(
                self.state.damping.value, self._ridge
            )
            self.state.increment(
                refreshes=1, retries=retries, failures=failures
            )
            return tf.constant(0)

        tf.cond(due | first, refresh, lambda: tf.constant(0))

    @property
    def _needs_gram(self) -> bool:
        """Whether anything asks for `δᵀFδ`."""
        return (
            self._length.needs_model
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
        self, observation: Observation, predicted: tf.Tensor
    ) -> None:
        """Compares the model with the loss, where the damping adapts."""
        rule, objective = self.damping, observation.tape.objective
        if not isinstance(rule, LevenbergMarquardt) or objective is None:
            return
        loss = tf.cast(observation.tape.loss, predicted.dtype)

        def adapt() -> tf.Tensor:
            change = tf.cast(objective(), loss.dtype) - loss
            ratio = tf.math.divide_no_nan(change, predicted)
            self.state.note(reduction_ratio=ratio)
            self.state.damping.assign(
                rule.adapt(
                    self.state.damping.value,
                    ratio,
                    self.curvature.mean_eigenvalue(),
                )
            )
            return tf.constant(0)

        due = is_due(self.iterations.value, rule.period)
        tf.cond(due, adapt, lambda: tf.constant(0))

    # -- Saving ----------------------------------------------------------

    @override
    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        if self.automatic_rate:
            config["learning_rate"] = "auto"
        damping = self.damping
        if not isinstance(damping, float):
            damping = keras.saving.serialize_keras_object(damping)
        config.update(
            momentum=self.momentum,
            damping=damping,
            fisher=self.fisher,
            factor_decay=self.factor_decay,
            curvature_update_period=self.curvature_update_period,
            inverse_update_period=self.inverse_update_period,
            quadratic_model=self.quadratic_model,
            norm_constraint=self.norm_constraint,
            block=self.block_options.block,
            weight_sharing=self.block_options.weight_sharing,
            max_factor_size=self.block_options.max_factor_size,
            fallback=self.block_options.fallback,
            log_statistics=self.log_statistics,
            seed=self.seed,
        )
        return config


def ridge_rows(entries: Sequence[Any], ridge: Sequence[float]) -> list[Any]:
    """Returns the regularizers' curvature as something to multiply by.

    A float per entry, or a column `[rows, 1]` where kernel and bias differ.
    """
    rows: list[Any] = []
    for entry in entries:
        own = [ridge[index] for index in entry.variables]
        if len(set(own)) == 1:
            rows.append(own[0])
        else:
            column = np.full((entry.block.shape.rows, 1), own[0])
            column[-1] = own[1]
            rows.append(column)
    return rows


def _check_momentum(momentum: Any) -> float | str:
    if momentum == "auto":
        return "auto"
    number = isinstance(momentum, (int, float))
    if number and not isinstance(momentum, bool) and 0 <= momentum < 1:
        return float(momentum)
    raise ValueError(
        "`momentum` must be 'auto' or a float in [0, 1). "
        f"Received: momentum={momentum!r}"
    )
