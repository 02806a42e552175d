"""The examples train, and give the same results with the ops as with plain PyTorch."""

import importlib.util
from pathlib import Path

import pytest
import torch
from oracle import DEVICE

EXAMPLES = Path(__file__).parents[2] / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["vision_ijepa", "audio_jepa"])
def test_example(name):
    example = load(name)
    plain, ops = (example.train(12, ops=ops, device=DEVICE) for ops in (False, True))
    torch.testing.assert_close(torch.tensor(ops), torch.tensor(plain), rtol=2e-3, atol=1e-4)
    assert sum(ops[-3:]) < 0.8 * sum(ops[:3])


@pytest.mark.parametrize("name", ["vision_ijepa", "audio_jepa"])
def test_the_change_is_a_few_lines(name):
    lines = (EXAMPLES / f"{name}.py").read_text().splitlines()
    assert 0 < sum("# <- ops" in line for line in lines) <= 6
