"""Peak memory of a step of the kernel solver, over N, r and P.

Every size runs in a process of its own, after two steps that trace and warm
up. Linux counts the peak of the resident memory from a reset on
(`/proc/self/clear_refs`); its excess over the memory before the step is what
the step needs for itself. oneDNN is off and large blocks are mapped one by one,
or freed memory would be kept for later and be counted with the next step.

    python -m benchmarks.costs --memory --out benchmarks/results/costs.json
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
REPEATS = 3
ENVIRONMENT = {
    "TF_ENABLE_ONEDNN_OPTS": "0",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "MALLOC_MMAP_THRESHOLD_": "65536",
}
# N, r and the width of the hidden layer.
CASES = {
    "kernel step, N (r = 4, width 128)": [
        (n, 4, 128) for n in (128, 256, 512, 1280)
    ],
    "kernel step, r (N = 512, width 128)": [
        (512, r, 128) for r in (1, 2, 5, 10)
    ],
    "kernel step, P (N = 32, r = 4)": [
        (32, 4, width) for width in (256, 512, 1024, 2048)
    ],
}


def resident(field: str) -> int:
    """Returns `VmRSS` or `VmHWM` of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"No such field. Received: field={field!r}")


def peak(batch: int, outputs: int, width: int) -> dict[str, Any]:
    """Measures one case in this process."""
    from benchmarks.costs import KernelCase

    case = KernelCase(batch, outputs, width)
    found = []
    for repeat in range(2 + REPEATS):
        Path("/proc/self/clear_refs").write_text("5")
        before = resident("VmRSS")
        for value in case.step().values():
            value.numpy()
        if repeat >= 2:
            found.append(resident("VmHWM") - before)
    size = case.model.count_params()
    solver = case.model.optimizer.chosen_solver
    return {
        "parameters": size,
        "columns": case.columns,
        "bytes": sorted(found)[REPEATS // 2],
        "estimate": 4 * solver.memory(size, case.columns),
    }


def measure(case: Sequence[int]) -> dict[str, Any]:
    """Measures one case in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory", *map(str, case)],
        cwd=ROOT,
        env={**os.environ, **ENVIRONMENT},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def memory_of_steps() -> dict[str, Any]:
    """Measures all cases; prints and returns sizes, bytes and exponents."""
    from benchmarks.costs import exponent

    results: dict[str, Any] = {}
    for name, cases in CASES.items():
        rows = [measure(case) for case in cases]
        varied = next(
            i for i in range(3) if len({case[i] for case in cases}) > 1
        )
        sizes = [case[varied] for case in cases]
        if varied == 2:
            sizes = [row["parameters"] for row in rows]
        used = [row["bytes"] for row in rows]
        results[name] = {
            "sizes": sizes,
            "columns": [row["columns"] for row in rows],
            "bytes": used,
            "estimated bytes of the solver": [row["estimate"] for row in rows],
            "exponent": exponent(sizes, used),
            "exponent of the largest two": exponent(sizes[-2:], used[-2:]),
        }
        shown = ", ".join(
            f"{size:,}: {row['bytes'] / 2**20:.1f} MiB "
            f"(estimate {row['estimate'] / 2**20:.1f})"
            for size, row in zip(sizes, rows, strict=True)
        )
        print(
            f"memory, {name}: {shown}; exponent "
            f"{results[name]['exponent']:.2f}, "
            f"{results[name]['exponent of the largest two']:.2f} at the end"
        )
    return results


if __name__ == "__main__":
    print(json.dumps(peak(*map(int, sys.argv[1:]))))
