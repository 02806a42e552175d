"""Benchmark how the cost of a step grows with the tokens per clip (longer clips), visible share, batch and depth.

The fused step runs beside plain PyTorch. Only one of the four quantities changes at a time, and each value is a test of
its own. A time is one step from PCM to updated weights, including the host's wait for its end. The times count only if
the engines give the same losses.
"""

import dataclasses

import pytest
import torch
from bench_train_step import ALL, EAGER, time_steps
from conftest import left_out
from records import DEVICE, FULL, QUICK

from ajepa.config import PRESETS, SIZES, Config, ObjectiveConfig

PRESET, SIZE, BATCH = ("tiny", "tiny", 8) if DEVICE == "cpu" else ("audio-jepa", "B", 64)
DEPTH = 2 if DEVICE == "cpu" and QUICK else SIZES[SIZE][1]
BASE = {"tokens": 128, "visible": 0.5, "batch": BATCH, "depth": DEPTH}
GROWTH = {
    "tokens": [128, 512, 2048],
    "visible": [0.2, 0.4, 0.6, 0.8],
    "batch": [BATCH // 4, BATCH, 4 * BATCH],
    "depth": [DEPTH // 2, DEPTH, 2 * DEPTH],
}
if DEVICE == "cpu" and QUICK:
    GROWTH = {name: values[:2] for name, values in GROWTH.items()}


def config(tokens: int, visible: float, depth: int) -> Config:
    """Return the preset with `tokens` tokens per clip, of which the share `visible` is visible, and `depth` layers."""
    cfg = PRESETS[PRESET]
    longer = tokens / cfg.front_end.n_patches
    return dataclasses.replace(
        cfg,
        data=dataclasses.replace(cfg.data, clip_seconds=longer * cfg.data.clip_seconds),
        front_end=dataclasses.replace(cfg.front_end, n_frames=round(longer * cfg.front_end.n_frames)),
        mask=dataclasses.replace(cfg.mask, mask="random", mask_ratio=(1 - visible, 1 - visible)),
        model=dataclasses.replace(cfg.model, size=f"{SIZE} x {depth}", target_layers=1),
        objective=ObjectiveConfig(),
    )


@pytest.mark.parametrize(("grows", "value"), [(grows, value) for grows in GROWTH for value in GROWTH[grows]])
def test_scaling(grows, value, record, monkeypatch):
    width, _, heads = SIZES[SIZE]
    base = BASE if DEVICE == "cuda" or grows != "tokens" else {**BASE, "batch": 2}  # 2,048 tokens take seconds
    work = {**base, grows: value}
    batch = work.pop("batch")
    monkeypatch.setitem(SIZES, f"{SIZE} x {work['depth']}", (width, work["depth"], heads))
    try:
        times, more, floor_ms = time_steps(config(**work), batch, ALL if FULL else EAGER)
    except torch.cuda.OutOfMemoryError:
        pytest.skip(f"{grows} {value} does not fit into this GPU's memory")
    for fields in more.values():
        fields |= {"model": f"{PRESET} {SIZE}" if PRESET != SIZE else PRESET, "grows": grows, "x": value}
    others = ", ".join(f"{name} {x:g}" for name, x in base.items() if name != grows)
    shape = f"{grows} {value:g}; {others}"
    record("scaling", shape, times, plain="eager", peers=["eager", "compile"], floor_ms=floor_ms, more=more)


def test_left_out():
    if not FULL:
        left_out({"compile": "every shape needs a compilation; AJEPA_BENCH=full times it"})
    if DEVICE == "cpu":
        left_out({"ViT-B": f"a step takes seconds to minutes on a CPU; the {PRESET} encoder is timed in its place"})
