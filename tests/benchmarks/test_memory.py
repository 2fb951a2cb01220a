"""Peak memory of the kernel solver's steps."""

import json
import os

import numpy as np
import pytest

from benchmarks.memory import ROOT, measure

RESULTS = ROOT / "benchmarks" / "results" / "costs.json"


@pytest.mark.skipif(
    not os.path.exists("/proc/self/clear_refs"), reason="Linux only"
)
def test_a_step_needs_three_matrices():
    """K and two more of its size, with the [N, N] product of the inputs.

    Between 3 and 3.5 `M²` elements at M = 1024.
    """
    found = measure((256, 4, 16))
    assert found["columns"] == 1024
    assert found["estimate"] == 4 * 2 * 1024**2
    assert 3.0 < found["bytes"] / (4 * 1024**2) < 3.5


def test_results_have_their_exponents():
    """Over a decade each; quadratic in N and r, linear in P."""
    rows = json.loads(RESULTS.read_text(encoding="utf-8"))["memory"]
    limits = {"N": (1.9, 2.05), "r": (1.75, 2.05), "P": (0.9, 1.15)}
    assert len(rows) == 3
    for name, row in rows.items():
        sizes, used = row["sizes"], row["bytes"]
        assert sizes[-1] >= 10 * sizes[0]
        slope = np.polyfit(np.log(sizes), np.log(used), 1)[0]
        np.testing.assert_allclose(row["exponent"], slope, rtol=1e-9)
        low, high = limits[name.split(", ")[1][0]]
        assert low < slope < high
