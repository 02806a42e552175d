"""One whole training step, PCM to updated weights: ours beside plain PyTorch, eager and compiled.

The engines must agree before they are timed: the same losses over the first steps.
"""

import dataclasses

import pytest
import torch

from ajepa.compare import time_engines
from ajepa.config import PRESETS, Config
from ajepa.engine import Engine
from ajepa.masks import MaskSampler

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# (preset, encoder size, batch): what a CPU does in seconds; the published sizes on a GPU.
CASES = (
    [("tiny", "tiny", 64), ("audio-jepa", "S", 2), ("a-jepa", "S", 1)]
    if DEVICE.type == "cpu"
    else [("audio-jepa", size, batch) for size in ("S", "B", "L") for batch in (64, 256, 1024)] + [("a-jepa", "B", 64)]
)


def batches(cfg: Config, batch: int, count: int):
    generator = torch.Generator().manual_seed(0)
    samples = round(cfg.data.clip_seconds * cfg.front_end.sample_rate)
    sampler = MaskSampler(cfg.mask, cfg.front_end.grid)
    lengths = torch.full((batch,), samples, dtype=torch.int32)
    for step in range(count):
        pcm = torch.randint(-9999, 9999, (batch, samples), dtype=torch.int16, generator=generator)
        yield pcm.to(DEVICE), lengths.to(DEVICE), sampler(step, cfg.optim.steps, batch).to(DEVICE)


@pytest.mark.parametrize(("preset", "size", "batch"), CASES)
def test_train_step(preset, size, batch, record):
    cfg = PRESETS[preset]
    cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, size=size))
    work = list(batches(cfg, batch, 5))
    losses = {}
    for impl in ("reference", "fused"):
        engine = Engine(dataclasses.replace(cfg, impl=impl), DEVICE)
        losses[impl] = [engine.step(*b, cfg.optim.warmup_steps).loss.item() for b in work[:2]]
    tolerance = 2e-3 if DEVICE.type == "cpu" else 3e-2  # bf16
    assert losses["fused"] == pytest.approx(losses["reference"], rel=tolerance)

    seconds = time_engines(cfg, DEVICE, work, ["reference", "compile", "fused"])
    times = {impl: [1e3 * t for t in values] for impl, values in seconds.items()}
    record("train_step", f"{preset} {size} batch {batch}", times, plain="reference", peers=["reference", "compile"])
