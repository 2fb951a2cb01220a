"""How even step times are, by where inverses are refreshed.

The same run of the autoencoder, again and again, the places alternating step by
step. The time of a step is its median over the repeats: what a machine that is
shared does to single steps goes, what the optimizer does at that step stays.
The first steps, in which everything is renewed at every step, do not count.

    python -m benchmarks.step_times --data mnist.npz --out step_times.json
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

import keras_natgrad as kng
from benchmarks.runner import environment
from benchmarks.tasks import Task, make_task

WARM_UP = 60


class Run:
    """One training run whose steps are timed one by one.

    Args:
        task: The task.
        options: Arguments of `KFAC`.
    """

    def __init__(self, task: Task, options: dict[str, Any]) -> None:
        self._task = task
        self._batches = task.batches(0)
        self.model = task.build_model(0)
        self.optimizer = kng.KFAC(**options).attach(self.model)
        self.model.compile(self.optimizer, task.loss(), jit_compile=False)
        self.model.make_train_function()
        self.seconds: list[float] = []

    def step(self) -> None:
        """Makes one step on the clock, with what is done after it."""
        x, y = next(self._batches)
        batch = iter([(tf.constant(x), tf.constant(y))])
        start = time.perf_counter()
        self.model.train_function(batch)
        self.seconds.append(time.perf_counter() - start)


def measure(
    task: Task, contenders: dict[str, dict[str, Any]], steps: int, repeats: int
) -> dict[str, Any]:
    """Returns step times of every repeat, and the last loss, by contender."""
    found: dict[str, Any] = {
        name: {"seconds": [], "metric": [], "refreshes": []}
        for name in contenders
    }
    for _ in range(repeats):
        runs = {name: Run(task, kwargs) for name, kwargs in contenders.items()}
        for _ in range(steps):
            for run in runs.values():
                run.step()
        for name, run in runs.items():
            rows = found[name]
            rows["seconds"].append(run.seconds[WARM_UP:])
            rows["metric"].append(task.evaluate(run.model))
            rows["refreshes"].append(run.optimizer.statistics["refreshes"])
    return found


def main() -> None:
    """Prints the percentiles and writes the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--places", nargs="+", default=["graph", "async"])
    parser.add_argument("--steps", type=int, default=260)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--every",
        action="store_true",
        help="statistics and quadratic model at every step",
    )
    parser.add_argument("--data", help="MNIST as .npz")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    options: dict[str, Any] = {}
    if arguments.every:
        options["curvature_update_period"] = 1
        options["quadratic_model"] = kng.QuadraticModel(period=1)
    found = measure(
        make_task("autoencoder", arguments.data),
        {
            place: {"refresh_where": place, **options}
            for place in arguments.places
        },
        arguments.steps,
        arguments.repeats,
    )
    for place, rows in found.items():
        times = 1e3 * np.median(rows["seconds"], axis=0)
        middle, high, highest = np.quantile(times, [0.5, 0.9, 0.99])
        print(
            f"{place:6} median {middle:.1f} ms, p90 / median "
            f"{high / middle:.2f}, p99 / median {highest / middle:.2f}, "
            f"metric {np.median(rows['metric']):.3f}, refreshes "
            f"{np.median(rows['refreshes']):.0f}"
        )
    if arguments.out:
        results = {
            "every": arguments.every,
            "warm_up": WARM_UP,
            "environment": environment(),
            "contenders": found,
        }
        arguments.out.write_text(json.dumps(results) + "\n")


if __name__ == "__main__":
    main()
