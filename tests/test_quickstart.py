"""The first code of README.md, run by a user in an empty folder."""

import os
import subprocess
import sys

import pytest

from tests.docs_code import ROOT, blocks_of_page


@pytest.mark.slow
def test_quickstart_of_the_readme_runs(tmp_path):
    quickstart = blocks_of_page(ROOT / "README.md")[0].text
    result = subprocess.run(
        [sys.executable, "-c", quickstart],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
