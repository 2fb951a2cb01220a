"""The first call of `fit`: seconds, nodes of the graph, and memory.

K-FAC with default arguments and Adam take turns in one process, each time with
a new model and a new optimizer; `fit` makes one step, in graph mode. The ratios
are those of the medians. The nodes are counted in the graph of one training
step, its functions included. The peak memory of a first call is measured in a
process of its own.

    python -m benchmarks.startup --out benchmarks/results/startup.json
    python -m benchmarks.startup --only classifier --repeats 1 --out /tmp/s.json
    python -m benchmarks.startup --table
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "startup.json"
METHODS = ("kfac", "adam")


def classifier() -> tuple[Any, int]:
    """784-80-80-80-10, batch 500."""
    import keras

    hidden = [keras.layers.Dense(80, activation="relu") for _ in range(3)]
    layers = [keras.Input((784,)), *hidden, keras.layers.Dense(10)]
    return keras.Sequential(layers), 500


def transformer() -> tuple[Any, int]:
    """Two blocks of width 64, 64 characters, batch 32."""
    from benchmarks.transformer import build_transformer

    return build_transformer(100, 64, 0), 32


def resnet20() -> tuple[Any, int]:
    """ResNet-20 with 16, 32 and 64 channels on 28 pixels, batch 128."""
    from benchmarks.resnet import build_resnet

    return build_resnet(28, 10, 0), 128


def mobilenet() -> tuple[Any, int]:
    """MobileNetV2 on 64 pixels, batch 8."""
    import keras

    make = keras.applications.MobileNetV2
    kwargs = {"weights": None, "classes": 10, "classifier_activation": None}
    return make(input_shape=(64, 64, 3), **kwargs), 8


MODELS: dict[str, Callable[[], tuple[Any, int]]] = {
    "classifier": classifier,
    "transformer": transformer,
    "resnet20": resnet20,
    "mobilenet": mobilenet,
}


def prepare(name: str, method: str) -> tuple[Any, Any, Any]:
    """Returns a compiled model and one batch of random data."""
    import keras
    import numpy as np

    import keras_natgrad as kng

    keras.utils.clear_session()
    keras.utils.set_random_seed(0)
    model, batch = MODELS[name]()
    optimizer = keras.optimizers.Adam(1e-3)
    if method == "kfac":
        optimizer = kng.KFAC().attach(model)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss)
    generator = np.random.default_rng(0)
    shape = (batch, *model.input_shape[1:])
    if name == "transformer":
        x = generator.integers(0, 100, (batch, 64))
        return model, x, generator.integers(0, 100, (batch, 64))
    x = generator.normal(size=shape).astype("float32")
    return model, x, generator.integers(0, 10, batch)


def first_call(name: str, method: str) -> dict[str, Any]:
    """Times the first call of `fit`, and one later step."""
    model, x, y = prepare(name, method)
    start = time.perf_counter()
    model.fit(x, y, batch_size=len(x), verbose=0)
    seconds = time.perf_counter() - start
    start = time.perf_counter()
    model.fit(x, y, batch_size=len(x), verbose=0)
    return {"first": seconds, "second": time.perf_counter() - start}


def nodes(name: str, method: str) -> int:
    """Counts the nodes of the graph of one training step."""
    import tensorflow as tf

    model, x, y = prepare(name, method)
    model.optimizer.build(model.trainable_variables)
    step = tf.function(model.train_step, autograph=False)
    data = (tf.constant(x), tf.constant(y))
    graph = step.get_concrete_function(data).graph.as_graph_def()
    inner = sum(len(each.node_def) for each in graph.library.function)
    return len(graph.node) + inner


def peak(name: str, method: str) -> int:
    """Returns the peak memory of this process after a first call, in bytes."""
    first_call(name, method)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def peak_in_child(name: str, method: str) -> int:
    """Measures the peak memory in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.startup", "--peak", name, method],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    return int(done.stdout.split()[-1])


def measure(name: str, repeats: int) -> dict[str, Any]:
    """Returns everything about one model."""
    calls: dict[str, list[dict[str, Any]]] = {each: [] for each in METHODS}
    for _ in range(repeats):
        for method in METHODS:
            calls[method].append(first_call(name, method))
            print(name, method, calls[method][-1], file=sys.stderr, flush=True)
    found: dict[str, Any] = {}
    for method in METHODS:
        found[method] = {
            "calls": calls[method],
            "seconds": statistics.median(c["first"] for c in calls[method]),
            "nodes": nodes(name, method),
            "peak_bytes": peak_in_child(name, method),
        }
    kfac, adam = (found[method] for method in METHODS)
    keys = ("seconds", "nodes", "peak_bytes")
    found["ratios"] = {key: kfac[key] / adam[key] for key in keys}
    return found


def table(results: dict[str, Any]) -> str:
    """Returns the results as a Markdown table, ratios first."""
    lines = [
        "| model | first call, ratio to Adam | seconds, K-FAC / Adam | "
        "nodes, ratio | nodes | peak memory, ratio |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, row in results["models"].items():
        ratios, kfac, adam = row["ratios"], row["kfac"], row["adam"]
        lines.append(
            f"| {name} | {ratios['seconds']:.1f} "
            f"| {kfac['seconds']:.1f} / {adam['seconds']:.1f} "
            f"| {ratios['nodes']:.1f} | {kfac['nodes']} / {adam['nodes']} "
            f"| {ratios['peak_bytes']:.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=list(MODELS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--peak", nargs=2, metavar=("MODEL", "METHOD"))
    options = parser.parse_args()
    if options.peak:
        print(peak(*options.peak))
        return
    results: dict[str, Any] = {"models": {}}
    if options.out.exists():
        results = json.loads(options.out.read_text())
    if not options.table:
        from benchmarks.runner import environment

        results["environment"] = environment()
        first_call("classifier", "adam")  # What a process does only once.
        for name in options.only or MODELS:
            results["models"][name] = measure(name, options.repeats)
            options.out.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
