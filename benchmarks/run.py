"""Command line of the benchmark: tune first-order contenders, run the race.

See `benchmarks/README.md`, or `python -m benchmarks.run --help`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import table
from benchmarks.child import kfac_jax_contender
from benchmarks.methods import Method, Setting, learning_rates, parse_options
from benchmarks.runner import Budget, Run, environment, race
from benchmarks.tasks import TASKS, Task, make_task
from benchmarks.timing import Contender, KerasContender
from benchmarks.tuning import Trial, Tuner


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--task", required=True, choices=sorted(TASKS))
    add(
        "--methods",
        nargs="+",
        default=["kfac", "adam"],
        help="contenders: kfac, sgd, adam, muon, each possibly with "
        "arguments, as in kfac:learning_rate=0.1,momentum=0.9",
    )
    add("--seeds", nargs="+", type=int, default=[0])
    add("--seconds", type=float, help="training seconds of one run")
    add("--steps", type=int, help="steps of one run (of one trial, if tuning)")
    add("--target", type=float, help="value of the metric to reach")
    add("--eval-every", type=int, help="steps between evaluations")
    add("--batch-size", type=int)
    add("--l2", type=float, default=0.0, help="L2 penalty on the summed loss")
    add("--data", help="MNIST .npz; keras.datasets.mnist without it")
    add("--out", type=Path, required=True, help="JSON file to write")
    add("--tune", action="store_true", help="tune instead of racing")
    add("--tuned", type=Path, help="JSON file that --tune wrote")
    add("--keep-going", action="store_true", help="go on after the target")
    add("--jit-compile", action="store_true", help="XLA, for Keras methods")
    add("--steps-per-execution", type=int)
    add("--kfac", nargs="+", default=[], metavar="KEY=VALUE")
    add(
        "--kfac-jax-python",
        help="Python with kfac-jax: adds it as a contender (autoencoder only)",
    )
    options = parser.parse_args(arguments)
    if options.kfac_jax_python and not (
        options.data and options.task == "autoencoder"
    ):
        parser.error("--kfac-jax-python needs --task autoencoder and --data")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Tunes or races, writes the JSON file and prints the table."""
    options = parse_arguments(arguments)
    task = make_task(options.task, options.data, options.l2, options.batch_size)
    defaults = parse_options(options.kfac)
    methods = [
        Method.parse(text, defaults if text.startswith("kfac") else None)
        for text in options.methods
    ]
    if options.tune:
        tune_all(task, methods, options)
    else:
        results = race_all(task, methods, options)
        _write(options.out, results)
        print(table.markdown(results))


def make_budget(task: Task, options: argparse.Namespace) -> Budget:
    """Returns the budget of one run: the task's, unless told otherwise."""
    seconds = options.seconds
    if seconds is None and options.steps is None:
        seconds = task.seconds
    return Budget(
        target=task.target if options.target is None else options.target,
        eval_every=options.eval_every or task.eval_every,
        seconds=seconds,
        steps=options.steps,
        keep_going=options.keep_going,
    )


def race_all(
    task: Task, methods: Sequence[Method], options: argparse.Namespace
) -> dict[str, Any]:
    """Races all methods, one race a seed.

    Args:
        task: The task.
        methods: The Keras contenders.
        options: The command line.

    Returns:
        The results, ready for JSON.
    """
    budget = make_budget(task, options)
    settings = _read_settings(options.tuned, task, methods)
    records = []
    for seed in options.seeds:
        runs = []
        contenders = _contenders(task, methods, settings, seed, options)
        for contender in contenders:
            runs.append(Run(contender, seed))
        race(runs, budget)
        for run in runs:
            records.append(run.record(budget.target))
            run.contender.close()
            _report_run(records[-1])
    return {
        "task": task.name,
        "metric": task.metric,
        "target": budget.target,
        "batch_size": task.batch_size,
        "parameters": task.parameters,
        "eval_every": budget.eval_every,
        "l2": options.l2,
        "seeds": options.seeds,
        "environment": environment(),
        "runs": records,
    }


def tune_all(
    task: Task, methods: Sequence[Method], options: argparse.Namespace
) -> None:
    """Tunes the first-order methods and adds the best to the output file."""
    budget = make_budget(task, options)
    path = options.out
    tuned = json.loads(path.read_text("utf-8")) if path.exists() else {}
    for method in methods:
        if not method.first_order:
            continue
        rates = learning_rates(method, task.loss_scale)
        print(f"{task.name} {method.name}: {rates} x constant, cosine")
        tuner = Tuner(
            lambda setting, method=method: KerasContender(
                task,
                method,
                setting,
                options.seeds[0],
                options.jit_compile or "auto",
                options.steps_per_execution,
            ),
            budget.target,
            budget.eval_every,
            options.steps or task.tuning_steps,
            report=_report_trial,
        )
        best = tuner.tune(rates)
        tuned.setdefault(task.name, {})[method.name] = {
            "target": budget.target,
            "best": best.record() if best else None,
            "trials": [trial.record() for trial in tuner.trials],
        }
        _write(path, tuned)
        print(f"best: {best.record() if best else None}", flush=True)


def _contenders(
    task: Task,
    methods: Sequence[Method],
    settings: dict[str, Setting],
    seed: int,
    options: argparse.Namespace,
) -> list[Contender]:
    contenders: list[Contender] = [
        KerasContender(
            task,
            method,
            settings.get(method.name),
            seed,
            options.jit_compile or "auto",
            options.steps_per_execution,
        )
        for method in methods
    ]
    if options.kfac_jax_python:
        contenders.append(
            kfac_jax_contender(
                options.kfac_jax_python, task, seed, options.data
            )
        )
    return contenders


def _read_settings(
    path: Path | None, task: Task, methods: Sequence[Method]
) -> dict[str, Setting]:
    if path is None:
        return {}
    tuned = json.loads(path.read_text("utf-8")).get(task.name, {})
    settings = {}
    for method in methods:
        best = tuned.get(method.name, {}).get("best")
        if best:
            settings[method.name] = Setting(
                best["learning_rate"], best["horizon"]
            )
        elif method.first_order:
            print(f"{method.name} is not tuned for {task.name}: defaults used")
    return settings


def _report_trial(trial: Trial) -> None:
    record = trial.record()
    steps = record["steps_to_target"]
    print(
        f"  lr {record['learning_rate']:<8g} horizon {record['horizon']}: "
        + (f"{steps:.0f} steps" if steps else "given up")
        + f" (at {record['steps_used']}: {trial.curve.metric[-1]:.4g})",
        flush=True,
    )


def _report_run(record: dict[str, Any]) -> None:
    print(
        f"seed {record['seed']} {record['method']}: "
        f"target after {record['seconds_to_target']} s, "
        f"{record['steps_to_target']} steps; last metric "
        f"{record['curve']['metric'][-1]}",
        flush=True,
    )


def _write(path: Path, content: dict[str, Any]) -> None:
    text = json.dumps(content, indent=1, allow_nan=False, default=str)
    path.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
