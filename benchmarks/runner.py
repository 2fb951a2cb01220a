"""The race: contenders advance in turn until each reaches the target."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import platform
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.curve import Curve
from benchmarks.timing import Contender

PACKAGES = ("keras", "tensorflow", "keras_natgrad", "numpy")


@dataclasses.dataclass(frozen=True)
class Budget:
    """When a training run stops.

    Attributes:
        target: Value of the metric at which a run is done.
        eval_every: Steps between two evaluations.
        seconds: Training seconds after which a run stops, or `None`.
        steps: Steps after which a run stops, or `None`.
        keep_going: Whether to go on after the target is reached.
    """

    target: float
    eval_every: int
    seconds: float | None = None
    steps: int | None = None
    keep_going: bool = False


class Run:
    """One contender's run with its measurements.

    Args:
        contender: The contender.
        seed: The seed of its weights and batches, for the record.
    """

    def __init__(self, contender: Contender, seed: int = 0) -> None:
        self.contender = contender
        self.seed = seed
        self.seconds = 0.0
        self.step_seconds: list[float] = []
        self.curve = Curve()
        self.curve.append(0, 0.0, contender.evaluate())

    def advance(self, steps: int) -> None:
        """Trains some steps on the clock, then evaluates off the clock."""
        elapsed = self.contender.advance(steps)
        self.seconds += elapsed
        self.step_seconds.append(elapsed / steps)
        self.curve.append(
            self.contender.step, self.seconds, self.contender.evaluate()
        )

    def done(self, budget: Budget) -> bool:
        """Whether the run reached the target, its budget or diverged."""
        step, limit = self.contender.step, self.contender.limit
        return (
            self.curve.diverged
            or (self.curve.reached(budget.target) and not budget.keep_going)
            or (budget.steps is not None and step >= budget.steps)
            or (budget.seconds is not None and self.seconds >= budget.seconds)
            or (limit is not None and step >= limit)
        )

    def record(self, target: float) -> dict[str, Any]:
        """Returns the measurements as plain data for JSON."""
        steps, seconds = self.curve.to_target(target) or (None, None)
        return {
            "method": self.contender.name,
            "seed": self.seed,
            "settings": self.contender.settings,
            "steps_to_target": steps,
            "seconds_to_target": seconds,
            "median_step_seconds": statistics.median(self.step_seconds or [0]),
            "compile_seconds": self.contender.compile_seconds,
            "diverged": self.curve.diverged,
            "curve": self.curve.record(),
        }


def race(runs: Sequence[Run], budget: Budget) -> None:
    """Advances all runs in turn, `budget.eval_every` steps at a time.

    Only one contender computes at any moment, and the order is reversed
    after every round: what else the machine does meets all alike.

    Args:
        runs: The runs, one a contender.
        budget: When each of them stops.
    """
    active = list(runs)
    while active:
        for run in active:
            run.advance(budget.eval_every)
        active = [run for run in reversed(active) if not run.done(budget)]


def environment(packages: Iterable[str] = PACKAGES) -> dict[str, Any]:
    """Describes software and processor for the record."""
    versions = {}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        **versions,
    }
