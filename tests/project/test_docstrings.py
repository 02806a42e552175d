"""The examples in docstrings run, and every operation's docstring has one."""

import ast
import doctest
import importlib
import inspect
import re
import shutil
import textwrap
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from oracle import DEVICE

import ajepa
import ajepa_kernels

ROOT = Path(__file__).parents[2]
HEADING = re.compile(r"^( *)Examples?::?\n", re.MULTILINE)
SHAPE = re.compile(r"# [^\[]*\[(\d+(?:, \d+)*)\]")  # such as "# [101, 12, 64]"

# Statements that stand for what the reader has already.
SETUP = {
    "Encoder": "waveform = torch.randn(2, 30_000)",
    "load_classifier": """
        from ajepa.model.frontend import FrontEnd
        pcm, lengths = torch.randint(-999, 999, (2, 8_000), dtype=torch.int16), torch.tensor([8_000, 6_000])
        """,
    "bias_gelu": """
        mlp = torch.nn.Module()
        mlp.fc1, mlp.fc2 = torch.nn.Linear(32, 128), torch.nn.Linear(128, 32)
        x = torch.randn(5, 32)
        """,
    "gelu_mlp": """
        mlp = torch.nn.Module()
        mlp.fc1, mlp.fc2 = torch.nn.Linear(32, 128), torch.nn.Linear(128, 32)
        x = torch.randn(5, 32)
        """,
    "Scaling": """
        weight, next_weight = torch.randn(128, 768), torch.randn(64, 128)
        """,
    "fp8_linear": """
        layer, next_layer = torch.nn.Linear(32, 64), torch.nn.Linear(64, 32)
        x = torch.randn(5, 32)
        """,
}
SHORT_RUN = (  # in place of "steps=200", which takes a minute
    "steps=2, warmup_steps=1, clip_seconds=0.5, n_frames=16, hop_length=480, min_context=2, batch_size=4, "
    "eval_clips=40, compare_steps=0"
)


class Example(NamedTuple):
    module: str
    name: str
    code: str


def example_blocks(docstring: str) -> list[str]:
    """The indented code after each line "Example::"."""
    blocks = []
    for heading in HEADING.finditer(docstring):
        rest = docstring[heading.end() :]
        end = re.search(rf"^ {{0,{len(heading[1])}}}\S", rest, re.MULTILINE)
        blocks.append(textwrap.dedent(rest[: end.start() if end else None]).strip())
    return blocks


def docstrings() -> list[tuple[str, str, str]]:
    """(module, qualified name, docstring) of everything in both packages, read without importing it."""
    found = []

    def visit(node: ast.AST, module: str, outer: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef | ast.FunctionDef):
                found.append((module, outer + child.name, ast.get_docstring(child) or ""))
                visit(child, module, f"{outer}{child.name}.")

    for folder in (ROOT, ROOT / "kernels"):
        package = "ajepa" if folder == ROOT else "ajepa_kernels"
        for path in sorted((folder / package).rglob("*.py")):
            module = ".".join(path.relative_to(folder).with_suffix("").parts).removesuffix(".__init__")
            tree = ast.parse(path.read_text(encoding="utf-8"))
            found.append((module, "", ast.get_docstring(tree) or ""))
            visit(tree, module, "")
    return found


EXAMPLES = [Example(module, name, code) for module, name, doc in docstrings() for code in example_blocks(doc)]
DOCTESTS = [Example(module, name, doc) for module, name, doc in docstrings() if ">>> " in doc]


def label(example: Example) -> str:
    return f"{example.module}.{example.name}"


def reader(example: Example) -> dict:
    """The names of someone who reads the example: the documented object, both packages, torch and the operations."""
    names = {"torch": torch, "F": F, "ajepa": ajepa, "ajepa_kernels": ajepa_kernels}
    names |= {name: getattr(ajepa_kernels, name) for name in ajepa_kernels.__all__}
    outermost = example.name.split(".")[0]
    return names | {outermost: getattr(importlib.import_module(example.module), outermost)} if outermost else names


def lay_out_run(request) -> None:
    results_of_others = shutil.ignore_patterns("finetune*", "probe*")  # the tests share the run
    shutil.copytree(request.getfixturevalue("run"), "runs/mine", ignore=results_of_others)


def lay_out_recordings(request) -> None:
    shutil.copytree(request.getfixturevalue("tones"), "recordings")


def lay_out_classifier(request) -> None:
    from ajepa import finetune

    lay_out_run(request)
    wavs = sorted(request.getfixturevalue("tones").rglob("*.wav"))
    rows = [f"{path},{path.parent.name},{i % 2}" for i, path in enumerate(wavs)]
    Path("labels.csv").write_text("\n".join(["file,label,fold", *rows]))
    assert finetune.main(["runs/mine", "--data", "labels.csv", "--test", "fold=1", "--epochs", "1"]) == 0


FILES = {  # that an example reads
    "Encoder": lay_out_run,
    "load_classifier": lay_out_classifier,
    "preset": lay_out_recordings,
    "run": lay_out_recordings,
}


@pytest.mark.parametrize("example", EXAMPLES, ids=label)
def test_example_runs(example, request, tmp_path, monkeypatch):
    """Each statement in turn; a shape in its comment is the shape of what it assigns."""
    monkeypatch.chdir(tmp_path)
    if example.name in FILES:
        FILES[example.name](request)
    names, code = reader(example), example.code.replace('"cuda"', repr(DEVICE)).replace("steps=200", SHORT_RUN)
    exec(textwrap.dedent(SETUP.get(example.name, "")), names)
    for statement in ast.parse(code).body:
        exec(compile(ast.Module([statement], []), label(example), "exec"), names)
        comment = SHAPE.search(code.splitlines()[statement.end_lineno - 1])
        if comment and isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
            shape = names[statement.targets[0].id].shape
            assert list(shape) == [int(size) for size in comment[1].split(", ")], comment[0]


@pytest.mark.parametrize("example", DOCTESTS, ids=label)
def test_doctest_prints_what_it_says(example):
    said = []
    test = doctest.DocTestParser().get_doctest(example.code, reader(example), label(example), None, 0)
    assert doctest.DocTestRunner().run(test, out=said.append).failed == 0, "".join(said)


def test_examples_are_found():
    """A heading, its indented block and nothing after it; the tables above name only examples that there are."""
    doc = "Adds.\n\nExample::\n\n    a = 1\n    if a:\n        b = 2\n\nRaises:\n    ValueError: no.\n"
    doc += "\nExample:\n    c = 3"
    assert example_blocks(doc) == ["a = 1\nif a:\n    b = 2", "c = 3"]
    assert len(EXAMPLES) + len(DOCTESTS) >= 14
    assert SETUP.keys() | FILES.keys() <= {example.name for example in EXAMPLES}


def operations() -> list[str]:
    """The public functions and classes, save records and the plain definitions, which their operations document."""
    public = {name: getattr(ajepa_kernels, name) for name in ajepa_kernels.__all__}
    records = [name for name, x in public.items() if not callable(x) or (inspect.isclass(x) and issubclass(x, tuple))]
    return [name for name in public if name not in records and not name.rstrip("_").endswith("_reference")]


@pytest.mark.parametrize("name", operations())
def test_operation_is_documented(name):
    doc = inspect.getdoc(getattr(ajepa_kernels, name)) or ""
    assert HEADING.search(doc) or ">>> " in doc, "no example"
    assert re.search(r"^Raises:$", doc, re.MULTILINE), "no section on what it raises"


@pytest.mark.parametrize("name", [name for name in ajepa_kernels.__all__ if name.rstrip("_").endswith("_reference")])
def test_plain_definition_names_its_operation(name):
    operation = name.replace("_reference", "")
    assert f"`{operation}`" in (inspect.getdoc(getattr(ajepa_kernels, name)) or "")
