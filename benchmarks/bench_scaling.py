"""How a step's cost grows: tokens a clip (longer clips), visible ratio, batch, depth; fused beside plain.

One of the four grows at a time, the others stay. Milliseconds a step, PCM to updated weights; the engines must agree.
"""

import dataclasses
import sys

import pytest
import torch
from bench_train_step import ALL, EAGER, time_steps
from conftest import left_out
from records import DEVICE, FULL

from ajepa.config import PRESETS, SIZES, Config

PRESET, SIZE, BATCH = ("tiny", "tiny", 8) if DEVICE == "cpu" else ("audio-jepa", "B", 64)
BASE = {"tokens": 128, "visible": 0.5, "batch": BATCH, "depth": SIZES[SIZE][1]}
GROWTH = {
    "tokens": [128, 512, 2048],
    "visible": [0.2, 0.4, 0.6, 0.8],
    "batch": [BATCH // 4, BATCH, 4 * BATCH],
    "depth": [BASE["depth"] // 2, BASE["depth"], 2 * BASE["depth"]],
}


def config(tokens: int, visible: float, depth: int) -> Config:
    """The preset with clips of so many tokens, a fixed share of them visible, and an encoder of so many layers."""
    cfg = PRESETS[PRESET]
    longer = tokens / cfg.front_end.n_patches
    return dataclasses.replace(
        cfg,
        data=dataclasses.replace(cfg.data, clip_seconds=longer * cfg.data.clip_seconds),
        front_end=dataclasses.replace(cfg.front_end, n_frames=round(longer * cfg.front_end.n_frames)),
        mask=dataclasses.replace(cfg.mask, mask="random", mask_ratio=(1 - visible, 1 - visible)),
        model=dataclasses.replace(cfg.model, size=f"{SIZE} x {depth}", target_layers=1),
    )


@pytest.mark.parametrize("grows", GROWTH)
def test_scaling(grows, record, monkeypatch):
    width, _, heads = SIZES[SIZE]
    base = BASE if DEVICE == "cuda" or grows != "tokens" else {**BASE, "batch": 2}  # 2,048 tokens take seconds
    for value in GROWTH[grows]:
        work = {**base, grows: value}
        batch = work.pop("batch")
        monkeypatch.setitem(SIZES, f"{SIZE} x {work['depth']}", (width, work["depth"], heads))
        try:
            times, more, floor_ms = time_steps(config(**work), batch, ALL if FULL else EAGER)
        except torch.cuda.OutOfMemoryError:
            print(f"  left out: {grows} {value}: does not fit into this GPU's memory", file=sys.stderr)
            continue
        for fields in more.values():
            fields |= {"model": f"{PRESET} {SIZE}" if PRESET != SIZE else PRESET, "grows": grows, "x": value}
        others = ", ".join(f"{name} {x:g}" for name, x in base.items() if name != grows)
        shape = f"{grows} {value:g}; {others}"
        record("scaling", shape, times, plain="eager", peers=["eager", "compile"], floor_ms=floor_ms, more=more)


def test_left_out():
    if not FULL:
        left_out({"compile": "a compilation for every shape: AJEPA_BENCH=full times it"})
    if DEVICE == "cpu":
        left_out({"ViT-B": f"the {PRESET} encoder stands for it: seconds to minutes a step on a CPU"})
