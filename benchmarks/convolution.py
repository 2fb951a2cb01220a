"""The second moment of image patches: time and peak memory.

Two ways are compared: patches formed by `tf.image.extract_patches` and one
matrix product, and `linalg.Patches`. Times are taken in turn in one process,
peak memory in a process per way.

    python -m benchmarks.convolution [--repeats 7] [--jit]

prints a table and writes `benchmarks/results/convolution.json`.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "convolution.json"
METHODS = ("explicit", "patches")
BATCH, SIZE, CHANNELS, KERNEL = 128, 32, 64, 3


def function(method: str) -> Callable[[Any], Any]:
    """Returns images `[N, H, W, C]` -> second moment of "same" patches."""
    import tensorflow as tf

    from keras_natgrad.linalg import Patches, Window, padded

    window = Window((KERNEL, KERNEL), (1, 1), (1, 1))

    def explicit(images: Any) -> Any:
        sides, ones = [1, KERNEL, KERNEL, 1], [1, 1, 1, 1]
        rows = tf.image.extract_patches(images, sides, ones, ones, "SAME")
        rows = tf.reshape(rows, [-1, rows.shape[-1]])
        return tf.matmul(rows, rows, transpose_a=True)

    def patches(images: Any) -> Any:
        images = padded(images, window, "same")[:, tf.newaxis]
        return Patches(images, window).second_moment()

    return {"explicit": explicit, "patches": patches}[method]


def peak() -> float:
    """Returns the peak memory of this process so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def memory(method: str, jit: bool) -> float:
    """Returns the memory that one call takes beside the images, in MiB."""
    import tensorflow as tf

    tiny = tf.random.normal([1, SIZE, SIZE, CHANNELS], seed=0)
    tf.function(function(method), jit_compile=jit)(tiny)  # Loads libraries.
    images = tf.random.normal([BATCH, SIZE, SIZE, CHANNELS], seed=1)
    before = peak()
    tf.function(function(method), jit_compile=jit)(images).numpy()
    return peak() - before


def times(repeats: int, jit: bool) -> dict[str, list[float]]:
    """Returns the seconds of calls made in turn, per method."""
    import tensorflow as tf

    images = tf.random.normal([BATCH, SIZE, SIZE, CHANNELS], seed=1)
    calls = {
        method: tf.function(function(method), jit_compile=jit)
        for method in METHODS
    }
    seconds: dict[str, list[float]] = {method: [] for method in METHODS}
    for repeat in range(repeats + 1):
        for method, call in calls.items():
            start = time.perf_counter()
            call(images).numpy()
            if repeat:  # The first call compiles.
                seconds[method].append(time.perf_counter() - start)
    return seconds


def main() -> None:
    """Measures the times in turn, memory in a process per method; saves."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--jit", action="store_true")
    parser.add_argument("--method", choices=METHODS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.method:
        print(memory(arguments.method, arguments.jit))
        return
    peaks = {}
    for method in METHODS:
        command = [sys.executable, "-m", "benchmarks.convolution"]
        command += ["--method", method] + ["--jit"] * arguments.jit
        output = subprocess.run(
            command, check=True, capture_output=True, text=True
        ).stdout
        peaks[method] = float(output.splitlines()[-1])
    seconds = times(arguments.repeats, arguments.jit)
    medians = {
        method: statistics.median(each) for method, each in seconds.items()
    }
    ratios = [
        a / b
        for a, b in zip(seconds["explicit"], seconds["patches"], strict=True)
    ]
    for method in METHODS:
        print(
            f"{method:>10}: {medians[method]:.3f} s, "
            f"{peaks[method]:.0f} MiB beside the images"
        )
    result = {
        "shape": [BATCH, SIZE, SIZE, CHANNELS],
        "kernel": KERNEL,
        "jit": arguments.jit,
        "seconds": seconds,
        "peak_mib": peaks,
        "speedup": statistics.median(ratios),
        "memory_ratio": peaks["patches"] / peaks["explicit"],
    }
    print(
        f"{result['speedup']:.1f} times as fast (median of pairs), "
        f"{result['memory_ratio']:.2f} of the memory"
    )
    RESULTS.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
