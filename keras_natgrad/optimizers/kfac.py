"""K-FAC: natural gradient with Kronecker-factored curvature."""

from __future__ import annotations

from typing import Any

import keras
from typing_extensions import override

from keras_natgrad.checks import (
    check_fraction,
    check_positive,
    check_seed,
    is_number,
)
from keras_natgrad.curvature import FISHER_KINDS, BlockOptions
from keras_natgrad.optimizers.preconditioned import PreconditionedOptimizer
from keras_natgrad.step import (
    Refresh,
    Spring,
    StepLength,
    get_damping,
    get_line_search,
    get_quadratic_model,
)


@keras.saving.register_keras_serializable(package="keras_natgrad")
class KFAC(PreconditionedOptimizer):
    r"""Natural gradient descent with Kronecker-factored curvature (K-FAC).

    The gradient is preconditioned by an approximation of the Fisher
    information of the model's output distribution, one block per layer:
    `Δ = −(F + λI)⁻¹ ∇`. The update is `δ = α Δ + μ δ₋₁`. By default α and μ
    minimise the quadratic model of the loss on the batch, and the
    damping λ is set from the first batch and adapted, so that nothing needs
    to be searched for. The Fisher is that of the model's own predictions; the
    targets do not enter it.

    The optimizer must see the layers: attach it to the model.

    Args:
        learning_rate: `"auto"` for α from the quadratic model, one for each
            layer where a batch has 256 examples or more
            (`QuadraticModel.by_layer`), or a float, a
            `keras.optimizers.schedules.LearningRateSchedule`, a callable, or
            a `keras_natgrad.LineSearch` that tries powers of two on the batch
            (along the preconditioned gradient, before momentum is added; that
            of `Spring` is there already).
            With `"auto"` the attribute `learning_rate` is 1.0 and multiplies
            α, so that callbacks may lower it. Defaults to `"auto"`.
        momentum: `"auto"` for μ from the quadratic model, a float in [0, 1),
            or a `keras_natgrad.Spring`, whose momentum is part of the
            preconditioned direction. Defaults to `"auto"`.
        damping: `"auto"`, a non-negative float, a schedule of the iteration,
            or a `keras_natgrad.LevenbergMarquardt`. In units of the loss per
            squared unit of a weight; for the weights of input features, see
            `"feature_scaled"` below. Defaults to `"auto"`.
        fisher: How the Fisher is estimated. `"propagated"` sends one random
            combination of the columns of the loss factor back per batch,
            `"exact"` every column (one backward pass each), `"sampled"` the
            score at a target drawn from the model, `"empirical"` the score
            at the observed target. Defaults to `"propagated"`.
        factor_decay: Decay β of the running averages of the factors, in
            [0, 1). Defaults to `0.95`.
        damping_split: How the damping of a Kronecker product is split over
            its factors: `"layer"` by each layer's trace norms, `"global"` by
            one ratio for all layers. Defaults to `"global"`.
        curvature_update_period: Steps between updates of the statistics.
            Defaults to `10`.
        inverse_update_period: Steps between refreshes of the inverses.
            Defaults to `50`.
        refresh_growth: Warm-up of both periods: the gap after step t is at
            most `refresh_growth · t` steps. `None` for no warm-up. Defaults
            to `0.35`.
        refresh_where: Where the inverses are refreshed when they are due:
            `"graph"`, in the step; `"host"`, on the CPU between two steps;
            `"async"`, on the CPU while the next steps run with the old ones,
            for at most `inverse_update_period` steps. Only `"async"` depends
            on the timing. A loop of one's own calls `optimizer.after_step()`
            between steps. Defaults to `"graph"`.
        quadratic_model: How the quadratic model's `δᵀFδ` is computed: a
            `keras_natgrad.QuadraticModel`, `"exact"` for the batch's own at
            every step, as in the literature, or `"estimated"` for
            `QuadraticModel()`: estimated every fourth step and averaged.
            Networks with fallback variables, and `fisher="exact"` or
            `"empirical"`, never estimate. Defaults to `"estimated"`.
        norm_constraint: Largest `δᵀFδ` of an update, as the quadratic model
            has it, or `None`.
        block: Block of captured layers: `"kronecker"`, `"feature_scaled"`
            (damping in each input feature's own unit), `"ekfac"`,
            `"diagonal"`, `"full"`, `"input_factor"`, or a name given to
            `keras_natgrad.register_block`; `"auto"` is `"feature_scaled"` for
            dense layers that read the model's inputs and `"kronecker"` for
            the rest. Or a dictionary `{pattern: name}`:
            a pattern is a layer's name or path, a glob (`"conv*"`,
            `"*/attention/*"`) or a layer class, the first
            that matches counts, and layers without one keep the default.
            Defaults to `"auto"`.
        weight_sharing: `"expand"` or `"reduce"`, for layers that are applied
            at several positions, or a dictionary likewise.
        max_factor_size: A Kronecker factor with a longer side is kept as its
            diagonal. Defaults to `4096`.
        fallback: Block of variables that no captured layer owns:
            `"kronecker"`, `"diagonal"`, `"first_order"`, `"plain"` (undamped)
            or `"auto"`, which is Kronecker for matrices and kernels and
            diagonal for the rest. Defaults to `"auto"`.
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
        - George et al., 2018, arXiv:1806.03884 (`"ekfac"`).
        - Goldshlager, Abrahamsen & Lin, 2024, arXiv:2401.10190 (SPRING).
    """

    def __init__(
        self,
        learning_rate: Any = "auto",
        momentum: float | str | Spring = "auto",
        damping: Any = "auto",
        fisher: str = "propagated",
        factor_decay: float = 0.95,
        damping_split: str = "global",
        curvature_update_period: int = 10,
        inverse_update_period: int = 50,
        refresh_growth: float | None = 0.35,
        refresh_where: str = "graph",
        quadratic_model: Any = "estimated",
        norm_constraint: float | None = None,
        block: Any = "auto",
        weight_sharing: Any = "expand",
        max_factor_size: int = 4096,
        fallback: str = "auto",
        log_statistics: bool = False,
        seed: int = 0,
        name: str = "kfac",
        **kwargs: Any,
    ) -> None:
        automatic = isinstance(learning_rate, str)
        if automatic and learning_rate != "auto":
            raise ValueError(
                "`learning_rate` must be 'auto', a float, a schedule, a "
                "callable or a keras_natgrad.LineSearch. "
                f"Received: learning_rate={learning_rate!r}"
            )
        search = get_line_search(learning_rate)
        super().__init__(
            1.0 if automatic or search else learning_rate, name=name, **kwargs
        )
        self._hide("line_search", search)
        self._hide("length", _length(automatic, momentum))
        self._hide("damping", get_damping(damping))
        if fisher not in FISHER_KINDS:
            raise ValueError(
                f"`fisher` must be one of {FISHER_KINDS}. "
                f"Received: fisher={fisher!r}"
            )
        self.fisher = fisher
        self.factor_decay = check_fraction("factor_decay", factor_decay)
        self._hide(
            "refresh",
            Refresh(
                curvature_update_period,
                inverse_update_period,
                refresh_growth,
                refresh_where,
            ),
        )
        self._hide("quadratic_model", get_quadratic_model(quadratic_model))
        if norm_constraint is not None:
            norm_constraint = check_positive("norm_constraint", norm_constraint)
        self.norm_constraint = norm_constraint
        self._hide(
            "block_options",
            BlockOptions(
                block,
                weight_sharing,
                max_factor_size,
                fallback,
                damping_split,
            ),
        )
        self.log_statistics = log_statistics
        self.seed = check_seed(seed)
        self._hide("_velocities", [])

    # -- Saving ----------------------------------------------------------

    @override
    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        if self.length.automatic_rate:
            config["learning_rate"] = "auto"
        if self.line_search is not None:
            config["learning_rate"] = keras.saving.serialize_keras_object(
                self.line_search
            )
        momentum = (
            "auto" if self.length.momentum is None else self.length.momentum
        )
        if self.length.spring:
            momentum = keras.saving.serialize_keras_object(
                Spring(self.length.spring)
            )
        damping = self.damping
        if not isinstance(damping, float):
            damping = keras.saving.serialize_keras_object(damping)
        config.update(
            momentum=momentum,
            damping=damping,
            fisher=self.fisher,
            factor_decay=self.factor_decay,
            damping_split=self.block_options.damping_split,
            curvature_update_period=self.refresh.curvature_period,
            inverse_update_period=self.refresh.inverse_period,
            refresh_growth=self.refresh.growth,
            refresh_where=self.refresh.where,
            quadratic_model=keras.saving.serialize_keras_object(
                self.quadratic_model
            ),
            norm_constraint=self.norm_constraint,
            block=_plain(self.block_options.block),
            weight_sharing=_plain(self.block_options.weight_sharing),
            max_factor_size=self.block_options.max_factor_size,
            fallback=self.block_options.fallback,
            log_statistics=self.log_statistics,
            seed=self.seed,
        )
        return config


def _plain(choices: Any) -> Any:
    """Returns a copy of choices by pattern; names stay as they are."""
    return choices if isinstance(choices, str) else dict(choices)


def _length(automatic: bool, momentum: Any) -> StepLength:
    if isinstance(momentum, dict):
        momentum = keras.saving.deserialize_keras_object(momentum)
    if isinstance(momentum, Spring):
        return StepLength(automatic, 0.0, momentum.momentum)
    if momentum == "auto":
        return StepLength(automatic, None)
    if is_number(momentum) and 0 <= momentum < 1:
        return StepLength(automatic, float(momentum))
    raise ValueError(
        "`momentum` must be 'auto', a float in [0, 1) or a "
        "keras_natgrad.Spring. "
        f"Received: momentum={momentum!r}"
    )
