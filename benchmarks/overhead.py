"""Time of one training step of every contender, and ratios.

Usage: `python -m benchmarks.overhead --task autoencoder --methods sgd adam
kfac --out overhead.json`; more in `benchmarks/README.md`.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.child import kfac_jax_contender
from benchmarks.methods import Method
from benchmarks.runner import environment
from benchmarks.tasks import TASKS, make_task
from benchmarks.timing import Contender, KerasContender


def measure(
    contenders: Sequence[Contender], repeats: int, steps: int
) -> list[dict[str, Any]]:
    """Measures step times in alternating repeats.

    One measurement is the mean over `steps` consecutive steps, so that it
    holds its share of what a method does only now and then: `steps` should
    be a multiple of the longest period. The first repeat is not counted.

    Args:
        contenders: The contenders; ratios are to the first of them.
        repeats: Counted measurements of each contender.
        steps: Steps of one measurement.

    Returns:
        One row a contender, with the keys `method`, `median_step_seconds`,
        `ratio` (median of the ratios within a repeat), `step_seconds` (all
        measurements) and `compile_seconds`.
    """
    times: list[list[float]] = [[] for _ in contenders]
    for repeat in range(repeats + 1):
        order = range(len(contenders))
        for i in order if repeat % 2 else reversed(order):
            seconds = contenders[i].advance(steps) / steps
            if repeat:
                times[i].append(seconds)
    return [
        {
            "method": contender.name,
            "median_step_seconds": statistics.median(own),
            "ratio": statistics.median(
                a / b for a, b in zip(own, times[0], strict=True)
            ),
            "step_seconds": own,
            "compile_seconds": contender.compile_seconds,
        }
        for contender, own in zip(contenders, times, strict=True)
    ]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Returns the rows as a Markdown table, ratios first."""
    lines = [
        f"| Method | Step / {rows[0]['method']} | Step, ms | Compile, s |",
        "| --- | ---: | ---: | ---: |",
    ]
    for row in rows:
        lines.append(
            f"| {row['method']} | {row['ratio']:.2f}× | "
            f"{1000 * row['median_step_seconds']:.2f} | "
            f"{row['compile_seconds']:.1f} |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints the table and writes the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--task", default="autoencoder", choices=sorted(TASKS))
    add("--methods", nargs="+", default=["sgd", "adam", "kfac"])
    add("--repeats", type=int, default=5)
    add("--steps", type=int, default=100)
    add("--batch-size", type=int)
    add("--data", help="MNIST .npz; keras.datasets.mnist without it")
    add("--jit-compile", action="store_true", help="XLA, for Keras methods")
    add("--kfac-jax-python", help="Python with kfac-jax (autoencoder only)")
    add("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    if options.kfac_jax_python and not (
        options.data and options.task == "autoencoder"
    ):
        parser.error("--kfac-jax-python needs --task autoencoder and --data")
    task = make_task(options.task, options.data, batch_size=options.batch_size)
    contenders: list[Contender] = [
        KerasContender(
            task,
            Method.parse(text),
            jit_compile=options.jit_compile or "auto",
        )
        for text in options.methods
    ]
    if options.kfac_jax_python:
        contenders.append(
            kfac_jax_contender(options.kfac_jax_python, task, 0, options.data)
        )
    rows = measure(contenders, options.repeats, options.steps)
    for contender in contenders:
        contender.close()
    print(table(rows))
    results = {
        "task": task.name,
        "batch_size": task.batch_size,
        "steps": options.steps,
        "environment": environment(),
        "rows": rows,
    }
    options.out.write_text(json.dumps(results, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
