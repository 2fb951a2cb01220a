"""A contender in a process of its own, for other frameworks.

The child writes one line `{"compile_seconds": ...}` when it is ready, then
answers every line it reads:

```
{"command": "advance", "steps": 20}  ->  {"seconds": 1.25}
{"command": "evaluate"}              ->  {"metric": 31.4}
```

It ends when its input ends. Between two answers it computes nothing, so it
can take turns with contenders of this process.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.tasks import DenseTask

ROOT = Path(__file__).resolve().parents[1]


class ChildContender:
    """A training run in a child process.

    Args:
        name: The label in the results.
        command: The child's program and arguments, run in the repository's
            root.
        settings: What describes the run in the results.

    Raises:
        RuntimeError: If the child ends before it is ready.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        settings: dict[str, Any] | None = None,
    ) -> None:
        self.name = name
        self.step = 0
        self.limit = None
        self._process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        ready = self._read()
        self.compile_seconds = ready.pop("compile_seconds")
        self.settings = {**(settings or {}), **ready}

    def advance(self, steps: int) -> float:
        """Trains for some steps and returns the seconds they took."""
        answer = self._ask(command="advance", steps=steps)
        self.step += steps
        return answer["seconds"]

    def evaluate(self) -> float:
        """Returns the metric."""
        metric = self._ask(command="evaluate")["metric"]
        return float("nan") if metric is None else metric

    def close(self) -> None:
        """Ends the child."""
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()

    def _ask(self, **request: Any) -> dict[str, Any]:
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(
                f"The process of {self.name} ended with status "
                f"{self._process.wait()}; its message is above."
            )
        return json.loads(line)


def kfac_jax_contender(
    python: str, task: DenseTask, seed: int, data: str
) -> ChildContender:
    """Starts kfac-jax with its published recipe on the autoencoder.

    Args:
        python: Interpreter of an environment that has the packages of
            `requirements-kfac-jax.txt`.
        task: The autoencoder.
        seed: Seed of weights and batches, which are those of the Keras
            contenders.
        data: The MNIST file.

    Returns:
        The contender.
    """
    command = [python, "-m", "benchmarks.kfac_jax_contender"]
    command += ["--data", str(Path(data).resolve())]
    command += ["--sizes", *map(str, task.sizes)]
    command += ["--batch-size", str(task.batch_size), "--seed", str(seed)]
    return ChildContender("kfac-jax", command, {"optimizer": "kfac-jax"})
