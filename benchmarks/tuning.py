"""Tuning of a first-order contender: fewest steps to the target.

Steps do not depend on how busy the machine is, so the tuner ranks by them.
All points of a round advance together and the round ends when the first of
them reaches the target: that one needs the fewest steps, and no point costs
more. A point is given up when it diverges or falls far behind: after `s`
steps its metric is worse than the leader's after `s / 3`.

The first round compares constant learning rates. Cosine rounds follow, with
the best learning rate, the next smaller one and the two next larger ones. The
first cosine ends at three quarters of the steps of the best constant rate; as
long as the target is reached, the next ends at three quarters of the steps
that this took. After the first failure one cosine as long as the best run so
far ends the search.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.curve import Curve, finite_or_none
from benchmarks.methods import Setting
from benchmarks.timing import Contender

SHRINK = 0.75
"""Horizon of a cosine round over the steps that the best point took."""

COSINE_ROUNDS = 3
BEHIND = 3
"""A point is given up when it is this many times slower than the leader."""

PATIENCE = 20
"""Evaluations before a point with a constant rate may be given up. A cosine
makes up late for what it loses early, so it has half its horizon instead."""


@dataclasses.dataclass
class Trial:
    """One point of the grid.

    Attributes:
        setting: Learning rate and schedule.
        curve: Its metric over the steps.
        steps: Steps to the target, or `None` if it was not reached.
    """

    setting: Setting
    curve: Curve
    steps: float | None = None

    def record(self) -> dict[str, Any]:
        """Returns plain data for JSON."""
        return {
            **dataclasses.asdict(self.setting),
            "steps_to_target": self.steps,
            "steps_used": self.curve.steps[-1],
            "last_metric": finite_or_none(self.curve.metric[-1]),
        }


class Tuner:
    """Searches learning rates and schedules for one optimizer.

    Args:
        make_contender: Makes a fresh contender with a setting.
        target: Value of the metric to reach.
        eval_every: Steps between two evaluations.
        max_steps: Step budget of a point while none reached the target.
        report: Called with every finished trial.

    Attributes:
        trials: All trials, in order.
    """

    def __init__(
        self,
        make_contender: Callable[[Setting], Contender],
        target: float,
        eval_every: int,
        max_steps: int,
        report: Callable[[Trial], None] | None = None,
    ) -> None:
        self.trials: list[Trial] = []
        self._make_contender = make_contender
        self._target = target
        self._eval_every = eval_every
        self._max_steps = max_steps
        self._report = report or (lambda trial: None)

    @property
    def best(self) -> Trial | None:
        """The trial with the fewest steps to the target."""
        reached = [trial for trial in self.trials if trial.steps is not None]
        return min(reached, key=lambda trial: trial.steps, default=None)

    def tune(self, learning_rates: Sequence[float]) -> Trial | None:
        """Tries constant learning rates, then cosines.

        Args:
            learning_rates: The grid.

        Returns:
            The best trial, or `None` if no point reached the target.
        """
        self.round([Setting(rate) for rate in learning_rates])
        rates = self._cosine_rates(learning_rates)
        for _ in range(COSINE_ROUNDS):
            longest = self.best.steps if self.best else self._max_steps
            if self._cosine_round(rates, SHRINK * longest) is None:
                self._cosine_round(rates, longest)
                break
        return self.best

    def round(self, settings: Sequence[Setting]) -> Trial | None:
        """Advances several points together until the first is there.

        Args:
            settings: The points.

        Returns:
            The trial with the fewest steps to the target, or `None` if none
            reached it in fewer steps than the best trial before.
        """
        limit = self.best.steps if self.best else self._max_steps
        racers = {}
        for setting in settings:
            contender = self._make_contender(setting)
            trial = Trial(setting, Curve())
            trial.curve.append(0, 0.0, contender.evaluate())
            racers[setting] = (contender, trial)
        active = list(racers.values())
        while active and not any(trial.steps for _, trial in active):
            for contender, trial in active:
                self._advance(contender, trial)
            leader = min((t.curve for _, t in active), key=_last_metric)
            active = [
                (contender, trial)
                for contender, trial in active
                if not trial.curve.diverged
                and not self._behind(trial, leader)
                and contender.step < min(limit, contender.limit or limit)
                or trial.steps
            ]
        return self._finish(list(racers.values()))

    def _advance(self, contender: Contender, trial: Trial) -> None:
        seconds = contender.advance(self._eval_every)
        trial.curve.append(
            contender.step,
            trial.curve.seconds[-1] + seconds,
            contender.evaluate(),
        )
        reached = trial.curve.to_target(self._target)
        trial.steps = reached[0] if reached else None

    def _behind(self, trial: Trial, leader: Curve) -> bool:
        step, metric = trial.curve.steps[-1], trial.curve.metric[-1]
        patience = PATIENCE * self._eval_every
        if trial.setting.horizon is not None:
            patience = trial.setting.horizon / 2
        return step >= patience and metric > leader.at(step / BEHIND)

    def _finish(
        self, racers: Sequence[tuple[Contender, Trial]]
    ) -> Trial | None:
        before = self.best
        for contender, trial in racers:
            contender.close()
            self.trials.append(trial)
            self._report(trial)
        return None if self.best is before else self.best

    def _cosine_round(
        self, rates: Sequence[float], steps: float
    ) -> Trial | None:
        calls = max(1, round(steps / self._eval_every))
        horizon = calls * self._eval_every
        return self.round([Setting(rate, horizon) for rate in rates])

    def _cosine_rates(self, learning_rates: Sequence[float]) -> list[float]:
        ascending = sorted(learning_rates)
        closest = min(self.trials, key=lambda t: _last_metric(t.curve))
        leader = self.best or closest
        place = ascending.index(leader.setting.learning_rate)
        diverged = {
            trial.setting.learning_rate
            for trial in self.trials
            if trial.curve.diverged
        }
        near = ascending[max(0, place - 1) : place + 3]
        return [rate for rate in near if rate not in diverged]


def _last_metric(curve: Curve) -> float:
    value = curve.metric[-1]
    return value if math.isfinite(value) else math.inf
