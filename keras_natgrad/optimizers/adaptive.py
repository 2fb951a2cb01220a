"""Optimizers with a damping, a line search and statistics of their steps."""

from __future__ import annotations

import tensorflow as tf
from typing_extensions import override

from keras_natgrad.checks import check_positive
from keras_natgrad.optimizers.base import CurvatureOptimizer
from keras_natgrad.optimizers.state import StepState
from keras_natgrad.step import Damping, LevenbergMarquardt, LineSearch


class AdaptiveOptimizer(CurvatureOptimizer):
    """Base class of the package's optimizers: settings that all of them have.

    Attributes:
        damping: `Damping`.
        fisher: How the Fisher is estimated; the names are the subclass's.
        line_search: `LineSearch`, or `None` for the learning rate alone.
        norm_constraint: Largest `δᵀFδ`, or `None`.
        log_statistics: Whether `fit` logs the statistics.
        seed: Seed of what is drawn.
        state: `StepState`, once built.
    """

    damping: Damping
    fisher: str
    line_search: LineSearch | None
    norm_constraint: float | None
    log_statistics: bool
    seed: int
    state: StepState

    @property
    def statistics(self) -> dict[str, float]:
        """What happened so far, as Python numbers.

        Damping, reduction ratio, predicted loss change, learning rate and
        momentum of the last step; counts of batches, updates of the
        statistics, refreshes of the inverses, dampings raised by a failed
        factorisation, factorisations given up, batches skipped and steps
        taken back (retracted).
        """
        state = getattr(self, "state", None)
        return {} if state is None else state.to_dict()

    def raise_damping(self, factor: float) -> None:
        """Multiplies the damping from the next step on.

        An adaptive damping goes on adapting from there. A constant or
        scheduled one keeps the factor, which is saved with the optimizer and
        multiplied by that of another call. The inverses are renewed before
        they are used again. To be called between steps.

        Args:
            factor: Positive; below one it lowers the damping.

        Raises:
            ValueError: If `factor` is not positive, or before the first step.

        Example:

        ```python
        optimizer.raise_damping(10.0)
        ```
        """
        check_positive("factor", factor)
        if getattr(self, "state", None) is None:
            raise ValueError(
                "The damping can be raised once the optimizer is built: after "
                "its first step, or `optimizer.build(model.trainable_variables)"
                f"`. Received: factor={factor!r} for {self!r}"
            )
        for variable in (self.state.damping, self.state.damping_scale):
            variable.assign(factor * variable.value)
        self.state.refresh_at.assign(0)

    @override
    def step_logs(self) -> dict[str, tf.Tensor]:
        if not self.log_statistics:
            return {}
        tensors = self.state.to_tensors()
        return {f"{self.name}_{key}": value for key, value in tensors.items()}

    @override
    @property
    def needs_objective(self) -> bool:
        return self.line_search is not None or isinstance(
            self.damping, LevenbergMarquardt
        )

    @override
    @property
    def uses_targets(self) -> bool:
        return self.fisher == "empirical"
