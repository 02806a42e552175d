"""The documentation site, and what the pages Kernels, Design and API say of the code."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import ajepa
import ajepa_kernels

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
DESIGN = (DOCS / "design.md").read_text()
KERNELS = (DOCS / "kernels.md").read_text()
PATH = r"`((?:ajepa|kernels|csrc|benchmarks|tests|docs|experiments|examples)/[\w./]*)`"


def sections(page: str) -> dict[str, str]:
    """{heading: text} of the sections of the second level."""
    parts = re.split(r"^## (.+)$", page, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def rows(table: str) -> list[list[str]]:
    """The cells of a Markdown table, without its head."""
    lines = [line for line in table.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]


# --- the site ---------------------------------------------------------------------------------------------------------


def nav_files(node) -> list[str]:
    if isinstance(node, str):
        return [node]
    return [file for child in (node.values() if isinstance(node, dict) else node) for file in nav_files(child)]


def test_nav_holds_every_page_once():
    files = nav_files(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    assert sorted(files) == sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))


def test_site_builds_without_a_warning_and_loads_nothing_from_other_hosts(tmp_path):
    pytest.importorskip("mkdocstrings", reason="the site's generator is not installed: `make docs` installs it")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) > 12
    for page in pages:
        text = page.read_text()
        assert not re.search(r"<(?:script|img|iframe)[^>]*\ssrc=[\"']?(?:https?:)?//", text), page
        assert not re.search(r"<link[^>]*rel=[\"']?stylesheet[^>]*href=[\"']?(?:https?:)?//", text), page
    kernels = (tmp_path / "site" / "api" / "ajepa_kernels.html").read_text()
    assert "Saved for backward" in kernels and "&gt;&gt;&gt;" in kernels and "Example::" not in kernels


@pytest.fixture
def hooks(monkeypatch):
    for name in ("mkdocs", "griffe"):
        pytest.importorskip(name, reason="the site's generator is not installed: `make docs` installs it")
    monkeypatch.syspath_prepend(DOCS)
    import site_hooks

    return site_hooks


def test_examples_and_doctests_of_docstrings_become_code(hooks):
    docstring = "f(x).\n\nExample::\n\n    y = f(1)\n\n    if y:\n        print(y)\n\n>>> f(2)\n4\n\nMore."
    want = (
        "f(x).\n\n**Example**\n\n```python\ny = f(1)\n\nif y:\n    print(y)\n```\n\n```pycon\n>>> f(2)\n4\n```\n\nMore."
    )
    assert hooks.as_markdown(docstring) == want
    assert hooks.as_markdown("In runs/<preset>, `a<b>`, p <- q.") == "In runs/&lt;preset>, `a<b>`, p <- q."
    assert hooks.as_markdown("Nothing to change:\n\n    here") == "Nothing to change:\n\n    here"


def test_links_to_files_of_the_repository_lead_into_the_site(hooks):
    class Page:
        class file:
            abs_src_path, src_uri = str(DOCS / "api" / "ajepa.md"), "api/ajepa.md"

    def moved(text: str) -> str:
        return hooks.on_page_markdown(text, Page())

    assert moved("[n](../../benchmarks/NOTES.md#levers)") == "[n](../repository/benchmarks/NOTES.md#levers)"
    assert moved("[k](../kernels.md#resample)") == "[k](../kernels.md#resample)"
    for same in ("[w](https://a.b/c.md)", "[a](#here)", "[m](../../no_such_file.md)", "`[c](../../README.md)`",
                 "```\n[c](../../README.md)\n```"):  # fmt: skip
        assert moved(same) == same


@pytest.mark.parametrize("name", ["design.md", "kernels.md", "results.md", "api/ajepa.md", "api/ajepa_kernels.md"])
def test_relative_links_lead_to_files(name):
    page = DOCS / name
    links = re.findall(r"\]\((?!https?:)([^)\s#]+)(?:#[^)\s]*)?\)", page.read_text())
    missing = [link for link in links if not (page.parent / link).resolve().is_file()]
    assert not missing


# --- Kernels and API --------------------------------------------------------------------------------------------------

OPS = re.findall(r"^\| \[`(\w+)`\]\(#(\w+)\)", KERNELS, flags=re.MULTILINE)
EXAMPLES = [
    pytest.param(code, id=f"{heading}-{number}")
    for heading, text in sections(KERNELS).items()
    for number, code in enumerate(re.findall(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE))
]


def test_every_op_has_a_section_with_an_example_and_says_when_it_pays():
    found = sections(KERNELS)
    assert [name for name, _ in OPS] == [heading for heading in found if heading != "What all ops share"]
    for name, anchor in OPS:
        assert anchor == name.lower() and hasattr(ajepa_kernels, name)
        assert re.search(r"^```python\n", found[name], flags=re.MULTILINE), name
        assert re.search(r"\*\*(?:It (?:should )?pays?|It does not pay|Whether it pays)", found[name]), name


@pytest.mark.parametrize("code", EXAMPLES)
def test_examples_of_the_kernels_page_run(code):
    exec(compile(code, "docs/kernels.md", "exec"), {})


def test_api_page_has_every_public_name_of_ajepa_kernels():
    page = (DOCS / "api" / "ajepa_kernels.md").read_text()
    documented = re.findall(r"^::: ajepa_kernels\.(\w+)$", page, flags=re.MULTILINE)
    assert sorted(documented) == sorted(ajepa_kernels.__all__)


def test_api_page_of_ajepa_names_what_exists():
    page = (DOCS / "api" / "ajepa.md").read_text()
    named = set()
    for dotted, members in re.findall(
        r"^::: ([\w.]+)$(?:\n +options:\n +members: \[(.*)\])?", page, flags=re.MULTILINE
    ):
        home, _, name = dotted.rpartition(".")
        module, names = (dotted, members.split(", ")) if members else (home, [name])
        assert set(names) <= defined_in(ROOT / f"{module.replace('.', '/')}.py"), dotted
        named.update(names)
    assert set(ajepa.__all__) - {"train", "__version__"} <= named
    assert "run" in named, "which `ajepa.train` stands for"


def defined_in(path: Path) -> set[str]:
    """Functions, classes and variables at the top of a module."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return names


# --- Design -----------------------------------------------------------------------------------------------------------


def test_every_path_named_in_design_exists():
    named = re.findall(PATH, DESIGN)
    assert len(named) > 80
    assert not [path for path in named if not (ROOT / path).exists()]
    data_flow = sections(DESIGN)["How data flows"]
    files = re.findall(r"\b(?:(?:data|model|training)/)?\w+\.py\b|\bdata/\w+/", data_flow)
    assert len(files) > 18
    assert not [path for path in files if not (ROOT / "ajepa" / path).exists()]


def test_map_of_design_names_every_module():
    changes = re.findall(PATH, sections(DESIGN)["Which file for which change"])
    modules = [path for path in (ROOT / "ajepa").rglob("*.py") if path.name != "__init__.py"]
    modules += list((ROOT / "kernels" / "ajepa_kernels").glob("[a-z]*.py"))
    missing = {path.relative_to(ROOT).as_posix() for path in modules} - set(changes)
    assert not missing, "add a row to docs/design.md"


def test_ten_tasks_name_the_file_and_what_is_in_it():
    tasks = rows(sections(DESIGN)["Ten tasks"])
    assert len(tasks) == 10
    for task, file, what in tasks:
        path = ROOT / file.strip("`")
        assert path.is_file(), task
        texts = "".join((ROOT / named).read_text() for named in [file.strip("`"), *re.findall(PATH, what)])
        settings = (ROOT / "ajepa" / "config.py").read_text()
        for name in re.findall(r"`([\w.]+)`", what):
            last = name.split(".")[-1]
            assert re.search(rf"\b{last}\b", texts + settings), f"{task}: {name}"
        assert re.search(rf"\b{re.findall(r'`([^`]+)`', what)[0].split('.')[-1]}\b", path.read_text()), task


def test_every_invariant_names_a_test_file():
    invariants = rows(sections(DESIGN)["What must always hold"])
    assert len(invariants) > 10
    for invariant, test in invariants:
        assert re.search(PATH, test), invariant
