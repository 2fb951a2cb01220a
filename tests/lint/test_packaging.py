"""The wheel holds the package, and its metadata matches the source."""

import ast
import email
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "keras_natgrad"
OPTIONAL = {
    "plots": {"matplotlib"},
    "examples": {"matplotlib", "scikit-learn"},
    "tensorboard": {"tensorboard"},
    "model-garden": {"tf-keras", "tf-models-official"},
    "tuner": {"keras-tuner", "scikit-learn", "tensorboard"},
}
DISTRIBUTION_OF = {
    "keras_tuner": "keras-tuner",
    "official": "tf-models-official",
    "sklearn": "scikit-learn",
    "typing_extensions": "typing-extensions",
    "tf_keras": "tf-keras",
    "tensorflow_probability": "tensorflow-probability",
}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from a copy so that the checkout stays clean."""
    copy = tmp_path_factory.mktemp("source")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    shutil.copytree(
        PACKAGE,
        copy / PACKAGE.name,
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    (copy / "tests").mkdir()
    (copy / "tests" / "__init__.py").touch()
    subprocess.run(
        [sys.executable, "setup.py", "-q", "bdist_wheel"],
        cwd=copy,
        check=True,
        capture_output=True,
        timeout=120,
    )
    (path,) = (copy / "dist").glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        yield archive


@pytest.fixture(scope="module")
def metadata(wheel):
    (name,) = (n for n in wheel.namelist() if n.endswith("/METADATA"))
    return email.message_from_bytes(wheel.read(name))


def requirements(metadata, extra=None):
    """Names of the distributions required, always or by one extra."""
    names = set()
    for line in metadata.get_all("Requires-Dist"):
        requirement, _, marker = line.partition(";")
        found = re.search(r"extra == [\"']([^\"']+)[\"']", marker)
        if (found.group(1) if found else None) == extra:
            names.add(re.match(r"[\w.-]+", requirement).group(0).lower())
    return names


def test_wheel_holds_the_package_and_nothing_else(wheel):
    expected = {
        path.relative_to(ROOT).as_posix()
        for path in PACKAGE.rglob("*")
        if path.suffix == ".py" or path.name == "py.typed"
    }
    held = {n for n in wheel.namelist() if ".dist-info/" not in n}
    assert held == expected
    assert "keras_natgrad/py.typed" in held


def test_wheel_holds_the_license(wheel, metadata):
    (name,) = (n for n in wheel.namelist() if n.endswith("/LICENSE"))
    assert wheel.read(name) == (ROOT / "LICENSE").read_bytes()
    assert metadata["License-Expression"] == "Apache-2.0"


def test_version_has_one_source(metadata):
    from keras_natgrad import version

    assert metadata["Name"] == "keras-natgrad"
    assert metadata["Version"] == version.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+([a-z]+\d+)?", version.__version__)


def test_changelog_has_a_section_to_write_in():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(r"^## \[Unreleased\]$", text, re.MULTILINE)


def test_long_description_is_the_readme(metadata):
    assert metadata["Description-Content-Type"] == "text/markdown"
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    description = metadata.get_payload(decode=True).decode("utf-8")
    assert description.strip() == readme.strip()


def test_every_extra_is_declared(metadata):
    assert set(metadata.get_all("Provides-Extra")) == {
        *(
            "model-garden",
            "plots",
            "examples",
            "tensorboard",
            "tuner",
            "docs",
            "tests",
            "dev",
        ),
    }
    for extra, expected in OPTIONAL.items():
        assert requirements(metadata, extra) == expected
    assert requirements(metadata, "tests") <= requirements(metadata, "dev")


def third_party_imports():
    """Yield (file, distribution, is at module level) for every import."""
    for path in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        top_level = set(map(id, tree.body))
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                modules = [node.module]
            else:
                continue
            for module in modules:
                name = module.split(".")[0]
                if name not in {*sys.stdlib_module_names, PACKAGE.name}:
                    distribution = DISTRIBUTION_OF.get(name, name)
                    where = path.relative_to(ROOT).as_posix()
                    yield where, distribution, id(node) in top_level


def test_every_import_is_declared(metadata):
    always = requirements(metadata)
    optional = set.union(*OPTIONAL.values())
    found = list(third_party_imports())
    missing = [row for row in found if row[1] not in always | optional]
    assert not missing, "neither in install_requires nor in an extra"
    eager = [
        row
        for row in found
        if row[2]
        and row[1] not in always
        and not row[0].startswith("keras_natgrad/integrations/")
    ]
    assert not eager, "an optional dependency is imported at module level"


def python_blocks(path):
    text = path.read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]


@pytest.mark.parametrize(
    "path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix()
)
def test_documented_code_parses(path):
    for block in python_blocks(path):
        assert compile(block, str(path), "exec") is not None
