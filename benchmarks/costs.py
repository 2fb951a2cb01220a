"""How cost grows: products with loss factors, and the kernel solver.

Every time is the median of repeats that alternate between the sizes of a row;
exponents are slopes of a straight line through the logarithms.

    python -m benchmarks.costs --out benchmarks/results/costs.json

`--memory` measures the kernel solver's peak memory only (`memory.py`) and
leaves the times in the file as they are.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "tensorflow")

import keras
import numpy as np
import tensorflow as tf

import keras_natgrad as kng
from benchmarks.memory import memory_of_steps
from keras_natgrad.solvers import Kernel, System

REPEATS = 9


def race(calls: Sequence[Callable[[], Any]], repeats: int = REPEATS) -> Any:
    """Returns the median seconds of every call, taken in turns."""
    for call in calls:
        call()
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(repeats):
        for call, own in zip(calls, times, strict=True):
            start = time.perf_counter()
            tf.nest.map_structure(lambda t: t.numpy(), call())
            own.append(time.perf_counter() - start)
    return [float(np.median(own)) for own in times]


def exponent(sizes: Sequence[float], times: Sequence[float]) -> float:
    """Returns the slope of log time over log size."""
    slope, _ = np.polyfit(np.log(sizes), np.log(times), 1)
    return float(slope)


def head_products() -> dict[str, Any]:
    """Times `fisher_factor_product` over the size of a head."""
    rows = {}

    def product(head: Any, batch: int, size: int) -> Callable[[], Any]:
        generator = np.random.default_rng(0)
        outputs = tf.constant(generator.normal(size=(batch, size)), "float32")
        rank = head.factor_rank(size)
        vector = tf.constant(generator.normal(size=(batch, rank)), "float32")
        function = tf.function(head.fisher_factor_product)
        return lambda: function(outputs, vector)

    classes = (10, 1000, 50_000)
    calls = [product(kng.heads.Categorical(), 256, size) for size in classes]
    rows["Categorical, 256 examples, classes"] = (classes, race(calls))
    # The largest two, where the call itself no longer matters.
    wide = (1000, 10_000, 50_000)
    calls = [product(kng.heads.Categorical(), 256, size) for size in wide]
    rows["Categorical, 256 examples, classes (large)"] = (wide, race(calls))
    dimensions = (64, 128, 256, 512, 1024)
    head = kng.heads.MultivariateNormalTriL()
    calls = [product(head, 4, d + d * (d + 1) // 2) for d in dimensions]
    rows["MultivariateNormalTriL, 4 examples, dimension"] = (
        dimensions,
        race(calls),
    )
    return rows


class KernelCase:
    """A network, a batch and its factor A.

    Args:
        batch: N.
        outputs: Units of the last layer, the columns r of one example.
        width: Units of the hidden layers.
    """

    def __init__(self, batch: int, outputs: int, width: int) -> None:
        keras.utils.set_random_seed(0)
        self.model = keras.Sequential(
            [
                keras.Input((width,)),
                keras.layers.Dense(width, "tanh"),
                keras.layers.Dense(outputs),
            ]
        )
        generator = np.random.default_rng(0)
        self.x = tf.constant(generator.normal(size=(batch, width)), "float32")
        self.y = tf.zeros([batch, outputs])
        self.columns = batch * outputs
        optimizer = kng.NaturalGradient(1e-6, 0.1, "kernel").attach(self.model)
        self.model.compile(optimizer, "mse")
        self.model.make_train_function()

    def step(self) -> Any:
        """Runs one training step."""
        return self.model.train_function(iter([(self.x, self.y)]))


def kernel_steps() -> dict[str, Any]:
    """Times a whole step of the kernel solver over N, r and P."""
    rows = {}
    batches = (64, 128, 256, 640)
    cases = [KernelCase(n, 4, 128) for n in batches]
    rows["kernel step, N (r = 4, width 128)"] = (
        batches,
        race([case.step for case in cases], 5),
    )
    outputs = (1, 2, 5, 10)
    cases = [KernelCase(256, r, 128) for r in outputs]
    rows["kernel step, r (N = 256, width 128)"] = (
        outputs,
        race([case.step for case in cases], 5),
    )
    widths = (64, 128, 256, 512, 1024)
    cases = [KernelCase(128, 4, width) for width in widths]
    rows["kernel step, P (N = 128, r = 4)"] = (
        [case.model.count_params() for case in cases],
        race([case.step for case in cases], 5),
    )
    sizes = (256, 512, 1024, 2560)
    generator = np.random.default_rng(0)

    def solve(columns: int) -> Callable[[], Any]:
        matrix = tf.constant(generator.normal(size=(64, columns)), "float32")
        gram = tf.matmul(matrix, matrix, transpose_a=True)
        factor = _Matrix(matrix, gram)
        system = System(tf.ones([columns]), tf.constant(1.0))
        function = tf.function(lambda: Kernel().solve(factor, system).direction)
        return function

    rows["kernel factorisation, columns"] = (
        sizes,
        race([solve(size) for size in sizes], 5),
    )
    return rows


class _Matrix(kng.solvers.FisherRoot):
    """A small A whose kernel is there already: the factorisation alone."""

    def __init__(self, matrix: tf.Tensor, gram: tf.Tensor) -> None:
        self._matrix, self._gram = matrix, gram

    size = property(lambda self: int(self._matrix.shape[0]))
    column_count = property(lambda self: int(self._matrix.shape[1]))

    def residual(self) -> tf.Tensor:
        return tf.ones([self.column_count])

    def product(self, vector: tf.Tensor) -> list[tf.Tensor]:
        return [tf.linalg.matvec(self._matrix, vector)]

    def transpose_product(self, direction: Any) -> tf.Tensor:
        return tf.linalg.matvec(self._matrix, direction[0], transpose_a=True)

    def gram(self) -> tf.Tensor:
        return self._gram

    def matrix(self) -> tf.Tensor:
        return self._matrix

    def from_tensors(self, tensors: Any) -> list[tf.Tensor]:
        return list(tensors)

    def to_tensors(self, direction: Any) -> list[tf.Tensor]:
        return list(direction)

    def unflatten(self, vector: tf.Tensor) -> list[tf.Tensor]:
        return [vector]


def contraction() -> dict[str, float]:
    """Times one layer's kernel against per-example Jacobians.

    N = 256, 784 → 512 units, one column per example: the contraction
    `(ĀĀᵀ) ∘ (GGᵀ)`, and the products of the per-example gradients
    `ā_i g_iᵀ`, formed as a vectorised Jacobian forms them.
    """
    generator = np.random.default_rng(0)
    a = tf.constant(generator.normal(size=(256, 784)), "float32")
    g = tf.constant(generator.normal(size=(256, 512)), "float32")

    @tf.function
    def contracted() -> tf.Tensor:
        left = tf.matmul(a, a, transpose_b=True)
        return left * tf.matmul(g, g, transpose_b=True)

    @tf.function
    def through_jacobians() -> tf.Tensor:
        rows = tf.reshape(tf.einsum("in,im->inm", a, g), [256, -1])
        return tf.matmul(rows, rows, transpose_b=True)

    np.testing.assert_allclose(
        contracted(), through_jacobians(), rtol=1e-2, atol=1e-1
    )
    fast, slow = race([contracted, through_jacobians])
    return {"contraction": fast, "jacobians": slow, "ratio": slow / fast}


def main() -> None:
    """Measures, prints and writes everything."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--memory", action="store_true")
    arguments = parser.parse_args()
    if arguments.memory:
        add_memory(arguments.out)
        return
    rows = {**head_products(), **kernel_steps()}
    results: dict[str, Any] = {}
    for name, (sizes, times) in rows.items():
        results[name] = {
            "sizes": list(sizes),
            "seconds": times,
            "exponent": exponent(sizes, times),
            "exponent of the largest two": exponent(sizes[-2:], times[-2:]),
        }
        shown = ", ".join(
            f"{size:,}: {1e3 * seconds:.2f} ms"
            for size, seconds in zip(sizes, times, strict=True)
        )
        print(
            f"{name}: {shown}; exponent {results[name]['exponent']:.2f}, "
            f"{results[name]['exponent of the largest two']:.2f} at the end"
        )
    layer = contraction()
    results["one layer, N = 256, 784 → 512"] = layer
    print(
        f"one layer, N = 256, 784 → 512: {1e3 * layer['contraction']:.2f} ms "
        f"by contraction, {1e3 * layer['jacobians']:.1f} ms through Jacobians, "
        f"{layer['ratio']:.0f} times"
    )
    if arguments.out:
        arguments.out.write_text(json.dumps(results, indent=1))
    add_memory(arguments.out)


def add_memory(path: Path | None) -> None:
    """Measures and prints memory, and adds it to a file of results."""
    found = memory_of_steps()
    if path:
        results = json.loads(path.read_text()) if path.exists() else {}
        results["memory"] = found
        path.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
