"""K-FAC: natural gradient with Kronecker-factored curvature."""

from __future__ import annotations

import dataclasses
from typing import Any

import keras

from keras_natgrad.checks import (
    check_fraction,
    check_positive,
    check_seed,
)
from keras_natgrad.curvature import (
    FISHER_KINDS,
    BlockCurvature,
    BlockDiagonal,
    BlockOptions,
    CurvatureOptions,
)
from keras_natgrad.optimizers.base import CurvatureOptimizer
from keras_natgrad.optimizers.engine import Parts
from keras_natgrad.optimizers.refreshing import Refreshing
from keras_natgrad.optimizers.settings import Settings
from keras_natgrad.step import (
    Damping,
    FixedStep,
    LevenbergMarquardt,
    LineSearch,
    QuadraticModel,
    QuadraticStep,
    Refresh,
    SearchedStep,
    Spring,
    SpringStep,
    StepRule,
    get_damping,
    get_learning_rate,
    get_momentum,
    get_quadratic_model,
)


@dataclasses.dataclass(frozen=True)
class KFACSettings(Settings):
    """The arguments of `KFAC`, checked; see there."""

    momentum: float | str | Spring = "auto"
    damping: Damping = dataclasses.field(default_factory=LevenbergMarquardt)
    fisher: str = "propagated"
    factor_decay: float = 0.95
    damping_split: str = "global"
    curvature_update_period: int = 10
    inverse_update_period: int = 50
    refresh_growth: float | None = 0.35
    refresh_where: str = "graph"
    quadratic_model: QuadraticModel = dataclasses.field(
        default_factory=QuadraticModel
    )
    norm_constraint: float | None = None
    block: Any = "auto"
    weight_sharing: Any = "expand"
    max_factor_size: int = 4096
    fallback: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        # Patterns by name, and blocks from their configs.
        blocks = self.block_options()
        object.__setattr__(self, "block", blocks.block)
        object.__setattr__(self, "weight_sharing", blocks.weight_sharing)
        if self.fisher not in FISHER_KINDS:
            raise ValueError(
                f"`fisher` must be one of {FISHER_KINDS}. "
                f"Received: fisher={self.fisher!r}"
            )
        check_fraction("factor_decay", self.factor_decay)
        if self.norm_constraint is not None:
            check_positive("norm_constraint", self.norm_constraint)
        check_seed(self.seed)

    def block_options(self) -> BlockOptions:
        """Returns which block each layer gets."""
        return BlockOptions(
            self.block,
            self.weight_sharing,
            self.max_factor_size,
            self.fallback,
            self.damping_split,
        )

    def rule(self) -> StepRule:
        """Returns how far the steps go."""
        if isinstance(self.rate, StepRule):
            return self.rate
        automatic, momentum, model = (
            self.rate == "auto",
            self.momentum,
            self.quadratic_model,
        )
        if isinstance(momentum, Spring):
            momentum = 0.0
        rule: StepRule = FixedStep(0.0)
        if automatic or momentum == "auto":
            rule = QuadraticStep(
                automatic,
                None if momentum == "auto" else float(momentum),
                model.by_layer and automatic,
                model.most_momentum,
                model.spread,
            )
        else:
            rule = FixedStep(float(momentum))
        if isinstance(self.momentum, Spring):
            if isinstance(rule, QuadraticStep):
                rule = dataclasses.replace(rule, by_part=False)
            rule = SpringStep(self.momentum.momentum, rule)
        if isinstance(self.rate, LineSearch):
            rule = SearchedStep(self.rate, rule)
        return rule

    def parts(self) -> Parts:
        """Returns the parts of the engine."""
        periods = Refresh(
            self.curvature_update_period,
            self.inverse_update_period,
            self.refresh_growth,
            self.refresh_where,
        )
        options = CurvatureOptions(
            self.fisher,
            self.factor_decay,
            periods,
            self.quadratic_model,
            getattr(self.damping, "least_scale", 5e-6),
            seed=self.seed,
        )
        return Parts(
            direction=BlockCurvature(self.block_options(), options),
            rule=self.rule(),
            damping=self.damping,
            refreshing=Refreshing(periods),
            model=self.quadratic_model,
            norm_constraint=self.norm_constraint,
            seed=self.seed,
        )


@keras.saving.register_keras_serializable(package="keras_natgrad")
class KFAC(CurvatureOptimizer):
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
            of `Spring` is there already), or a `keras_natgrad.StepRule` of
            your own, which then decides on the momentum too.
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
            `"diagonal"`, `"full"`, `"input_factor"`, a name given to
            `keras_natgrad.register_block`, or an instance with options of its
            own, `keras_natgrad.blocks.EigenBlock(...)`; `"auto"` is
            `"feature_scaled"` for dense layers that read the model's inputs
            and `"kronecker"` for the rest. Or a dictionary `{pattern: block}`:
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
        learning_rate, rate = get_learning_rate(learning_rate)
        settings = KFACSettings(
            log_statistics=bool(log_statistics),
            rate=rate,
            momentum=get_momentum(momentum, rate),
            damping=get_damping(damping),
            fisher=fisher,
            factor_decay=factor_decay,
            damping_split=damping_split,
            curvature_update_period=curvature_update_period,
            inverse_update_period=inverse_update_period,
            refresh_growth=refresh_growth,
            refresh_where=refresh_where,
            quadratic_model=get_quadratic_model(quadratic_model),
            norm_constraint=norm_constraint,
            block=block,
            weight_sharing=weight_sharing,
            max_factor_size=max_factor_size,
            fallback=fallback,
            seed=seed,
        )
        super().__init__(
            learning_rate, settings, settings.parts(), name=name, **kwargs
        )

    @property
    def curvature(self) -> BlockDiagonal:
        """The blocks of the network, once built."""
        direction = self.engine.direction
        assert isinstance(direction, BlockCurvature)
        return direction.blocks
