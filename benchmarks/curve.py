"""What one training run leaves: the metric over steps and seconds."""

from __future__ import annotations

import dataclasses
import math


def finite_or_none(value: float) -> float | None:
    """Returns the value, or `None` in place of an infinity or a NaN."""
    return value if math.isfinite(value) else None


@dataclasses.dataclass
class Curve:
    """The metric over steps and training seconds.

    Attributes:
        steps: Steps done at every evaluation.
        seconds: Training seconds at every evaluation.
        metric: The metric at every evaluation. Lower is better.
    """

    steps: list[int] = dataclasses.field(default_factory=list)
    seconds: list[float] = dataclasses.field(default_factory=list)
    metric: list[float] = dataclasses.field(default_factory=list)

    def append(self, step: int, seconds: float, metric: float) -> None:
        """Adds one evaluation."""
        self.steps.append(step)
        self.seconds.append(seconds)
        self.metric.append(metric)

    def record(self) -> dict[str, list]:
        """Returns plain data for JSON, where `null` is a metric not finite."""
        return {
            "steps": self.steps,
            "seconds": self.seconds,
            "metric": [finite_or_none(value) for value in self.metric],
        }

    @property
    def diverged(self) -> bool:
        """Whether the last metric is no finite number."""
        return bool(self.metric) and not math.isfinite(self.metric[-1])

    def reached(self, target: float) -> bool:
        """Whether some evaluation was at or under the target."""
        return any(value <= target for value in self.metric)

    def to_target(self, target: float) -> tuple[float, float] | None:
        """Returns steps and seconds at which the target is first reached.

        Between the evaluation before and the evaluation at the target the
        curve is taken as a straight line.

        Args:
            target: The value to reach.

        Returns:
            `(steps, seconds)`, or `None` if the target was not reached.
        """
        for i, value in enumerate(self.metric):
            if not value <= target:
                continue
            if i == 0:
                return float(self.steps[0]), self.seconds[0]
            before = self.metric[i - 1]
            part = (before - target) / (before - value)
            return (
                self.steps[i - 1] + part * (self.steps[i] - self.steps[i - 1]),
                self.seconds[i - 1]
                + part * (self.seconds[i] - self.seconds[i - 1]),
            )
        return None

    def at(self, step: float) -> float:
        """Returns the metric of the last evaluation not after a step."""
        value = math.inf
        for other, metric in zip(self.steps, self.metric, strict=True):
            if other > step:
                break
            value = metric
        return value
