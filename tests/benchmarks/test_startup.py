"""The benchmark of the first call of `fit`."""

from benchmarks import startup


def test_a_call_and_its_graph():
    call = startup.first_call("classifier", "kfac")
    assert 0 < call["second"] < call["first"]
    ratio = startup.nodes("classifier", "kfac") / startup.nodes(
        "classifier", "adam"
    )
    # Layers of one shape share one block: 12.2 before they did.
    assert 1 < ratio < 9


def test_table():
    method = {"seconds": 3.0, "nodes": 30}
    row = {
        "kfac": method,
        "adam": {"seconds": 1.0, "nodes": 10},
        "ratios": {"seconds": 3.0, "nodes": 3.0, "peak_bytes": 1.5},
    }
    text = startup.table({"models": {"mlp": row}})
    assert text.splitlines()[-1] == (
        "| mlp | 3.0 | 3.0 / 1.0 | 3.0 | 30 / 10 | 1.5 |"
    )
