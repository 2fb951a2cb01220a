"""The direction of RNGD: the metric of every layer's own response."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import tensorflow as tf
from typing_extensions import override

from keras_natgrad.capture import Plan, match_layers
from keras_natgrad.curvature import (
    BlockCurvature,
    BlockDiagonal,
    BlockOptions,
    CapturedPass,
    CurvatureOptions,
)
from keras_natgrad.relative.curvature import (
    MetricSpec,
    RelativeCurvature,
    plan_metrics,
)
from keras_natgrad.relative.sources import HorizonOptions, find_sources
from keras_natgrad.step import QuadraticModel, Refresh


@dataclass(frozen=True)
class RelativeOptions:
    """What the metrics are made of.

    Attributes:
        horizon: `HorizonOptions`.
        relative_damping: ρ, in units of each metric's trace.
        max_metric_elements: Bound for the metric of one layer.
        shared: What units above the bound share, one of `SHARED_METRICS`.
        identity_start: Whether the averages start at the identity.
    """

    horizon: HorizonOptions
    relative_damping: float
    max_metric_elements: int
    shared: str
    identity_start: bool


class RelativeDirection(BlockCurvature):
    """Preconditions layer by layer, with the metrics of RNGD.

    Args:
        relative: `RelativeOptions`.
        decay: Decay of the running averages.
        periods: `Refresh`.

    Attributes:
        specs: `MetricSpec` of every layer, once the model has been seen.
    """

    specs: list[MetricSpec] | None = None

    def __init__(
        self, relative: RelativeOptions, decay: float, periods: Refresh
    ) -> None:
        options = CurvatureOptions(
            "exact", decay, periods, QuadraticModel("exact")
        )
        super().__init__(BlockOptions(), options, "no metric of its own")
        self.relative = relative
        self._sources: Any = None

    @override
    def attach(self, model: Any, plan: Plan, variables: Sequence[Any]) -> None:
        layers = [layer for layer, _ in match_layers(plan, model, variables)]
        self._sources = find_sources(model, layers, self.relative.horizon)

    @override
    def make_blocks(
        self, plan: Plan, shapes: Sequence[tuple[int, ...]]
    ) -> BlockDiagonal:
        if self._sources is not None:
            self.specs = plan_metrics(
                plan,
                self._sources,
                self.relative.max_metric_elements,
                self.relative.shared,
            )
        assert self.specs is not None
        return RelativeCurvature(
            plan,
            shapes,
            self.specs,
            self.relative.relative_damping,
            self.relative.identity_start,
        )

    @override
    def statistics(
        self, captured: CapturedPass, observation: Any, seed: tf.Tensor
    ) -> Any:
        assert isinstance(self.blocks, RelativeCurvature)
        return self.blocks.relative_statistics(
            captured,
            self._sources,
            observation.tape.taps,
            seed,
        )
