"""The hash that decides whether a figure was measured with the current code."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import sources
from sources import BENCHMARKS, NATIVE, ROOT, Tree, fingerprint, working_tree

NORM, STEP = "benchmarks/bench_layer_norm.py::test_fp32_stream[x]", "benchmarks/bench_step.py::test_step[x]"
LOSS, MEL = "benchmarks/bench_latent_loss.py::test_latent_loss[x]", "benchmarks/bench_log_mel.py::test_log_mel[x]"
MASKS = "benchmarks/bench_masks.py::test_masks[x]"
ALL = (NORM, STEP, LOSS, MEL, MASKS)


def changed(path: str, old: str, new: str) -> set[str]:
    """The items whose hash changes when `old` is replaced by `new` in one file."""
    current = working_tree()
    text = current.read(path)
    assert old in text, f"{path} does not hold {old!r}"
    tree = Tree(current.files, lambda other: text.replace(old, new, 1) if other == path else current.read(other))
    return {item for item in ALL if fingerprint(item, tree) != fingerprint(item)}


KERNELS = "kernels/ajepa_kernels/"


@pytest.mark.parametrize(
    ("path", "old", "new", "items"),
    [
        (KERNELS + "layer_norm.py", "tl.store(", "tl.load(", {NORM, STEP}),
        (KERNELS + "latent_loss.py", "tl.store(", "tl.load(", {LOSS, STEP}),
        (KERNELS + "_chunks.py", "def ", "def  x_", {NORM, LOSS, STEP}),  # used by both
        ("csrc/log_mel_kernel.cuh", "#pragma once", "#pragma once\nint x;", {MEL, STEP}),
        ("csrc/README.md", "log", "gol", set()),
        ("ajepa/model/masks.py", "return", "return 1 +", {MASKS, STEP}),
        ("ajepa/config.py", "batch_size: int = 256", "batch_size: int = 512", set()),  # no benchmark measures it
        ("ajepa/probe.py", "return", "return 1 +", set()),
    ],
)
def test_a_change_affects_the_items_that_run_the_code(path, old, new, items):
    assert changed(path, old, new) == items


@pytest.mark.parametrize(
    ("path", "old", "new"),
    [
        (KERNELS + "layer_norm.py", '"""', '"""Reworded. '),
        (KERNELS + "layer_norm.py", "\nimport ", "\nimport os\nimport "),
        (KERNELS + "layer_norm.py", "\n\n\n", "\n\n\n\n# and why\n\n"),
        ("csrc/log_mel_kernel.cuh", "\n", "\n// and why\n/* or\n how */\n"),
    ],
)
def test_comments_docstrings_and_imports_do_not_change_the_hash(path, old, new):
    assert changed(path, old, new) == set()


def test_a_tuned_entry_affects_only_its_operation():
    """Of these items, only the step runs attention."""
    entry = '("attention_fwd", 16, 128, 64): Tiles('
    assert changed(KERNELS + "_tuned.py", entry, entry + "16 + ") == {STEP}
    assert changed(KERNELS + "_tuned.py", "class Rows", "class Rows_") >= {NORM, LOSS, STEP}, "its code affects all"


def test_a_moved_file_is_the_same_code():
    current, old, new = working_tree(), KERNELS + "layer_norm.py", KERNELS + "norm/__init__.py"
    init = KERNELS + "__init__.py"
    files = tuple(new if path == old else path for path in current.files)

    def read(path: str) -> str:
        text = current.read(old if path == new else path)
        return text.replace("ajepa_kernels.layer_norm", "ajepa_kernels.norm") if path.endswith(".py") else text

    moved = Tree(files, read)
    assert fingerprint(STEP, moved) == fingerprint(STEP) and init in files


def test_every_benchmark_and_root_is_there():
    files = {path.stem for path in (ROOT / "benchmarks").glob("bench_*.py")}
    assert files == set(BENCHMARKS), "name a new benchmark's modules in sources.py"
    tree = working_tree()
    for module in {module for modules in BENCHMARKS.values() for module in modules} | set(NATIVE):
        assert sources._path(module, tree), f"{module} is not a module of this project"
    for pattern in (pattern for patterns in NATIVE.values() for pattern in patterns):
        assert list(ROOT.glob(pattern)), f"{pattern} matches no file of this project"


@pytest.mark.parametrize(
    ("item", "paths"),
    [
        ("bench_levers.py::test_levers[x]", ("bench_levers.py", "bench_train_step.py", "bench_step.py")),
        ("bench_end_to_end.py::test_from_shards[x]", ("bench_end_to_end.py", "bench_step.py")),
    ],
)
def test_inputs_include_the_benchmark_file_and_its_imports(item, paths, monkeypatch):
    current, item = working_tree(), f"benchmarks/{item}"
    before = sources.inputs(item)
    for path in (f"benchmarks/{path}" for path in paths):
        changed = Tree(current.files, lambda other, path=path: current.read(other) + "\nx = 1\n" * (other == path))
        monkeypatch.setattr(sources, "working_tree", lambda changed=changed: changed)
        sources._inputs.cache_clear()
        assert sources.inputs(item) != before, path
        assert fingerprint(item, changed) == fingerprint(item, current), "the measured code has not changed"
    sources._inputs.cache_clear()
