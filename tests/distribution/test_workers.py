"""Two worker processes on this machine against one process."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 150


def free_port():
    """Return the first of two neighbouring free ports."""
    for _ in range(100):
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            port = first.getsockname()[1]
            try:
                second.bind(("127.0.0.1", port + 1))
            except OSError:
                continue
            return port
    raise OSError("No two neighbouring ports are free.")


def start(folder, workers, steps=50, die_at=None, save_every=20):
    """Start the processes of one run; return them and where results go."""
    folder.mkdir(exist_ok=True)
    port = free_port()
    processes, results = [], []
    for index in range(workers):
        result = folder / f"result{index}.json"
        settings = {
            "index": index,
            "workers": workers,
            "port": port,
            "steps": steps,
            "save_every": save_every,
            "folder": str(folder),
            "result": str(result),
        }
        if die_at is not None and index == workers - 1:
            settings["die_at"] = die_at
        command = [sys.executable, "-m", "tests.distribution.worker"]
        with open(folder / f"log{index}.txt", "w") as log:
            processes.append(
                subprocess.Popen(
                    [*command, json.dumps(settings)],
                    cwd=ROOT,
                    env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"},
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            )
        results.append(result)
    return processes, results


def finish(processes, results):
    """Wait for a run; return its results."""
    try:
        for process in processes:
            process.wait(timeout=SECONDS)
    finally:
        for process in processes:
            process.kill()
    logs = [path.with_name(f"log{i}.txt") for i, path in enumerate(results)]
    for process, log in zip(processes, logs, strict=True):
        assert process.returncode == 0, log.read_text()[-3000:]
    return [json.loads(path.read_text()) for path in results]


def assert_same_end(left, right, rtol=1e-5):
    for a, b in zip(left["weights"], right["weights"], strict=True):
        np.testing.assert_allclose(a, b, rtol, 1e-5)


@pytest.mark.slow
def test_two_workers_equal_one(tmp_path):
    one = finish(*start(tmp_path / "one", 1))[0]
    two = finish(*start(tmp_path / "two", 2))
    assert one["refreshes"] > 5
    for each in two:
        np.testing.assert_allclose(each["losses"], one["losses"], 1e-5)
        assert_same_end(each, one)
        assert each["weights"] == two[0]["weights"]


@pytest.mark.slow
def test_a_killed_worker_and_a_restart(tmp_path):
    whole = finish(*start(tmp_path / "whole", 2))[0]
    folder = tmp_path / "broken"
    processes, results = start(folder, 2, die_at=33)
    # The one that dies leaves the other one waiting.
    processes[-1].wait(timeout=SECONDS)
    assert processes[-1].returncode != 0
    for process in processes:
        process.kill()
        process.wait()
    again = finish(*start(folder, 2))[0]
    # It went on from the checkpoint at step 20.
    assert len(again["losses"]) == 30
    np.testing.assert_allclose(again["losses"], whole["losses"][20:], 1e-5)
    assert_same_end(again, whole)
