"""Files outside docs/ as pages of the site, and the links to them.

The pages of docs/ are read on a code host as well, where a link such as
`../examples/prong.py` leads to the file. On the site it leads to a page made of
that file.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
# Path in the repository: page of the site.
PUBLISHED = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "LICENSE": "license.md",
    "benchmarks/README.md": "benchmarks.md",
    **{
        f"examples/{path.name}": f"examples/{path.stem}.md"
        for path in sorted((ROOT / "examples").glob("*.py"))
    },
}
SOURCES = {page: path for path, page in PUBLISHED.items()}
LINK = re.compile(r"(?<=\]\()([^)\s#:]+)(?=[)#])")


def on_files(files: Any, config: Any) -> Any:
    """Adds the files outside docs/."""
    for path, page in PUBLISHED.items():
        content = (ROOT / path).read_text(encoding="utf-8")
        if not path.endswith(".md"):
            language = "python" if path.endswith(".py") else "text"
            content = f"# {path}\n\n```{language}\n{content}```\n"
        files.append(File.generated(config, page, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Points links at the site's pages."""
    return rewrite(markdown, page.file.src_uri)


def rewrite(markdown: str, page: str) -> str:
    """Returns the text with links to files of the repository changed.

    Args:
        markdown: Text of a page.
        page: Its path on the site.
    """
    source = SOURCES.get(page, f"docs/{page}")

    def target(match: re.Match[str]) -> str:
        path = posixpath.normpath(
            posixpath.join(posixpath.dirname(source), match[1])
        )
        found = PUBLISHED.get(path)
        if path.startswith("docs/") and (ROOT / path).is_file():
            found = path.removeprefix("docs/")
        if found is None:
            return match[1]
        return posixpath.relpath(found, posixpath.dirname(page) or ".")

    return LINK.sub(target, markdown)
