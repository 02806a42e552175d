"""The way of the dependencies, read from the imports; and what importing the public names loads."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMMANDS = ("train", "probe", "finetune", "embed", "export", "convert", "pack", "doctor")
ORDER = ("utils", "config", "data", "model", "evaluation", "training", "commands")
MAY_READ = {"encoder": ("utils", "config", "model")}  # for everything else, all that stands before it in ORDER


def modules() -> dict[str, Path]:
    """{dotted name below ajepa: file}"""
    files = sorted((ROOT / "ajepa").rglob("*.py"))
    names = (path.relative_to(ROOT / "ajepa").with_suffix("").as_posix().replace("/", ".") for path in files)
    return {name.removesuffix(".__init__"): path for name, path in zip(names, files, strict=True)}


def imports(path: Path, known: set[str]) -> set[str]:
    """The modules of ajepa that a file imports anywhere in it, within functions, too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert not node.level, f"{path}: relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name.removeprefix("ajepa.") in known else node.module for name in names}
    return {name.removeprefix("ajepa.") for name in found if name.startswith("ajepa.")}


def layer(module: str) -> str:
    first = module.partition(".")[0]
    return "commands" if first in COMMANDS else first


def graph() -> dict[str, set[str]]:
    every = modules()
    known = set(every)
    return {name: imports(path, known) for name, path in every.items() if name not in ("__init__", "__main__")}


def test_dependencies_run_one_way():
    wrong = []
    for module, read in graph().items():
        for other in read:
            mine, theirs = layer(module), layer(other)
            if mine == "encoder":
                fine = theirs in MAY_READ["encoder"]
            elif theirs == "encoder":
                fine = mine == "commands"
            elif mine == theirs == "commands":
                fine = module == other
            else:
                fine = ORDER.index(theirs) <= ORDER.index(mine)
            wrong += [] if fine else [f"{module} imports {other}"]
    assert not wrong


def test_no_module_imports_itself_through_others():
    reads, done = graph(), set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, f"a circle: {' -> '.join([*path, module])}"
        if module not in done:
            for other in sorted(reads.get(module, ())):
                visit(other, (*path, module))
            done.add(module)

    for module in reads:
        visit(module, ())


def test_every_module_has_a_layer_and_a_first_sentence():
    for name, path in modules().items():
        assert name in ("__init__", "__main__", "encoder") or layer(name) in ORDER, name
        assert (ast.get_docstring(ast.parse(path.read_text())) or "").strip(), f"{name} does not say what it is for"


def test_the_kernels_do_not_know_the_project():
    for path in (ROOT / "kernels").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.partition(".")[0] == "ajepa" for name in names), path
    assert not (ROOT / "kernels" / "__init__.py").exists()


HEAVY = ("torch.distributed.fsdp", "torch.distributed.tensor", "matplotlib", "tensorboard", "nvidia.dali", "sklearn")


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import ajepa", ("torch", "numpy")),
        ("import ajepa; ajepa.Encoder", (*HEAVY, "tyro", "rich", "torchaudio", "ajepa.training", "ajepa.data")),
        ("import ajepa; ajepa.preset('tiny')", (*HEAVY, "torchaudio", "ajepa.training", "ajepa.data")),
        ("import ajepa.training.run_log, ajepa.evaluation.plots", ("matplotlib", "tensorboard", "wandb")),
        ("import ajepa_kernels", (*HEAVY, "ajepa", "tyro", "pydantic", "soundfile", "torchaudio", "numpy.testing")),
    ],
)
def test_importing_loads_no_more_than_it_needs(statement, absent):
    # torch itself imports some of these in some versions: only what the statement adds to `import torch` counts
    before = "" if statement == "import ajepa" else "import torch\n"
    code = f"import sys\n{before}had = set(sys.modules)\n{statement}\nprint(*sorted(set(sys.modules) - had))"
    loaded = subprocess.check_output([sys.executable, "-c", code], text=True, cwd=ROOT).split()
    assert "ajepa" in " ".join(loaded)
    assert not [name for name in loaded if name in absent or name.startswith(tuple(f"{a}." for a in absent))]
