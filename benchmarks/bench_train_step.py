"""Benchmark one whole training step, from PCM to updated weights: fused against plain PyTorch, eager and compiled.

`test_train_step` times the masked objective of the recipes. `test_clip_step` times the clip objective (on a CPU also
both objectives at once), two views of each recording with half of the patches visible, and the masked objective with as
many clips and as many visible patches as there are views.

The times count only if the engines give the same losses at every step. The floor is the FLOPs of the step over its
ragged masks, divided by the rate of a matrix product measured in the same run. A variant's share of the floor is its
MFU. The host waits after every timed step. The phases are timed separately, with a wait after each phase and outside
CUDA graphs. Peak memory is what an engine reserved for weights, moments and its first steps.

Every case is of one of these kinds:

    eager           fused and eager. Every clip has the mean of the recipe's masked shares, so that shapes recur. Mask
                    families other than random have a fixed number of tokens instead.
    drawn           fused and eager, with masks as training draws them. The batches are masked at the middles of six
                    equal slices of the range of masked shares, in turn (see bench_step.py). A time is the mean of the
                    six steps.
    compile         fused, eager and torch.compile, masked as in the kind eager
    max-autotune    fused, and torch.compile that searches the kernels of its matrix products (`max_autotune`) and uses
                    the SDPA backend that is fastest at the step's shapes. The name of the variant states the backend.
"""

import contextlib
import dataclasses
import functools
import itertools
import statistics
import sys

import pytest
import torch
from bench_step import DTYPE, SLICES, TOLERANCE, noise, slices
from conftest import left_out
from records import DEVICE, FULL, QUICK
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from ajepa.config import PRESETS, SIZES, Config, MaskConfig, ObjectiveConfig
from ajepa.model.masks import MaskSampler
from ajepa.training.compare import Batch, time_engines
from ajepa.training.roofline import best_ms, product_flops_per_ms
from ajepa.utils.devices import release_memory

NAMES = {"reference": "eager", "compile": "compile", "fused": "fused"}
EAGER, ALL = ("reference", "fused"), ("reference", "compile", "fused")
KINDS = {"eager": EAGER, "drawn": EAGER, "compile": ALL, "max-autotune": ("fused", "compile")}
# A case is (preset, encoder size, batch, kind). A CPU runs cases that take seconds, a GPU runs the published sizes.
if DEVICE == "cpu":
    OTHERS = [("audio-jepa", "S", 2, "eager"), ("a-jepa", "S", 1, "eager")]
    CASES = [("tiny", "tiny", 64, kind) for kind in ("compile", "drawn")] + OTHERS
    CASES = [("tiny", "tiny x 1", 8, kind) for kind in KINDS] if QUICK else CASES
    LEFT_OUT = {"ViT-B and L, larger batches": "a step takes seconds to minutes on a CPU", "peak memory": "needs a GPU"}
    STEPS, WARM_UP, SPLIT, ROUNDS = (2, 1, 1, 1) if QUICK else (4, 1, 1, 1)
else:
    OTHERS = [("audio-jepa", "B", 64, "eager")]
    OTHERS += [("audio-jepa", size, batch, "eager") for size in ("S", "L") for batch in (64, 256, 1024)]
    OTHERS += [("a-jepa", size, batch, "eager") for size, batch in (("B", 64), ("B", 256), ("S", 256), ("L", 64))]
    CASES = [("audio-jepa", "B", batch, kind) for batch in (1024, 256) for kind in ("eager", "drawn")]
    CASES += [("audio-jepa", "B", batch, kind) for kind in ("compile", "max-autotune") for batch in (1024, 256)]
    CASES += OTHERS
    LEFT_OUT = {}
    # The third step of a shape, and all later ones, replay a CUDA graph.
    STEPS, WARM_UP, SPLIT, ROUNDS = (6, 3, 1, 2) if QUICK else (10, 3, 3, 3)
if FULL:
    CASES = [(*case[:3], "compile") if case in OTHERS else case for case in CASES]
else:
    LEFT_OUT["compile at the other sizes"] = "compilation takes minutes; AJEPA_BENCH=full times it"


# A case of `test_clip_step` is (preset, encoder size, recordings, objective). Each recording has two views.
CLIP_SIZES = [("audio-jepa", "S", 512), ("audio-jepa", "B", 512)]
if DEVICE == "cpu":
    CLIP_SIZES = [("tiny", "tiny x 1", 4)] if QUICK else [("tiny", "tiny", 48)]
CLIP_CASES = [
    (*case, kind) for case in CLIP_SIZES for kind in ("clip", "both", "masked") if DEVICE == "cpu" or kind != "both"
]


def batches(cfg: Config, batch: int, count: int, masks: list[MaskConfig]) -> list[Batch]:
    """Return `count` batches on the device, with each of `masks` in turn, and with the audio of two, to save memory.

    `batch` is the number of recordings. The clip objective masks each of their views.
    """
    samplers = [MaskSampler(mask, cfg.front_end.grid) for mask in masks]
    made: list[Batch] = []
    for step, (pcm, lengths) in zip(range(count), itertools.cycle(noise(cfg, batch)), strict=False):
        with torch.device(DEVICE):
            drawn = samplers[step % len(samplers)](step, cfg.optim.steps, batch * cfg.objective.count)
        made.append((pcm, lengths, drawn))
    return made


def time_steps(cfg: Config, batch: int, impls, steps: int = STEPS, split_steps: int = 0, drawn: bool = False):
    """Time engines whose losses must agree.

    Returns (milliseconds by variant, further fields of the records by variant, floor in milliseconds).
    """
    # torch.compile may compile again at each batch, until it treats the bounds on the lengths as variables.
    warm_up = steps if "compile" in impls else WARM_UP
    configs = {NAMES[impl]: dataclasses.replace(cfg, impl=impl) for impl in impls}
    return time_configs(configs, batch, steps, split_steps, warm_up, drawn)


def time_configs(
    configs: dict[str, Config], batch: int, steps: int, split_steps: int, warm_up: int, drawn: bool = False
):
    """Do the same as `time_steps` for any configurations, whose losses must agree with those of the first one.

    If `drawn` is set, ROUNDS rounds over six slices of the range of masked shares are timed, after `warm_up` rounds.
    Otherwise `steps` steps at the mean of the range are timed.
    """
    for name, cfg in configs.items():
        optim = dataclasses.replace(cfg.optim, warmup_steps=50)  # so that the weights move during the check
        mean, is_random = sum(cfg.mask.mask_ratio) / 2, cfg.mask.mask == "random"
        mask = dataclasses.replace(cfg.mask, fixed_token_budget=not is_random)
        masks = slices(mask) if drawn else [dataclasses.replace(mask, mask_ratio=(mean, mean))]
        configs[name] = dataclasses.replace(cfg, optim=optim)
    if drawn:
        steps, warm_up, split_steps = ROUNDS * SLICES, warm_up * SLICES, SLICES
    device = torch.device(DEVICE)
    first = next(iter(configs))
    rate = product_flops_per_ms(DTYPE, DEVICE)
    work = batches(configs[first], batch, steps, masks)
    torch.compiler.reset()  # code that was compiled for other sizes counts towards the recompilation limit
    timings = time_engines(configs, device, work, warm_up, split_steps)
    for name, timing in timings.items():
        wanted = pytest.approx(timings[first].losses, rel=TOLERANCE)
        assert timing.losses == wanted, f"the losses of {name} differ from those of {first}"

    floor_ms = timings[first].flops / rate
    times, more = {}, {}
    for name, timing in timings.items():
        rounds = [timing.seconds[i : i + len(masks)] for i in range(0, steps, len(masks))]
        times[name] = [1e3 * statistics.mean(seconds) for seconds in rounds]
        median = statistics.median(times[name])
        more[name] = {
            "batch": batch,
            "clips_per_second": 1e3 * batch * configs[name].objective.count / median,
            "mfu": floor_ms / median,
            "peak_bytes": timing.peak_bytes,
            "phases_ms": {phase: 1e3 * seconds for phase, seconds in timing.phases.items()},
        }
    return times, more, floor_ms


def attention_times(cfg: Config, batch: int) -> dict[SDPBackend, float]:
    """Return the milliseconds that the SDPA calls of a step take with each backend that can run them.

    The calls are those of all layers, with half of the patches visible, and with the backward pass if a layer has one.
    """
    width, depth, heads = SIZES[cfg.model.size]
    model, tokens = cfg.model, cfg.front_end.n_patches
    calls = [  # layers, tokens, heads, head dim, whether there is a backward pass
        (depth, tokens // 2, heads, width // heads, True),
        (depth, tokens, heads, width // heads, False),
        (model.predictor_depth, tokens, model.predictor_heads, model.predictor_width // model.predictor_heads, True),
    ]
    cudnn, efficient = SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION
    found = {}
    for backend in (SDPBackend.FLASH_ATTENTION, cudnn, efficient, SDPBackend.MATH):
        with contextlib.suppress(RuntimeError), sdpa_kernel(backend):
            found[backend] = sum(layers * attention_ms(batch, *call) for layers, *call in calls)
    return found


def attention_ms(batch: int, tokens: int, heads: int, head_dim: int, backward: bool) -> float:
    qkv = torch.randn(batch, tokens, 3, heads, head_dim, device=DEVICE, dtype=DTYPE, requires_grad=backward)
    q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))

    def run() -> None:
        out = scaled_dot_product_attention(q, k, v)
        if backward:
            torch.autograd.grad(out, (q, k, v), out)

    return best_ms(run, DEVICE, repeats=5)


@contextlib.contextmanager
def tuned(cfg: Config, batch: int, monkeypatch):
    """Make torch.compile as fast as its options allow, and yield the name of the attention backend that it uses."""
    found = attention_times(cfg, batch)
    order = sorted(found, key=lambda backend: found[backend])
    search = functools.partial(torch.compile, options={"max_autotune": True})
    with sdpa_kernel(order, set_priority=True), monkeypatch.context() as patch:
        patch.setattr(torch, "compile", search)
        yield order[0].name.removesuffix("_ATTENTION").lower()
    release_memory(torch.device(DEVICE))


@pytest.mark.parametrize(("preset", "size", "batch", "kind"), CASES)
def test_train_step(preset, size, batch, kind, record, monkeypatch):
    cfg = dataclasses.replace(PRESETS[preset], objective=ObjectiveConfig())
    cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, size=size))
    model = size if size.startswith(preset) else f"{preset} ViT-{size}"
    shape = f"{model}, batch {batch}"
    try:
        if kind == "max-autotune":
            with tuned(cfg, batch, monkeypatch) as backend:
                times, more, floor_ms = time_steps(cfg, batch, KINDS[kind], split_steps=SPLIT)
            for fields in (times, more):
                fields[f"compile max-autotune, {backend}"] = fields.pop("compile")
        else:
            times, more, floor_ms = time_steps(cfg, batch, KINDS[kind], split_steps=SPLIT, drawn=kind == "drawn")
    except torch.cuda.OutOfMemoryError:
        pytest.skip(f"{model} at batch {batch}: the engines do not fit into this GPU's memory")
    release_memory(torch.device(DEVICE))
    shape += {"drawn": ", masks as drawn", "max-autotune": ", max-autotune"}.get(kind, "")
    keep("train_step", shape, model, times, more, floor_ms, record)


def clip_config(preset: str, size: str, objective: str) -> Config:
    """Return the preset with this objective and half of the patches masked.

    The views of audio-jepa's recordings of 10 s are half as long, and so are the clips of the masked objective.
    """
    cfg = PRESETS[preset]
    if preset == "audio-jepa":
        spec = dataclasses.replace(cfg.front_end, n_frames=128)
        cfg = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, clip_seconds=5.0), front_end=spec)
    source = 10.0 if preset == "audio-jepa" else None
    return dataclasses.replace(
        cfg,
        model=dataclasses.replace(cfg.model, size=size),
        mask=dataclasses.replace(cfg.mask, mask="random", mask_ratio=(0.5, 0.5)),
        objective=ObjectiveConfig(objective=objective, clip_loss="lejepa", views=2, source_seconds=source),
    )


@pytest.mark.parametrize(("preset", "size", "recordings", "objective"), CLIP_CASES)
def test_clip_step(preset, size, recordings, objective, record):
    cfg = clip_config(preset, size, objective)
    model = size if size.startswith(preset) else f"{preset} ViT-{size}"
    batch = 2 * recordings // cfg.objective.count
    seen = f"{recordings} recordings x 2 views" if cfg.objective.clips else f"{batch} clips"
    shape = f"{model}, {objective} objective, {seen} of {cfg.data.clip_seconds:g} s, half of the patches visible"
    try:
        times, more, floor_ms = time_steps(cfg, batch, ALL, split_steps=SPLIT)
    except torch.cuda.OutOfMemoryError:
        pytest.skip(f"{shape}: the engines do not fit into this GPU's memory")
    release_memory(torch.device(DEVICE))
    keep("clip_step", shape, model, times, more, floor_ms, record)


def keep(benchmark: str, shape: str, model: str, times, more, floor_ms: float, record) -> None:
    """Record what `time_steps` returned, and print it."""
    for fields in more.values():
        fields["model"] = model
    peers = [name for name in times if name != "fused"]
    record(benchmark, shape, times, plain="eager", peers=peers, floor_ms=floor_ms, more=more)
    for name, fields in more.items():
        phases = ", ".join(f"{phase} {ms:.3g} ms" for phase, ms in fields["phases_ms"].items())
        peak = f", peak {fields['peak_bytes'] / 2**30:.1f} GiB" if fields["peak_bytes"] else ""
        print(f"  {name}: {fields['clips_per_second']:.4g} clips/s; {phases}{peak}", file=sys.stderr)


def test_left_out():
    left_out(LEFT_OUT)
