"""Hashes the sources that a measurement runs, so that figures of code that has changed since can be marked.

The hash covers a benchmark's root modules, the modules of this project that they import, and the C++ and CUDA sources
behind them. It ignores comments, docstrings, imports, whitespace and file names: a reworded or moved file is the same
code.
"""

import ast
import fnmatch
import functools
import hashlib
import io
import re
import tokenize
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
PACKAGES = {"ajepa": "ajepa", "ajepa_kernels": "kernels/ajepa_kernels"}
# The C++ and CUDA sources of a module's ops, which no import names.
NATIVE = {
    "ajepa_kernels.log_mel": ("csrc/log_mel*", "csrc/simd_cpu.h"),
    "ajepa_kernels.resample": ("csrc/resample*", "csrc/simd_cpu.h"),
    "ajepa_kernels.products": ("csrc/hopper/*.cu*", "csrc/hopper/*.h"),
}
# Modules that the hash ignores: settings, file access, and the choice between a kernel and its plain definition. A new
# flag, for example, is no new kernel.
NOT_TIMED = {
    "ajepa.config",
    "ajepa.utils.atomic_files",
    "ajepa.training.distributed",
    "ajepa_kernels._extension",
    "ajepa_kernels._triton",
}
STEP, LOADER = ("ajepa.training.engine",), ("ajepa.data.loader", "ajepa.data.resident")
BENCHMARKS = {  # the root modules of each benchmark file
    "bench_adamw_ema": ("ajepa_kernels.adamw_ema",),
    "bench_attention": ("ajepa_kernels.attention",),
    "bench_augment_mel": ("ajepa_kernels.augment_mel",),
    "bench_bias_gelu": ("ajepa_kernels.bias_gelu",),
    "bench_busy_cores": (*STEP, "ajepa.utils.command"),
    "bench_decode": (*LOADER, "ajepa.data.dali"),
    "bench_device": (),
    "bench_end_to_end": (*STEP, *LOADER),
    "bench_fp8": ("ajepa_kernels.fp8", "ajepa_kernels.layer_norm"),
    "bench_gelu_mlp": ("ajepa_kernels.mlp", "ajepa_kernels.bias_gelu"),
    "bench_latent_loss": ("ajepa_kernels.latent_loss",),
    "bench_layer_norm": ("ajepa_kernels.layer_norm",),
    "bench_levers": STEP,
    "bench_loader": LOADER,
    "bench_log_mel": ("ajepa_kernels.log_mel",),
    "bench_masks": ("ajepa.model.masks",),
    "bench_products": ("ajepa_kernels.products", "ajepa_kernels.bias_gelu"),
    "bench_reduction": (*STEP, "ajepa.training.replicas"),
    "bench_resample": ("ajepa_kernels.resample",),
    "bench_rotary": ("ajepa_kernels.attention",),
    "bench_scaling": STEP,
    "bench_segment_pool": ("ajepa_kernels.segment_pool",),
    "bench_sigreg": ("ajepa_kernels.sigreg",),
    "bench_step": STEP,
    "bench_swiglu": ("ajepa_kernels.swiglu",),
    "bench_train_step": STEP,
}


class Tree(NamedTuple):
    """The files of the project, and a function that reads them."""

    files: tuple[str, ...]
    read: Callable[[str], str]


@functools.cache
def working_tree() -> Tree:
    patterns = ("ajepa/**/*.py", "kernels/**/*.py", "csrc/*", "csrc/hopper/*", "benchmarks/*.py", "tests/**/*.py")
    patterns += ("setup.py",)
    files = [path.relative_to(ROOT).as_posix() for pattern in patterns for path in ROOT.glob(pattern) if path.is_file()]
    return Tree(tuple(sorted(files)), lambda path: (ROOT / path).read_text())


def bench_of(item: str) -> str:
    """Return `bench_step` for `benchmarks/bench_step.py::test_step[...]`."""
    return Path(item.partition("::")[0]).stem


def fingerprint(item: str, tree: Tree | None = None) -> str:
    """Return the hash of the code that a pytest item measures; for a test or an unknown benchmark, of all code."""
    return _fingerprint(bench_of(item), tree or working_tree())


def inputs(item: str) -> str:
    """Return the hash of all that decides an item's outcome: the measured code, its own file, and those it imports."""
    return _inputs(item.partition("::")[0])


@functools.cache
def _inputs(own: str) -> str:
    tree = working_tree()
    return _digest([_fingerprint(bench_of(own), tree), *(_plain(path, tree.read(path)) for path in _beside(own, tree))])


def _beside(own: str, tree: Tree) -> set[str]:
    """Return a benchmark's or test's own file, and the benchmarks or tests beside it that it imports."""
    if own not in tree.files:
        return set()
    folder = Path(own).parent
    names = re.findall(r"^(?:from|import) ((?:bench|test)_\w+)", tree.read(own), flags=re.MULTILINE)
    return {own}.union(*(_beside((folder / f"{name}.py").as_posix(), tree) for name in names))


@functools.cache
def _fingerprint(bench: str, tree: Tree) -> str:
    if bench in BENCHMARKS:
        modules = _reached(BENCHMARKS[bench], tree)
        native = [pattern for module in modules for pattern in NATIVE.get(module, ())]
        paths = [modules[module] for module in modules if module not in NOT_TIMED]
        paths += [path for path in tree.files if any(fnmatch.fnmatch(path, pattern) for pattern in native)]
    else:
        paths = [path for path in tree.files if path.startswith((*(f"{p}/" for p in PACKAGES.values()), "csrc/"))]
    texts = {path: _plain(path, tree.read(path)) for path in paths if not path.endswith(".md")}
    return _digest(_digest([_entries(path, texts)]) for path in texts)


def _entries(path: str, texts: dict[str, str]) -> str:
    """Return the code of a file.

    Of the table of launch configurations it holds only the entries of operations that the other files name.
    """
    if not path.endswith("/_tuned.py"):
        return texts[path]
    others = " ".join(text for other, text in texts.items() if other != path)
    text = texts[path]
    for op in set(re.findall(r'\("(\w+_(?:fwd|bwd))", ', text)):
        if f'"{op}"' not in others:
            text = re.sub(rf'\("{op}", [^()]*\): \w+(?:\([^()]*\))?, ?', "", text)
    return text


def _digest(parts: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(sorted(parts)).encode()).hexdigest()[:16]


# --- the modules of a benchmark ---------------------------------------------------------------------------------------


def _reached(roots: Iterable[str], tree: Tree) -> dict[str, str]:
    """Return {module: path} of the roots and of all modules of this project that they import, directly or not."""
    found: dict[str, str] = {}
    waiting = list(roots)
    while waiting:
        module = waiting.pop()
        path = _path(module, tree)
        if path is None or module in found:
            continue
        found[module] = path
        if module not in NOT_TIMED:
            waiting += _imports(path, tree)
    return found


def _path(module: str, tree: Tree) -> str | None:
    package, _, rest = module.partition(".")
    if package not in PACKAGES:
        return None
    place = "/".join([PACKAGES[package], *rest.split(".")] if rest else [PACKAGES[package]])
    return next((path for path in (f"{place}.py", f"{place}/__init__.py") if path in tree.files), None)


@functools.cache
def _imports(path: str, tree: Tree) -> list[str]:
    """Return the modules that the imports of a file name.

    A name that a package re-exports stands for the module that defines it.
    """
    modules: list[str] = []
    for node in ast.walk(ast.parse(tree.read(path))):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names if "." in alias.name]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            home = _path(node.module, tree)
            if home is not None and home.endswith("__init__.py"):
                modules += [_home_of(node.module, alias.name, home, tree) for alias in node.names]
            else:
                modules.append(node.module)
    return modules


@functools.cache
def _home_of(package: str, name: str, init: str, tree: Tree) -> str:
    if _path(f"{package}.{name}", tree):
        return f"{package}.{name}"
    for node in ast.walk(ast.parse(tree.read(init))):
        if isinstance(node, ast.ImportFrom) and node.module and any(alias.name == name for alias in node.names):
            return node.module
    return package


# --- the code of a file -----------------------------------------------------------------------------------------------


@functools.cache
def _plain(path: str, text: str) -> str:
    """Return only the code of a file. Unlike a dump of its syntax tree, it is the same in every version of Python."""
    if path.endswith(".py"):
        text = _without_words(text)
    elif path.startswith("csrc/"):
        text = re.sub(r"/\*.*?\*/|//[^\n]*", " ", text, flags=re.DOTALL)
    return " ".join(text.split())


def _without_words(text: str) -> str:
    """Return Python code without comments, docstrings and imports."""
    lines = text.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    for node in ast.walk(ast.parse(text)):
        is_docstring = (
            isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        )
        if is_docstring or isinstance(node, ast.Import | ast.ImportFrom):
            for row in range(node.lineno, (node.end_lineno or node.lineno) + 1):
                lines[row - 1] = ""
    return "\n".join(lines)
