"""Benchmark the switches of the fused step, one at a time, against the step as it is shipped.

Both variants run the same batches in turn. A time is one step, including the host's wait for its end. The time of a
switch counts only if its loss agrees with that of the shipped step at every step. NOTES.md has the prediction, the
measurement and the verdict for each lever.
"""

import dataclasses

import pytest
import torch
from bench_train_step import STEPS, WARM_UP, time_configs
from conftest import left_out
from records import DEVICE, QUICK

from ajepa.config import PRESETS, ObjectiveConfig

if DEVICE == "cpu":
    PRESET, SIZE, BATCHES = ("tiny", "tiny x 1", (8,)) if QUICK else ("tiny", "tiny", (16,))
else:
    PRESET, SIZE, BATCHES = "audio-jepa", "B", (256,) if QUICK else (64, 256)
SHIPPED = "as shipped"
LEVERS = {
    "plain GELU": {"mlp": "plain"},  # as shipped on a CPU
    "bias_gelu": {"mlp": "bias-gelu"},  # as shipped on a GPU
    "GELU epilogues": {"mlp": "epilogue"},
    "bf16 gradient of the stream": {"residual": "bf16-gradient"},
    "recompute": {"recompute": True},
    "no CUDA graph": {"cuda_graph": False},
    "bf16 residual": {"residual": "bf16"},
    "parallel encoders": {"parallel_encoders": True},
    "fp8 targets": {"target_precision": "fp8"},
}
ON_A_CPU = ("bias_gelu", "GELU epilogues", "recompute")
ON_A_GPU = [name for name in LEVERS if name != "bias_gelu"]


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("lever", ON_A_GPU if DEVICE == "cuda" else ON_A_CPU)
def test_levers(lever, batch, record):
    cfg = dataclasses.replace(PRESETS[PRESET], objective=ObjectiveConfig())
    # The targets are those of the last layer, as published. In this case the step leaves out the dead work.
    cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, size=SIZE, target_layers=1))
    changed = dataclasses.replace(cfg, step=dataclasses.replace(cfg.step, **LEVERS[lever]))
    try:
        times, more, floor_ms = time_configs({SHIPPED: cfg, lever: changed}, batch, STEPS, 0, WARM_UP)
    except torch.cuda.OutOfMemoryError:
        pytest.skip(f"{lever} at batch {batch}: two engines do not fit into this GPU's memory side by side")
    for fields in more.values():
        fields["model"] = PRESET
    shape = f"{PRESET}, batch {batch}, {lever}"
    record("levers", shape, times, plain=SHIPPED, peers=[SHIPPED], floor_ms=floor_ms, more=more)


def test_left_out():
    if DEVICE == "cpu":
        left_out({", ".join(name for name in ON_A_GPU if name not in ON_A_CPU and name != "plain GELU"): "need a GPU"})
