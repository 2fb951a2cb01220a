from benchmarks.table import markdown, summarise


def record(method, seed, seconds, steps, first_order=True):
    return {
        "method": method,
        "seed": seed,
        "settings": {"first_order": first_order},
        "seconds_to_target": seconds,
        "steps_to_target": steps,
        "median_step_seconds": 0.01,
        "compile_seconds": 1.0,
    }


RESULTS = {
    "task": "line",
    "metric": "mean squared error",
    "target": 0.5,
    "batch_size": 8,
    "parameters": 12345,
    "seeds": [0, 1, 2],
    "runs": [
        *(record("adam", s, 10.0 + s, 1000) for s in range(3)),
        *(record("sgd", s, 20.0, 500) for s in range(3)),
        *(record("kfac", s, 2.0, 100, False) for s in range(2)),
        record("kfac", 2, None, None, False),
        *(record("muon", s, None, None) for s in range(3)),
    ],
}


def test_speed_ups_are_against_the_best_first_order_contender():
    rows = {row["method"]: row for row in summarise(RESULTS)}
    assert rows["adam"]["time_ratio"] == 1.0
    assert rows["sgd"]["time_ratio"] == 11 / 20
    assert rows["sgd"]["step_ratio"] == 2.0
    assert rows["kfac"]["time_ratio"] == 5.0  # of 5, 5.5 and a miss
    assert rows["kfac"]["step_ratio"] == 10.0
    assert rows["kfac"]["reached"] == 2


def test_text():
    lines = markdown(RESULTS).splitlines()
    assert lines[0] == (
        "line: mean squared error to 0.5 (batch 8, 12,345 parameters, "
        "median of 3 seeds)"
    )
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in lines[2:]
    ]
    assert cells[0][:3] == ["Method", "Speed-up, time", "Speed-up, steps"]
    assert cells[2] == [
        *("kfac", "5.00×", "10.00×", "2.00", "100", "10.00", "2/3")
    ]
    assert [row[0] for row in cells[2:]] == ["kfac", "adam", "sgd", "muon"]
    assert cells[-1][1:5] == ["–"] * 4


def test_without_a_first_order_contender_there_are_no_ratios():
    runs = [run for run in RESULTS["runs"] if run["method"] == "kfac"]
    (row,) = summarise({**RESULTS, "runs": runs})
    assert row["time_ratio"] is None
    assert "| – " in markdown({**RESULTS, "runs": runs})
