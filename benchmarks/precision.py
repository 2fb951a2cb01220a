"""Steps to the target of a task under every precision policy.

`KFAC()` with default arguments, per seed the same weights and batches. The
output layer is float32 under the mixed policies, as Keras's guide to mixed
precision says; with `--output-policy mixed` it is in the policy, too. The
metric is evaluated every `--every` steps.

    python -m benchmarks.precision --task autoencoder --seeds 0 1 2 \
        --data mnist.npz --out precision.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

import keras_natgrad as kng
from benchmarks.runner import environment
from benchmarks.tasks import DenseTask, make_task

POLICIES = ("float32", "mixed_float16", "mixed_bfloat16")


def build(
    task: DenseTask, policy: str, output_policy: str, seed: int
) -> keras.Model:
    """Returns the task's network under a policy."""
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        model = task.build_model(seed)
    finally:
        keras.config.set_dtype_policy(before)
    if output_policy == "float32":
        model.layers[-1].dtype_policy = keras.DTypePolicy("float32")
    return model


def steps_to_target(
    task: DenseTask,
    policy: str,
    output_policy: str,
    seed: int,
    every: int,
    most: int,
    options: dict[str, Any],
) -> int | None:
    """Returns the steps until the target, or `None`."""
    model = build(task, policy, output_policy, seed)
    optimizer = kng.KFAC(**options).attach(model)
    model.compile(optimizer, task.loss(), jit_compile=False)
    model.make_train_function()
    batches = task.batches(seed)
    for step in range(1, most + 1):
        x, y = next(batches)
        model.train_function(iter([(tf.constant(x), tf.constant(y))]))
        if step % every == 0 and task.evaluate(model) < task.target:
            return step
    return None


def main() -> None:
    """Prints the steps and writes the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", choices=["autoencoder", "classifier"])
    parser.add_argument("--policies", nargs="+", default=list(POLICIES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--steps", type=int, default=2000, help="at most")
    parser.add_argument(
        "--output-policy", choices=["float32", "mixed"], default="float32"
    )
    parser.add_argument(
        "--kfac", type=json.loads, default={}, help="arguments as JSON"
    )
    parser.add_argument("--data", help="MNIST as .npz")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    task = make_task(arguments.task, arguments.data)
    rows = {}
    for policy in arguments.policies:
        steps = [
            steps_to_target(
                task,
                policy,
                arguments.output_policy,
                seed,
                arguments.every,
                arguments.steps,
                arguments.kfac,
            )
            for seed in arguments.seeds
        ]
        rows[policy] = steps
        reached = [step for step in steps if step is not None]
        mean = np.mean(reached) if len(reached) == len(steps) else np.inf
        print(f"{policy:15} {mean:7.1f} {steps}", flush=True)
    if arguments.out:
        results = {
            "task": arguments.task,
            "output_policy": arguments.output_policy,
            "every": arguments.every,
            "seeds": arguments.seeds,
            "kfac": arguments.kfac,
            "environment": environment(),
            "steps": rows,
        }
        arguments.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
