"""Benchmark drawing and packing the masks of one step, on the device and on the CPU.

A step of 1,024 clips must not wait for its masks. At 8,000 clips/s such a step takes 128 ms.
"""

import dataclasses
import time

import pytest
import torch
from records import DEVICE, QUICK

from ajepa.config import PRESETS
from ajepa.model.masks import MaskSampler

BATCHES = [64] if DEVICE == "cpu" else [1024] if QUICK else [64, 256, 1024]
ROUNDS = 3 if QUICK else 7


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("preset", ["audio-jepa", "a-jepa"])
def test_masks(preset, fixed, batch, record):
    cfg = PRESETS[preset]
    sampler = MaskSampler(dataclasses.replace(cfg.mask, fixed_token_budget=fixed), cfg.front_end.grid)

    def draw(device: str) -> torch.Tensor:
        with torch.device(device):
            return sampler(7, 10, batch).target

    devices = dict.fromkeys(["cpu", DEVICE])
    assert all(torch.equal(draw(device).cpu(), draw("cpu")) for device in devices)
    # not in a CUDA graph, because the host needs the token counts
    times = {f"on the {device.upper()}": [timed(draw, device) for _ in range(ROUNDS)] for device in devices}
    record("masks", f"{preset}, {batch} clips{', fixed budget' * fixed}", times)


def timed(draw, device: str) -> float:
    begin = time.perf_counter()
    draw(device)
    if device == "cuda":
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - begin)
