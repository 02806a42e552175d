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
@pytest.mark.parametrize(
    ("preset", "ranks"),
    [("audio-jepa", 1), ("a-jepa", 1), ("a-jepa", 8)],
    ids=["audio-jepa", "a-jepa", "a-jepa-8-ranks"],
)
def test_masks(preset, ranks, fixed, batch, record):
    """One of several ranks draws the masks of its `batch` clips; ragged masks are drawn for all ranks and dealt out."""
    cfg = PRESETS[preset]
    mask = dataclasses.replace(cfg.mask, fixed_token_budget=fixed)
    sampler = MaskSampler(mask, cfg.front_end.grid, world_size=ranks)

    def draw(device: str) -> torch.Tensor:
        with torch.device(device):
            return sampler(7, 10, batch).target

    devices = dict.fromkeys(["cpu", DEVICE])
    assert all(torch.equal(draw(device).cpu(), draw("cpu")) for device in devices)
    # not in a CUDA graph, because the host needs the token counts
    times = {f"on the {device.upper()}": [timed(draw, device) for _ in range(ROUNDS)] for device in devices}
    clips = f"{batch} clips" if ranks == 1 else f"{batch} of {ranks * batch} clips"
    record("masks", f"{preset}, {clips}{', fixed budget' * fixed}", times)


def timed(draw, device: str) -> float:
    begin = time.perf_counter()
    draw(device)
    if device == "cuda":
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - begin)
