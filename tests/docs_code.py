"""Finds the Python code of the pages and docstrings."""

import ast
import doctest
import re
import textwrap
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
_FENCED = re.compile(
    r"^([ ]*)```python\n(.*?)^\1```$", re.DOTALL | re.MULTILINE
)
_DOCUMENTED = (ast.ClassDef, ast.FunctionDef, ast.Module)


class Code(NamedTuple):
    """A piece of code of the documentation.

    Attributes:
        text: The code.
        path: The file that it is in.
        line: Number of the line before its first one.
    """

    text: str
    path: Path
    line: int

    def run(self, names):
        """Runs it; a traceback shows the lines of the documentation."""
        padded = "\n" * self.line + self.text
        exec(compile(padded, str(self.path), "exec"), names)


def pages():
    """Returns the pages of Markdown that contain Python code."""
    found = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    return [page for page in found if blocks_of_page(page)]


def blocks_of_page(path):
    """Returns the fenced blocks of Python code of a page, in order."""
    return _blocks(path.read_text(encoding="utf-8"), path, 0)


def docstrings():
    """Returns docstrings with code: `{name: ([Code, ...], DocTest)}`.

    A name is that of the module without the package, and the class or function
    in it: `optimizers.kfac.KFAC`.
    """
    found = {}
    parser = doctest.DocTestParser()
    package = ROOT / "keras_natgrad"
    for path in sorted(package.rglob("*.py")):
        module = ".".join(path.relative_to(package).with_suffix("").parts)
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for name, node in _documented(tree, module):
            text = ast.get_docstring(node)
            if not text:
                continue
            first = node.body[0].lineno - 1
            blocks = _blocks(text, path, first)
            session = parser.get_doctest(text, {}, name, str(path), first)
            if blocks or session.examples:
                found[name] = (blocks, session)
    return found


def _documented(node, name):
    yield name, node
    for child in node.body:
        if isinstance(child, _DOCUMENTED):
            yield from _documented(child, f"{name}.{child.name}")


def _blocks(text, path, first):
    return [
        Code(
            textwrap.dedent(match[2]),
            path,
            first + text[: match.start()].count("\n") + 1,
        )
        for match in _FENCED.finditer(text)
    ]
