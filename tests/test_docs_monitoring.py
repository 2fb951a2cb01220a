"""The code of docs/monitoring.md runs as it stands."""

import re
from pathlib import Path

import numpy as np

DOCS = Path(__file__).resolve().parents[1] / "docs"
TEXT = (DOCS / "monitoring.md").read_text(encoding="utf-8")


def test_examples():
    names = {}
    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert len(blocks) == 4
    exec(blocks[0], names)
    assert len(names["history"].history["damping"]) == 10
    first = names["monitor"]
    assert first.history["step"] == list(range(4, 81, 4))
    assert first.spectrum("sequential/hidden").size == 21 * 32
    for code in blocks[1:]:
        exec(code, names)
    assert np.isfinite(names["record"]["damping"])
    assert names["policy"].patience == 3


def test_table_of_logs():
    """Every name in the logs has a row, and every row is one."""
    names = {}
    code = re.search(r"```python\n(.*?)```", TEXT, re.DOTALL).group(1)
    code = code.replace("epochs=10", "epochs=1")
    exec(code.replace("(every=4)", "(measure_refresh=True)"), names)
    table = re.search(r"\| in the logs.*?\n\n", TEXT, re.DOTALL).group(0)
    documented = set(re.findall(r"^\| (.*?) \|", table, re.MULTILINE))
    documented = set(re.findall(r"`(\w+)`", " ".join(documented)))
    assert documented == set(names["history"].history) - {"loss"}


def test_figure_is_there():
    (image,) = re.findall(r"\]\((images/.*?)\)", TEXT)
    assert (DOCS / image).stat().st_size > 10_000
