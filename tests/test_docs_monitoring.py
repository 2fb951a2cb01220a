"""docs/monitoring.md names what is logged; test_docs_code runs its code."""

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[1] / "docs"
TEXT = (DOCS / "monitoring.md").read_text(encoding="utf-8")


@pytest.mark.slow
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
