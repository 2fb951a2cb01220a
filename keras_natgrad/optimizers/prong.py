"""PRONG: gradient descent on the weights of whitened inputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import keras
from typing_extensions import override

from keras_natgrad.capture import CurvatureTape
from keras_natgrad.checks import check_fraction
from keras_natgrad.curvature import (
    BlockCurvature,
    BlockDiagonal,
    BlockOptions,
    CurvatureOptions,
    OutputTerm,
)
from keras_natgrad.heads import LossWeight
from keras_natgrad.heads.observed import ObservedLoss
from keras_natgrad.optimizers.base import CurvatureOptimizer
from keras_natgrad.optimizers.engine import Parts
from keras_natgrad.optimizers.refreshing import Refreshing
from keras_natgrad.optimizers.settings import Settings
from keras_natgrad.step import (
    ConstantDamping,
    Damping,
    FixedStep,
    QuadraticModel,
    Refresh,
    get_damping,
)
from keras_natgrad.training.loss_heads import LossHead


@dataclasses.dataclass(frozen=True)
class PRONGSettings(Settings):
    """The arguments of `PRONG`, checked; see there."""

    momentum: float = 0.0
    damping: Damping = ConstantDamping(0.1)
    relative_damping: bool = True
    factor_decay: float = 0.95
    curvature_update_period: int = 10
    inverse_update_period: int = 100
    refresh_growth: float | None = 0.15
    weight_sharing: Any = "expand"
    max_factor_size: int = 4096

    def __post_init__(self) -> None:
        check_fraction("momentum", self.momentum)
        check_fraction("factor_decay", self.factor_decay)

    def parts(self) -> Parts:
        """Returns the parts of the engine."""
        periods = Refresh(
            self.curvature_update_period,
            self.inverse_update_period,
            self.refresh_growth,
        )
        blocks = BlockOptions(
            "input_factor",
            self.weight_sharing,
            self.max_factor_size,
            fallback="plain",
            damp_bias=False,
            relative_damping=self.relative_damping,
        )
        # No quadratic model, no cotangents: no loss but its gradient, and the
        # curvature of a regularizer is not that of the inputs.
        options = CurvatureOptions(
            "propagated",
            self.factor_decay,
            periods,
            QuadraticModel("exact"),
            with_ridge=False,
        )
        return Parts(
            direction=BlockCurvature(blocks, options, "no input factor"),
            rule=FixedStep(float(self.momentum)),
            damping=self.damping,
            refreshing=Refreshing(periods),
        )


@keras.saving.register_keras_serializable(package="keras_natgrad")
class PRONG(CurvatureOptimizer):
    r"""Projected natural gradient descent (natural neural networks).

    Each layer `a = W h + b` is trained as if it were `a = V U (h − μ) + d`,
    with the mean μ of its inputs and a root `UᵀU = (Σ + εI)⁻¹` of their
    inverse covariance. One step of gradient descent on (V, d) is, in the
    weights that the layer has,

        [ΔW Δb] = −α [∇W ∇b] [[Σ + εI + μμᵀ, μ], [μᵀ, 1]]⁻¹,

    K-FAC with `G = I`. This optimizer makes that step, without a change of
    the model; `keras_natgrad.layers.WhitenedDense` and `WhitenedConv2D` have
    (V, d) for weights.

    It costs no second backward pass: the statistics are those of the forward
    pass. The loss enters by its gradient only, so that every Keras loss will
    do. Parameters of other layers take plain steps with the same α.

    The optimizer must see the layers: attach it to the model.

    Args:
        learning_rate: α: a float, a
            `keras.optimizers.schedules.LearningRateSchedule` or a callable.
            Defaults to `0.03`. It is in the unit of the loss, as for gradient
            descent: tune it.
        momentum: μ in `δ = −α Δ + μ δ₋₁`, in [0, 1). Defaults to `0.0`.
        damping: ε: a non-negative float or a schedule of the iteration. No
            direction is magnified more than 1/ε times. Defaults to `0.1`.
        relative_damping: Whether ε counts in mean eigenvalues of each
            layer's Σ, so that the unit of the inputs does not matter.
            Defaults to `True`.
        factor_decay: Decay β of the running averages of the second moments,
            in [0, 1). Defaults to `0.95`.
        curvature_update_period: Steps between updates of the second moments.
            Defaults to `10`.
        inverse_update_period: Steps between whitenings: refreshes of
            (Σ + εI)⁻¹. Defaults to `100`.
        refresh_growth: Warm-up of both periods: the gap after step t is at
            most `refresh_growth · t` steps. `None` for no warm-up. Defaults
            to `0.15`.
        weight_sharing: `"expand"` counts every position at which a layer is
            applied as an example, `"reduce"` takes their mean first.
        max_factor_size: A layer with more inputs keeps the diagonal of Σ.
            Defaults to `4096`.
        log_statistics: Whether `fit` logs `statistics` beside the metrics.
        name: Name of the optimizer.
        **kwargs: Further arguments of `keras.optimizers.Optimizer`.

    Raises:
        ValueError: If an argument is out of range.

    Example:

    ```python
    optimizer = keras_natgrad.PRONG().attach(model)
    model.compile(optimizer, loss="sparse_categorical_crossentropy")
    model.fit(x, y, batch_size=50)
    ```

    References:
        - Desjardins et al., 2015, arXiv:1507.00210.
        - Benzing, 2022, arXiv:2201.12250 (the same factor, all of it damped:
          the block `"foof"`).
    """

    def __init__(
        self,
        learning_rate: Any = 0.03,
        momentum: float = 0.0,
        damping: Any = 0.1,
        relative_damping: bool = True,
        factor_decay: float = 0.95,
        curvature_update_period: int = 10,
        inverse_update_period: int = 100,
        refresh_growth: float | None = 0.15,
        weight_sharing: str = "expand",
        max_factor_size: int = 4096,
        log_statistics: bool = False,
        name: str = "prong",
        **kwargs: Any,
    ) -> None:
        settings = PRONGSettings(
            log_statistics=bool(log_statistics),
            momentum=momentum,
            damping=_damping(damping),
            relative_damping=bool(relative_damping),
            factor_decay=factor_decay,
            curvature_update_period=curvature_update_period,
            inverse_update_period=inverse_update_period,
            refresh_growth=refresh_growth,
            weight_sharing=weight_sharing,
            max_factor_size=max_factor_size,
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

    # -- The loss ----------------------------------------------------------

    @override
    def receive_choices(self, choices: Sequence[LossHead]) -> None:
        rows = [(*choice.row()[:2], _UNUSED) for choice in choices]
        self._hide("_loss_rows", rows)

    @override
    def loss_rows(self) -> list[tuple[str, str, str]]:
        return [(*row[:2], _UNUSED) for row in super().loss_rows()]

    @override
    def receive_curvature(
        self,
        tape: CurvatureTape,
        gradients: Sequence[Any],
        variables: Sequence[Any],
    ) -> None:
        outputs = tape.model_outputs
        unknown = tape.terms is None and self.attached_head() is None
        if unknown and outputs is not None:
            # A custom loop needs no head: all examples have one weight.
            tape.observe(
                [
                    OutputTerm(y, ObservedLoss(), LossWeight().coefficients(y))
                    for y in keras.tree.flatten(outputs)
                ]
            )
        super().receive_curvature(tape, gradients, variables)


_UNUSED = "not needed: G = I"


def _damping(value: Any) -> Damping:
    """Returns a float or a schedule; there is no model to adapt it to."""
    found = None if value == "auto" else get_damping(value)
    if found is not None and not found.adapts:
        return found
    raise ValueError(
        "`damping` must be a non-negative float or a "
        "keras.optimizers.schedules.LearningRateSchedule. "
        f"Received: damping={value!r}"
    )
