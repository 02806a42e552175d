"""The trainings of examples/adopt: the same losses with the operations as in plain PyTorch, and few changed lines."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from oracle import CAN_LAUNCH, DEVICE

import ajepa_kernels

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "adopt"


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


diffs = load("diffs")


def directions(z: torch.Tensor, step: int) -> torch.Tensor:
    """The random directions of `sigreg`, for the plain LeJEPA."""
    return torch.ops.ajepa.sigreg_plain_directions(torch.tensor(step), 256, z.shape[-1], torch.float32).to(z)


# Shifts that the following layer takes away again: their gradient is rounding noise, which Adam scales up. The keys'
# part of a qkv bias does not change a softmax, unless rotary tables turn it; a batch norm subtracts the mean.
NO_GRADIENT = {"lejepa": ("norm.bias", "projector.0.bias", "projector.1.running_mean")}
INTERPRETED = CAN_LAUNCH and DEVICE == "cpu"  # kernels take seconds there
TINY = {"BATCH": 2, "WIDTH": 32, "HEADS": 1, "DEPTH": 1, "PREDICTOR_DEPTH": 1} if INTERPRETED else {}


def both(family: str, steps: int, monkeypatch) -> list[tuple[torch.Tensor, list[dict[str, torch.Tensor]]]]:
    """(losses, state dicts) of the plain training and of the one with the operations."""
    results = []
    for name in (family, f"{family}_ops"):
        module = load(name)
        for size, value in TINY.items():
            monkeypatch.setattr(module, size, value, raising=False)
        if hasattr(module, "directions"):
            monkeypatch.setattr(module, "directions", directions)
        losses, networks = module.train(steps, DEVICE)
        results.append((losses, [network.state_dict() for network in networks]))
    return results


def kernels_on_any_device(monkeypatch) -> None:
    """Makes impl="auto" choose the kernels, for Triton's interpreter."""
    choose = ajepa_kernels._triton.use_triton
    for name, module in list(sys.modules.items()):
        if name.startswith("ajepa_kernels.") and getattr(module, "use_triton", None) is choose:
            monkeypatch.setattr(module, "use_triton", lambda op, impl, *rest: choose(op, "triton", *rest))


# V-JEPA 2's has the most kernels; the interpreter takes seconds for each family.
@pytest.mark.parametrize("family", ["vjepa2"] if INTERPRETED else diffs.FAMILIES)
def test_training_is_the_same(family, monkeypatch):
    """In float32, the losses agree to 1e-4, and each weight to 1e-3 of its change and 1e-6 of its size."""
    steps = 1 if INTERPRETED else 20
    if CAN_LAUNCH:
        kernels_on_any_device(monkeypatch)
    start = both(family, 0, monkeypatch)[0][1]
    (plain, before), (ops, after) = both(family, steps, monkeypatch)
    torch.testing.assert_close(ops, plain, rtol=1e-4, atol=0)
    assert steps < 20 or plain[-3:].mean() < 0.9 * plain[:3].mean()
    for first, want, got in zip(start, before, after, strict=True):
        assert {name for name in want if not name.startswith("log_mel.")} <= set(got)
        for name in want.keys() & got.keys():
            tensors = [x[name].float() for x in (first, want, got)]
            if name in NO_GRADIENT.get(family, ()):
                continue
            if name.endswith("qkv.bias") and family != "vjepa2":
                tensors = [x.unflatten(0, (3, -1))[::2] for x in tensors]
            x, w, g = tensors
            assert (g - w).norm() <= 1e-3 * (w - x).norm() + 1e-6 * w.norm(), name


@pytest.mark.parametrize("family", diffs.FAMILIES)
def test_few_lines_change(family):
    new, fewer = diffs.counts(family)
    assert 0 < new <= 10 and fewer > 0
    for name in (family, f"{family}_ops"):
        assert len((FOLDER / f"{name}.py").read_text().splitlines()) < 250


def test_diffs_of_the_page_are_those_of_the_files():
    text = diffs.PAGE.read_text()
    assert [family for _, family, _ in diffs.BLOCK.findall(text)] == list(diffs.FAMILIES)
    assert diffs.page(text) == text, "run python examples/adopt/diffs.py"


def test_counts_leave_out_blank_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(diffs, "HERE", tmp_path)
    (tmp_path / "a.py").write_text("x = 1\ny = 2\n\nz = 3\nw = 4\n")
    (tmp_path / "a_ops.py").write_text("x = 1\n\n\nz = 5\nw = 4\n")
    assert diffs.counts("a") == (1, 1)


@pytest.mark.skipif(INTERPRETED, reason="is tested without the interpreter")
def test_examples_run_by_themselves():
    """Each prints a loss for each step, without the trainer and its dependencies."""
    files = [str(FOLDER / f"{family}{end}.py") for family in diffs.FAMILIES for end in ("", "_ops")]
    code = (
        "import runpy, sys\nsys.modules['ajepa'] = sys.modules['numpy'] = None\n"
        f"for file in {files!r}:\n    print('file', file)\n    runpy.run_path(file, run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    printed = [part.splitlines()[1:] for part in done.stdout.split("file ")[1:]]
    assert len(printed) == len(files)
    for lines in printed:
        losses = [float(line.split()[1]) for line in lines]
        assert len(losses) == 20 and losses[-1] < losses[0]
