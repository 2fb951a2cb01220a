"""Relative natural gradient descent: every layer with a metric of its own."""

from __future__ import annotations

import dataclasses
from typing import Any

import keras
from typing_extensions import override

from keras_natgrad.checks import (
    check_fraction,
    check_period,
    check_positive,
    is_number,
)
from keras_natgrad.curvature import BlockDiagonal
from keras_natgrad.optimizers.base import CurvatureOptimizer
from keras_natgrad.optimizers.engine import Parts
from keras_natgrad.optimizers.refreshing import RefreshingFirst
from keras_natgrad.optimizers.settings import Settings
from keras_natgrad.relative import (
    SHARED_METRICS,
    HorizonOptions,
    MetricSpec,
    RelativeDirection,
    RelativeOptions,
    ResponseOptions,
)
from keras_natgrad.step import ConstantDamping, FixedStep, Refresh

# Damping of `"auto"` where a layer is measured by a response further on.
_FAR_DAMPING = 1e-2


@dataclasses.dataclass(frozen=True)
class RNGDSettings(Settings):
    """The arguments of `RNGD`, checked; see there."""

    damping: float = 0.0
    relative_damping: float = 1e-4
    horizon: int | str = 1
    ends: str = "metric"
    metric_decay: float = 0.95
    metric_update_period: int = 10
    inverse_update_period: int = 100
    refresh_growth: float | None = 0.15
    identity_start: bool = False
    softness: float = 1.0
    noise_scale: float = 1.0
    other_response: str | None = "gaussian"
    max_metric_elements: int = 2**20
    shared: str = "groups"
    momentum: float = 0.0

    def __post_init__(self) -> None:
        check_fraction("metric_decay", self.metric_decay)
        check_period("metric_update_period", self.metric_update_period)
        check_positive("max_metric_elements", self.max_metric_elements)
        if self.shared not in SHARED_METRICS:
            raise ValueError(
                f"`shared` must be one of {SHARED_METRICS}. "
                f"Received: shared={self.shared!r}"
            )
        check_fraction("momentum", self.momentum)

    def parts(self) -> Parts:
        """Returns the parts of the engine."""
        periods = Refresh(
            self.metric_update_period,
            self.inverse_update_period,
            self.refresh_growth,
        )
        responses = ResponseOptions(
            self.softness, self.noise_scale, self.other_response
        )
        options = RelativeOptions(
            HorizonOptions(self.horizon, self.ends, responses),
            self.relative_damping,
            self.max_metric_elements,
            self.shared,
            self.identity_start,
        )
        return Parts(
            direction=RelativeDirection(
                options, float(self.metric_decay), periods
            ),
            rule=FixedStep(float(self.momentum)),
            damping=ConstantDamping(self.damping),
            refreshing=RefreshingFirst(periods, self.identity_start),
        )


@keras.saving.register_keras_serializable(package="keras_natgrad")
class RNGD(CurvatureOptimizer):
    r"""Relative natural gradient descent (Sun & Nielsen 2017).

    A layer is treated as a system of its own: given its input x̃, how do its
    weights change the distribution of its response? That Fisher information,
    the relative one, has a closed form,

        g = V(z) ⊗ x̃ x̃ᵀ,    V = diag(ν(z_1), …, ν(z_m)),

    with one `[n, n]` block per unit where the units respond independently,
    and `diag(η) − η ηᵀ` for a softmax. Its mean M over the batches seen is
    kept, and every so many steps inverted, block by block:

        W ← W − α (M + (λ + ρ tr M) I)⁻¹ ∇_W.

    The layers that make the model's output respond with the distribution of
    the loss, so that theirs is the block of the ordinary Fisher. Variables
    outside captured layers follow their gradient. L2 penalties are those of
    the model (`kernel_regularizer`); they enter the gradient alone.

    The optimizer must see the layers: attach it to the model. What follows a
    layer is known in sequential and functional models; in a subclassed one,
    and in a model inside a model, every layer responds through its own
    activation.

    Args:
        learning_rate: α: a float, a
            `keras.optimizers.schedules.LearningRateSchedule` or a callable.
            Defaults to `0.01`.
        damping: λ, non-negative, or `"auto"`: 0 for `horizon=1`, else 0.01,
            because the Fisher of the model's output vanishes where the model
            becomes sure of its answers, and the relative damping with it.
            Defaults to `"auto"`.
        relative_damping: ρ, non-negative. Defaults to `1e-4`.
        horizon: Whose response a layer is measured by: `1` for its own, `2`
            for that of the next Dense layer, and so on, the model's output
            where that is nearer. `"full"` for the model's output, which gives
            the exact diagonal blocks of the Fisher. Defaults to `1`.
        ends: `"metric"`, or `"inputs"` to give the first and the last layer
            the plain second moment of their inputs. Defaults to `"metric"`.
        metric_decay: Decay of the running averages, in [0, 1). Defaults to
            `0.95`.
        metric_update_period: Steps between updates of the averages. Defaults
            to `10`.
        inverse_update_period: Steps between inversions. Defaults to `100`.
        refresh_growth: Warm-up of both periods: the gap after step t is at
            most `refresh_growth · t` steps. `None` for no warm-up. Defaults
            to `0.15`.
        identity_start: Whether the averages start at the identity, and so the
            training at gradient descent. Otherwise they start at the first
            batch. Defaults to `False`.
        softness: ω of the softened rectifiers, see
            `blocks.relative.relu_information`. Defaults to `1.0`.
        noise_scale: σ of the units with Gaussian noise. Defaults to `1.0`.
        other_response: Distribution, with the activation as its mean, of
            units whose activation has no closed form: `"gaussian"`,
            `"bernoulli"`, `"poisson"`, or `None` to refuse them. Defaults to
            `"gaussian"`.
        max_metric_elements: Bound for the metric of one layer. Above it,
            coupled units keep their own blocks only, and above that units
            share what `shared` says; see `summary()`. Defaults to `2**20`.
        shared: `"groups"`: groups of units share the mean of their metrics.
            `"eigen"`: all units of the layer share its eigenvectors, and
            each has eigenvalues of its own. Defaults to `"groups"`.
        momentum: μ of `δ = −α M⁻¹∇ + μ δ₋₁`, in [0, 1). Defaults to `0.0`.
        log_statistics: Whether `fit` logs `statistics` beside the metrics.
        name: Name of the optimizer.
        **kwargs: Further arguments of `keras.optimizers.Optimizer`.

    Raises:
        ValueError: If an argument is out of range; at the first step, if an
            activation has no information, or if what a horizon of two or more
            looks at is no chain of Dense layers.

    Example:

    ```python
    optimizer = keras_natgrad.RNGD(0.01).attach(model)
    model.compile(optimizer, loss="sparse_categorical_crossentropy")
    model.fit(x, y, batch_size=50)
    ```

    The setting of the authors' experiments:

    ```python
    keras_natgrad.RNGD(
        0.01,
        ends="inputs",
        metric_decay=0.995,
        metric_update_period=1,
        refresh_growth=None,
        identity_start=True,
    )
    ```

    References:
        - Sun & Nielsen, 2017, arXiv:1606.06069.
    """

    def __init__(
        self,
        learning_rate: Any = 0.01,
        damping: float | str = "auto",
        relative_damping: float = 1e-4,
        horizon: int | str = 1,
        ends: str = "metric",
        metric_decay: float = 0.95,
        metric_update_period: int = 10,
        inverse_update_period: int = 100,
        refresh_growth: float | None = 0.15,
        identity_start: bool = False,
        softness: float = 1.0,
        noise_scale: float = 1.0,
        other_response: str | None = "gaussian",
        max_metric_elements: int = 2**20,
        shared: str = "groups",
        momentum: float = 0.0,
        log_statistics: bool = False,
        name: str = "rngd",
        **kwargs: Any,
    ) -> None:
        if damping == "auto":
            damping = 0.0 if horizon == 1 else _FAR_DAMPING
        settings = RNGDSettings(
            log_statistics=bool(log_statistics),
            damping=_check_damping("damping", damping),
            relative_damping=_check_damping(
                "relative_damping", relative_damping
            ),
            horizon=horizon,
            ends=ends,
            metric_decay=metric_decay,
            metric_update_period=metric_update_period,
            inverse_update_period=inverse_update_period,
            refresh_growth=refresh_growth,
            identity_start=bool(identity_start),
            softness=softness,
            noise_scale=noise_scale,
            other_response=other_response,
            max_metric_elements=max_metric_elements,
            shared=shared,
            momentum=momentum,
        )
        super().__init__(
            learning_rate, settings, settings.parts(), name=name, **kwargs
        )

    @property
    def curvature(self) -> BlockDiagonal:
        """The blocks of the network, once built."""
        return self._direction.blocks

    @property
    def _direction(self) -> RelativeDirection:
        direction = self.engine.direction
        assert isinstance(direction, RelativeDirection)
        return direction

    # -- Saving ----------------------------------------------------------

    @override
    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        specs = self._direction.specs
        if specs is not None:
            config["metrics"] = [spec.get_config() for spec in specs]
        return config

    @override
    @classmethod
    def from_config(
        cls, config: dict[str, Any], custom_objects: Any = None
    ) -> Any:
        config = dict(config)
        metrics = config.pop("metrics", None)
        optimizer = super().from_config(config, custom_objects=custom_objects)
        if metrics is not None:
            specs = [MetricSpec(**spec) for spec in metrics]
            optimizer._direction.specs = specs
        return optimizer


def _check_damping(name: str, value: Any) -> float:
    if is_number(value) and value >= 0:
        return float(value)
    also = " or 'auto'" if name == "damping" else ""
    raise ValueError(
        f"`{name}` must be a non-negative float{also}. "
        f"Received: {name}={value!r}"
    )
