"""One whole training step, PCM to updated weights: fused beside plain PyTorch, eager and compiled.

The engines must agree before their times count: the same losses, step after step. The floor is the FLOPs of the step,
over its ragged masks, at the rate of a matrix product measured in the same run; a variant's share of it is its MFU.
Shapes recur: random masks have their mean ratio in every clip, so that plain PyTorch needs no padding, other families a
fixed number of tokens. The phases are timed apart, with a wait after each and outside CUDA graphs. Peak memory is what
an engine reserved for weights, moments and its first steps.
"""

import dataclasses
import statistics
import sys

import pytest
import torch
import torch._inductor.config
from conftest import left_out
from records import DEVICE, FULL

from ajepa.ceilings import product_flops_per_ms
from ajepa.compare import time_engines
from ajepa.config import PRESETS, Config
from ajepa.masks import MaskSampler

NAMES = {"reference": "eager", "compile": "compile", "fused": "fused"}
EAGER, ALL = ("reference", "fused"), ("reference", "compile", "fused")
# (preset, encoder size, batch, engines): what a CPU does in seconds, the published sizes on a GPU.
if DEVICE == "cpu":
    CASES = [("tiny", "tiny", 64, ALL), ("audio-jepa", "S", 2, EAGER), ("a-jepa", "S", 1, EAGER)]
    LEFT_OUT = {"ViT-B and L, larger batches": "seconds to minutes a step on a CPU", "peak memory": "CUDA only"}
    STEPS, WARM_UP, SPLIT = 4, 1, 1
else:
    CASES = [("audio-jepa", "B", 1024, ALL), ("audio-jepa", "B", 256, ALL), ("audio-jepa", "B", 64, EAGER)]
    CASES += [("audio-jepa", size, batch, EAGER) for size in ("S", "L") for batch in (64, 256, 1024)]
    CASES += [("a-jepa", size, batch, EAGER) for size, batch in (("B", 64), ("B", 256), ("S", 256), ("L", 64))]
    LEFT_OUT = {}
    STEPS, WARM_UP, SPLIT = 10, 3, 3  # a graph is replayed from the third step of its shapes
if FULL:
    CASES = [(*case[:3], ALL) for case in CASES]
    torch._inductor.config.max_autotune = True
else:
    LEFT_OUT["compile at the other sizes, and with max-autotune"] = (
        "minutes of compilation: AJEPA_BENCH=full times them"
    )


def batches(cfg: Config, batch: int, count: int):
    device = torch.device(DEVICE)
    generator = torch.Generator().manual_seed(0)
    samples = round(cfg.data.clip_seconds * cfg.front_end.sample_rate)
    sampler = MaskSampler(cfg.mask, cfg.front_end.grid)
    lengths = torch.full((batch,), samples, dtype=torch.int32, device=device)
    pcm = [torch.randint(-9999, 9999, (batch, samples), dtype=torch.int16, generator=generator) for _ in range(2)]
    pcm = [x.to(device) for x in pcm]  # two for all steps: the memory is the engines'
    for step in range(count):
        yield pcm[step % 2], lengths, sampler(step, cfg.optim.steps, batch).to(device)


def time_steps(cfg: Config, batch: int, impls, steps: int = STEPS, split_steps: int = 0):
    """(milliseconds by variant, further fields by variant, floor in milliseconds) of engines that agree."""
    # Each batch may compile anew, until the bounds on lengths are taken for variables.
    warm_up = steps if "compile" in impls else WARM_UP
    configs = {NAMES[impl]: dataclasses.replace(cfg, impl=impl) for impl in impls}
    return time_configs(configs, batch, steps, split_steps, warm_up)


def time_configs(configs: dict[str, Config], batch: int, steps: int, split_steps: int, warm_up: int):
    """The same of any configurations; all must train as the first does."""
    for name, cfg in configs.items():
        optim = dataclasses.replace(cfg.optim, warmup_steps=50)  # so that the weights move while it is checked
        mean, is_random = sum(cfg.mask.mask_ratio) / 2, cfg.mask.mask == "random"
        mask = dataclasses.replace(cfg.mask, mask_ratio=(mean, mean), fixed_token_budget=not is_random)
        configs[name] = dataclasses.replace(cfg, mask=mask, optim=optim)
    bf16, device = DEVICE == "cuda", torch.device(DEVICE)
    first = next(iter(configs))
    work = list(batches(configs[first], batch, steps))
    torch.compiler.reset()  # what was compiled for other sizes counts against the recompilation limit
    timings = time_engines(configs, device, work, warm_up, split_steps)
    for name, timing in timings.items():
        wanted = pytest.approx(timings[first].losses, rel=3e-2 if bf16 else 2e-3)
        assert timing.losses == wanted, f"{name} trains otherwise than {first}"

    floor_ms = timings[first].flops / product_flops_per_ms(torch.bfloat16 if bf16 else torch.float32, DEVICE)
    more = {}
    for name, timing in timings.items():
        median = statistics.median(timing.seconds)
        more[name] = {
            "batch": batch,
            "clips_per_second": batch / median,
            "mfu": floor_ms / (1e3 * median),
            "peak_bytes": timing.peak_bytes,
            "phases_ms": {phase: 1e3 * seconds for phase, seconds in timing.phases.items()},
        }
    return {name: [1e3 * s for s in timing.seconds] for name, timing in timings.items()}, more, floor_ms


@pytest.mark.parametrize(
    ("preset", "size", "batch", "impls"), CASES, ids=lambda x: "-".join(x) if x in (ALL, EAGER) else None
)
def test_train_step(preset, size, batch, impls, record):
    cfg = PRESETS[preset]
    cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, size=size))
    model = preset if preset == size else f"{preset} ViT-{size}"
    try:
        times, more, floor_ms = time_steps(cfg, batch, impls, split_steps=SPLIT)
    except torch.cuda.OutOfMemoryError:
        pytest.skip(f"{model} at batch {batch}: the engines do not fit into this GPU's memory side by side")
    for fields in more.values():
        fields["model"] = model
    shape = f"{model}, batch {batch}"
    record("train_step", shape, times, plain="eager", peers=["eager", "compile"], floor_ms=floor_ms, more=more)
    for name, fields in more.items():
        phases = ", ".join(f"{phase} {ms:.3g} ms" for phase, ms in fields["phases_ms"].items())
        peak = f", peak {fields['peak_bytes'] / 2**30:.1f} GiB" if fields["peak_bytes"] else ""
        print(f"  {name}: {fields['clips_per_second']:.4g} clips/s; {phases}{peak}", file=sys.stderr)


def test_left_out():
    left_out(LEFT_OUT)
