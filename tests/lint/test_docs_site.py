"""Navigation, links and API page of the documentation, without building it."""

import importlib
import inspect
import re

import pytest

import keras_natgrad as kng
from tests.docs_code import ROOT

MKDOCS = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
API = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "benchmarks" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
DIRECTIVES = re.findall(
    r"^::: (\S+)\n((?:    .*\n|\n(?=    ))*)", API + "\n", re.MULTILINE
)


def anchors(path):
    """The anchors of a page's headings, as code hosts and mkdocs make them."""
    text = re.sub(
        r"^```.*?^```", "", path.read_text("utf-8"), flags=re.M | re.S
    )
    return {
        re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-")
        for title in re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    }


def test_every_page_is_in_the_navigation_once():
    listed = re.findall(r"^ +- [^:]+: (\w+\.md)$", MKDOCS, re.MULTILINE)
    assert len(set(listed)) == len(listed)
    assert {path.name for path in (ROOT / "docs").glob("*.md")} <= set(listed)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_lead_to_files_and_headings(path):
    text = re.sub(
        r"^```.*?^```", "", path.read_text("utf-8"), flags=re.M | re.S
    )
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        file = (path.parent / name).resolve() if name else path
        assert file.is_file(), target
        if anchor:
            assert anchor in anchors(file), target


def resolve(name):
    """Imports what a directive names."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for part in parts[end:]:
            found = getattr(found, part)
        return found
    raise ModuleNotFoundError(name)


@pytest.mark.parametrize(("name", "options"), DIRECTIVES, ids=lambda x: x)
def test_api_directive_names_what_exists(name, options):
    found = resolve(name)
    assert inspect.getdoc(found)
    for member in re.findall(r"^ {8}- (\w+)$", options, re.MULTILINE):
        assert inspect.getdoc(getattr(found, member))


def public_names():
    """The names of the package, and those of its public modules."""
    for name in set(kng.__all__) - {"__version__"}:
        found = getattr(kng, name)
        if not inspect.ismodule(found):
            yield f"keras_natgrad.{name}"
            continue
        inside = getattr(found, "__all__", None) or [
            key
            for key, value in vars(found).items()
            if getattr(value, "__module__", None) == found.__name__
            and not key.startswith("_")
            and callable(value)
        ]
        yield from (f"keras_natgrad.{name}.{key}" for key in inside)


def test_api_page_has_every_public_name():
    listed = {resolve(name) for name, _ in DIRECTIVES}
    missing = [
        name
        for name in public_names()
        if not inspect.ismodule(resolve(name)) and resolve(name) not in listed
    ]
    assert missing == []
