"""What a wrong damping, another unit of the loss or of the inputs costs.

Each task is trained by K-FAC with default arguments, and again with the damping
started a thousand times too high and too low, with the loss multiplied by a
thousand, and, for regressions, with the features in units that spread over 10³.
All runs of a seed take turns, with the same weights and batches.

    python -m benchmarks.robustness --tasks diabetes classifier \
        --data mnist.npz --out benchmarks/results/robustness.json
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.methods import Method
from benchmarks.runner import Budget, Run, environment, race
from benchmarks.tasks import MeanSquaredErrorTask, Task, make_task
from benchmarks.timing import KerasContender

TASKS = ("ill_conditioned", "diabetes", "classifier", "autoencoder")
FACTOR = 1000.0
# Steps between evaluations, where the task's own are too coarse.
EVAL_EVERY = {"autoencoder": 5}


def variations(name: str, data: str | None) -> dict[str, tuple[Task, Method]]:
    """Returns the task and the method of every run.

    Args:
        name: The task.
        data: MNIST file, see `benchmarks.data.load_mnist`.
    """
    task = make_task(name, data)
    other_loss = copy.copy(task)
    other_loss.loss_weight = FACTOR
    found = {
        "default": (task, _kfac()),
        "damping started 1000 times too high": (task, _kfac(FACTOR)),
        "damping started 1000 times too low": (task, _kfac(1 / FACTOR)),
        "loss times 1000": (other_loss, _kfac()),
    }
    if isinstance(task, MeanSquaredErrorTask):
        # The features' order says nothing of their units.
        units = np.logspace(0, -3, task.sizes[0], dtype="float32")
        units = np.random.default_rng(0).permutation(units)
        scaled = [
            (units * np.asarray(x), np.asarray(y))
            for x, y in (task.train, task.evaluation)
        ]
        found["features spread over 10³"] = (type(task)(*scaled), _kfac())
    return found


def _kfac(factor: float = 1.0) -> Method:
    from keras_natgrad import LevenbergMarquardt

    if factor == 1.0:
        return Method("kfac", "kfac")
    usual = LevenbergMarquardt()
    damping = LevenbergMarquardt(relative=factor * usual.relative)
    return Method(f"kfac {factor:g}", "kfac", {"damping": damping})


def measure(name: str, data: str | None, seed: int) -> dict[str, Any]:
    """Returns steps and seconds to the target of every variation."""
    varied = variations(name, data)
    runs = {
        label: Run(KerasContender(task, method, seed=seed), seed)
        for label, (task, method) in varied.items()
    }
    task, _ = varied["default"]
    every = EVAL_EVERY.get(name, task.eval_every)
    race(list(runs.values()), Budget(task.target, every, seconds=task.seconds))
    reached = {
        label: run.curve.to_target(task.target) or (None, None)
        for label, run in runs.items()
    }
    for run in runs.values():
        run.contender.close()
    return {
        label: {"steps": steps, "seconds": seconds}
        for label, (steps, seconds) in reached.items()
    }


def ratios(seeds: list[dict[str, Any]], what: str) -> dict[str, float | None]:
    """Returns the mean of every variation over that of the default.

    `None` where a run did not reach the target.
    """
    found: dict[str, float | None] = {}
    for label in seeds[0]:
        values = [seed[label][what] for seed in seeds]
        usual = [seed["default"][what] for seed in seeds]
        missing = None in values or None in usual
        found[label] = (
            None
            if missing
            else statistics.mean(values) / statistics.mean(usual)
        )
    return found


def main() -> None:
    """Prints the ratios and writes the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", default=TASKS, choices=TASKS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--data", help="MNIST .npz")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    results: dict[str, Any] = {"environment": environment(), "tasks": {}}
    for name in arguments.tasks:
        seeds = [
            measure(name, arguments.data, seed) for seed in arguments.seeds
        ]
        entry = {
            "seeds": arguments.seeds,
            "runs": seeds,
            "steps_ratio": ratios(seeds, "steps"),
            "seconds_ratio": ratios(seeds, "seconds"),
        }
        results["tasks"][name] = entry
        print(name, json.dumps(entry, indent=1, ensure_ascii=False))
        if arguments.out:
            text = json.dumps(results, indent=1, ensure_ascii=False)
            arguments.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
