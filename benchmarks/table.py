"""Tables and curves from the JSON files that `benchmarks.run` writes.

Usage: `python -m benchmarks.table RESULT.json... [--png curves.png]`
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Results = dict[str, Any]

COLUMNS = (
    "Method",
    "Speed-up, time",
    "Speed-up, steps",
    "Seconds to target",
    "Steps to target",
    "Step, ms",
    "Reached",
)


def summarise(results: Results) -> list[dict[str, Any]]:
    """Summarises one result file, one row a method, fastest first.

    Speed-ups are against the best first-order contender (the one with the
    smallest median time to the target): the ratio is taken seed by seed,
    between runs that took turns, and its median is shown. A run that missed
    the target counts as infinitely long.

    Args:
        results: The content of one result file.

    Returns:
        Rows with the keys `method`, `time_ratio`, `step_ratio`, `seconds`,
        `steps`, `step_seconds`, `compile_seconds`, `reached` and `runs`;
        ratios are `None` where no first-order contender reached the target.
    """
    groups: dict[str, list[dict[str, Any]]] = {}
    for run in results["runs"]:
        groups.setdefault(run["method"], []).append(run)
    reference = _reference(groups)
    rows = [
        {
            "method": method,
            "time_ratio": _ratio(reference, runs, "seconds_to_target"),
            "step_ratio": _ratio(reference, runs, "steps_to_target"),
            "seconds": _median(runs, "seconds_to_target"),
            "steps": _median(runs, "steps_to_target"),
            "step_seconds": _median(runs, "median_step_seconds"),
            "compile_seconds": _median(runs, "compile_seconds"),
            "reached": sum(r["steps_to_target"] is not None for r in runs),
            "runs": len(runs),
        }
        for method, runs in groups.items()
    ]
    return sorted(rows, key=lambda row: row["seconds"])


def markdown(results: Results) -> str:
    """Returns the table of one result file in Markdown."""
    cells = [list(COLUMNS), ["---"] + ["---:"] * (len(COLUMNS) - 1)]
    for row in summarise(results):
        cells.append(
            [
                row["method"],
                _format(row["time_ratio"], "{:.2f}×"),
                _format(row["step_ratio"], "{:.2f}×"),
                _format(row["seconds"], "{:.2f}"),
                _format(row["steps"], "{:.0f}"),
                _format(1000 * row["step_seconds"], "{:.2f}"),
                f"{row['reached']}/{row['runs']}",
            ]
        )
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "| "
        + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True))
        + " |"
        for line in cells
    ]
    title = (
        f"{results['task']}: {results['metric']} to {results['target']:g} "
        f"(batch {results['batch_size']}, {results['parameters']:,} "
        f"parameters, median of {len(results['seeds'])} seeds)"
    )
    return "\n".join([title, "", *lines])


def plot(all_results: Sequence[Results], path: str | Path) -> None:
    """Draws the metric over seconds and over steps, one row a task.

    Args:
        all_results: The contents of one or more result files.
        path: Where the image goes.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, grid = plt.subplots(
        len(all_results),
        2,
        figsize=(10, 4 * len(all_results)),
        squeeze=False,
        layout="constrained",
    )
    for results, axes in zip(all_results, grid, strict=True):
        for axis, abscissa in zip(axes, ("seconds", "steps"), strict=True):
            _draw(axis, results, abscissa)
        axes[0].legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _draw(axis, results: Results, abscissa: str) -> None:
    methods = list(dict.fromkeys(run["method"] for run in results["runs"]))
    labelled = set()
    for run in results["runs"]:
        method, curve = run["method"], run["curve"]
        axis.plot(
            curve[abscissa],
            [math.nan if m is None else m for m in curve["metric"]],
            color=f"C{methods.index(method)}",
            label=None if method in labelled else method,
            alpha=0.8,
            linewidth=1.2,
        )
        labelled.add(method)
    axis.axhline(results["target"], color="grey", linestyle=":")
    axis.set(
        xlabel=f"training {abscissa}",
        ylabel=results["metric"],
        title=results["task"],
        xscale="log",
        yscale="log",
    )


def _reference(groups: dict[str, list]) -> list[dict[str, Any]] | None:
    first_order = [
        runs
        for runs in groups.values()
        if runs[0]["settings"].get("first_order")
        and math.isfinite(_median(runs, "seconds_to_target"))
    ]
    return min(
        first_order,
        key=lambda runs: _median(runs, "seconds_to_target"),
        default=None,
    )


def _median(runs: Sequence[dict[str, Any]], key: str) -> float:
    return statistics.median(
        math.inf if run[key] is None else run[key] for run in runs
    )


def _ratio(
    reference: Sequence[dict[str, Any]] | None,
    runs: Sequence[dict[str, Any]],
    key: str,
) -> float | None:
    if reference is None:
        return None
    references = {run["seed"]: run[key] for run in reference}
    ratios = []
    for run in runs:
        ours, theirs = run[key], references.get(run["seed"])
        if ours is None:
            ratios.append(0.0)
        elif theirs is None:
            ratios.append(math.inf)
        else:
            ratios.append(theirs / ours)
    return statistics.median(ratios)


def _format(value: float | None, text: str) -> str:
    if value is None or not math.isfinite(value) or value == 0.0:
        return "–"
    return text.format(value)


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the tables of result files and draws their curves."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument("--png", type=Path, help="where to draw the curves")
    options = parser.parse_args(arguments)
    all_results = [
        json.loads(path.read_text(encoding="utf-8")) for path in options.results
    ]
    print("\n\n".join(markdown(results) for results in all_results))
    if options.png:
        plot(all_results, options.png)


if __name__ == "__main__":
    main()
