"""What the documentation site needs beyond mkdocs: links to files outside docs/, and docstrings as Markdown.

A page may link any file of the repository by its relative path, as it does on a code host. The site then carries a copy
of that file, below repository/, and the link leads there. A path that does not exist stays as it is, and mkdocs reports
it.
"""

import os
import re
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import griffe
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
COPIES = "repository"
FENCE = re.compile(r"^( *)(```+|~~~+).*?^\1\2[^\S\n]*$|`[^`\n]+`", flags=re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?<=\]\()([^\s()<>]+)(?=\))")


# --- links to files of the repository ---------------------------------------------------------------------------------


def on_files(files: Files, config) -> Files:
    """Add a copy of every file outside docs/ that a page links, and of those that the copied pages link."""
    pages = [Path(file.abs_src_path) for file in files.documentation_pages()]
    known = set(pages)
    while pages:
        page = pages.pop()
        for target in _linked_files(page):
            if target not in known and not target.is_relative_to(DOCS):
                known.add(target)
                files.append(File.generated(config, _place(target), abs_src_path=str(target)))
                pages += [target] if target.suffix == ".md" else []
    return files


def on_page_markdown(markdown: str, page, **_) -> str:
    """Point the links of a page to where the site has their files."""
    source = Path(page.file.abs_src_path)
    folder = os.path.dirname(page.file.src_uri)

    def moved(link: str) -> str:
        target = _file_of(source, link)
        if target is None:
            return link
        fragment = urlsplit(link).fragment
        return os.path.relpath(_place(target), folder or ".").replace(os.sep, "/") + f"#{fragment}" * bool(fragment)

    return _map_links(markdown, moved)


def _linked_files(page: Path) -> list[Path]:
    found: list[str] = []
    _map_links(page.read_text(encoding="utf-8"), lambda link: found.append(link) or link)
    return [target for link in found if (target := _file_of(page, link))]


def _map_links(markdown: str, change: Callable[[str], str]) -> str:
    """The text with the target of each link changed."""
    return _outside_code(markdown, lambda text: LINK.sub(lambda link: change(link[0]), text))


def _outside_code(markdown: str, change: Callable[[str], str]) -> str:
    """The text with everything changed that is not code."""
    parts, end = [], 0
    for code in FENCE.finditer(markdown):
        parts += [change(markdown[end : code.start()]), code[0]]
        end = code.end()
    return "".join([*parts, change(markdown[end:])])


def _file_of(page: Path, link: str) -> Path | None:
    """The file of the repository that a relative link of `page` leads to; None where there is none."""
    parts = urlsplit(link)
    if parts.scheme or parts.netloc or not parts.path:
        return None
    target = (page.parent / parts.path).resolve()
    return target if target.is_file() and target.is_relative_to(ROOT) else None


def _place(target: Path) -> str:
    """Where the site has a file of the repository."""
    if target.is_relative_to(DOCS):
        return target.relative_to(DOCS).as_posix()
    return f"{COPIES}/{target.relative_to(ROOT).as_posix()}"


# --- docstrings -------------------------------------------------------------------------------------------------------


class MarkdownDocstrings(griffe.Extension):
    """Passes every docstring through `as_markdown`."""

    def on_object(self, *, obj: griffe.Object, **_) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)


def as_markdown(docstring: str) -> str:
    """`docstring` with its indented examples and its doctests as fenced blocks, and with no HTML in its prose."""

    def example(found: re.Match) -> str:
        lines = [line[4:] for line in found[1].rstrip().split("\n")]
        return "\n".join(["**Example**", "", "```python", *lines, "```", ""])

    docstring = re.sub(r"^Examples?::\n\n((?: {4}.*(?:\n|\Z)|\n)+)", example, docstring, flags=re.MULTILINE)
    doctest = r"^>>> .*(?:\n(?!$).*)*"
    docstring = re.sub(doctest, lambda found: f"\n```pycon\n{found[0]}\n```", docstring, flags=re.MULTILINE)
    return _outside_code(docstring, lambda text: re.sub(r"<(?=[a-zA-Z/!])", "&lt;", text))
