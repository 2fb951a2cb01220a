"""K-FAC in the TensorFlow Model Garden (`tf-models-official`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from official.modeling.optimization import optimizer_factory
from official.modeling.optimization.configs import (
    optimization_config,
    optimizer_config,
)

from keras_natgrad.heads import Head
from keras_natgrad.integrations.tf_keras import KFAC

#: Name of the optimizer in configurations.
KEY = "kfac"


@dataclasses.dataclass
class KFACConfig(optimizer_config.BaseOptimizerConfig):
    """Configuration of `integrations.tf_keras.KFAC`.

    Attributes:
        name: Name of the optimizer.
        automatic: Whether the configured learning rate multiplies the automatic
            one. Defaults to `True`: a constant 1 means K-FAC with its defaults,
            and a schedule makes a warm-up or a decay.
        momentum: A float, or `None` for the automatic one.
        damping: A float, or `None` to set it from the first batch.
        fisher: See `keras_natgrad.KFAC`, also for the following ones.
        factor_decay: Likewise.
        curvature_update_period: Likewise.
        inverse_update_period: Likewise.
        norm_constraint: Likewise.
        block: Likewise, by name.
        weight_sharing: Likewise, by name.
        max_factor_size: Likewise.
        fallback: Likewise.
        seed: Likewise.
        weight_decay: Decoupled weight decay, or `None`.
    """

    name: str = "KFAC"
    automatic: bool = True
    momentum: float | None = None
    damping: float | None = None
    fisher: str = "propagated"
    factor_decay: float = 0.95
    curvature_update_period: int = 10
    inverse_update_period: int = 50
    norm_constraint: float | None = None
    block: str = "auto"
    weight_sharing: str = "expand"
    max_factor_size: int = 4096
    fallback: str = "auto"
    seed: int = 0
    weight_decay: float | None = None


@dataclasses.dataclass
class OptimizerConfig(optimization_config.OptimizerConfig):
    """The garden's optimizers, and `kfac`.

    Attributes:
        kfac: `KFACConfig`.
    """

    kfac: KFACConfig = dataclasses.field(default_factory=KFACConfig)


@dataclasses.dataclass
class OptimizationConfig(optimization_config.OptimizationConfig):
    """The garden's `OptimizationConfig`, with `kfac` among the optimizers.

    Attributes:
        optimizer: `OptimizerConfig`.
    """

    optimizer: OptimizerConfig = dataclasses.field(
        default_factory=OptimizerConfig
    )


def register() -> None:
    """Registers `kfac` with the garden's optimizer factory.

    Calling it again is harmless.
    """
    for legacy, known in (
        (True, optimizer_factory.LEGACY_OPTIMIZERS_CLS),
        (False, optimizer_factory.NEW_OPTIMIZERS_CLS),
    ):
        if KEY not in known:
            optimizer_factory.register_optimizer_cls(KEY, _build, legacy)


def _build(**config: Any) -> KFAC:
    """Returns the optimizer of a `KFACConfig`; `None` means the default."""
    unknown = {"gradient_aggregator", "gradient_transformers"} & set(config)
    if any(config[name] for name in unknown):
        raise ValueError(
            "KFAC does not take functions that change gradients. "
            f"Received: {sorted(unknown)}"
        )
    return KFAC(
        **{
            name: value
            for name, value in config.items()
            if value is not None and name not in unknown
        }
    )


class KFACTask:
    """Mixin for a garden `Task` that attaches K-FAC to its model.

    The task keeps its own `train_step`, losses and metrics. With another
    optimizer in the configuration the mixin does nothing. An example is in
    docs/model_garden.md.
    """

    #: Layers that are not captured; see `KFAC.attach`.
    excluded_layers: Sequence[Any] = ()

    def build_head(self) -> Head | Any:
        """Returns the head whose mean `−log p` is the task's loss.

        It is a list or dictionary of heads if the model has several outputs.
        """
        raise NotImplementedError(
            f"{type(self).__name__} must say what distribution the outputs of "
            "its model parametrise: implement `build_head`."
        )

    def train_step(
        self, inputs: Any, model: Any, optimizer: Any, metrics: Any = None
    ) -> Any:
        """Makes the task's own step, with the optimizer attached.

        Raises:
            ValueError: If the optimizer is wrapped for loss scaling.
        """
        if isinstance(getattr(optimizer, "inner_optimizer", None), KFAC):
            raise ValueError(
                "KFAC does not work with loss scaling. Train in float32. "
                f"Received: optimizer={type(optimizer).__name__}"
            )
        if isinstance(optimizer, KFAC):
            optimizer.attach(model, self.build_head(), self.excluded_layers)
        step = super().train_step  # type: ignore[misc]
        return step(inputs, model, optimizer, metrics)
