"""Benchmark only our training step: from PCM on the device to updated weights, with masks as training draws them.

Training draws one masked share for each batch, uniformly from the recipe's range, and the work of the step depends on
it. The cases "masks as drawn" cut this range into six equal slices and mask one batch at the middle of each slice.
Training draws every slice equally often, so the mean over the six batches is the mean of training. The cases with a
fixed number of visible patches mask half of every clip.

A time is the mean milliseconds per step of one round. A round queues all six batches in turn without waiting in
between, and waits once for the device at the end. Masks are drawn beforehand. Every shape is run three times before it
is timed: the first step runs eagerly, the second is captured as a CUDA graph, and the third replays this graph, as all
timed steps do. `by_visible_ms` comes from one further round with a wait after each step, and is given by the number of
visible patches. MFU is the FLOPs of the step's definition, averaged over the six batches, at the rate of a matrix
product measured in the same run. `peak_bytes` is what the engine reserved for weights, moments, graphs and its steps.

The time of the fused step counts only if its losses on small batches agree with those of plain PyTorch. The time of a
switch counts only if its losses agree with those of the shipped step on the same batches. Losses agree within 3 % (with
fp8, which changes the targets, within 10 %).
"""

import dataclasses
import functools
import gc
import itertools
import math
import statistics
import sys
import time
from typing import Any, NamedTuple

import pytest
import torch
from conftest import left_out
from records import DEVICE, QUICK
from torch.profiler import ProfilerActivity, profile

from ajepa.config import PRESETS, Config, MaskConfig, ObjectiveConfig
from ajepa.model.masks import Masks, MaskSampler
from ajepa.training.compare import Batch
from ajepa.training.engine import Engine, StepResult
from ajepa.training.profiling import breakdown, report
from ajepa.training.roofline import product_flops_per_ms
from ajepa.utils.devices import release_memory, trains_in_bf16, wait
from ajepa_kernels import products

if DEVICE == "cuda":
    PRESET, SIZE, MODEL, BATCHES = "audio-jepa", "B", "audio-jepa ViT-B", (1024, 256)
    SECONDS = 2.5 if QUICK else 5.0
else:  # small sizes, which only show that everything works
    PRESET, SIZE, BATCHES = "tiny", "tiny x 1" if QUICK else "tiny", (4, 2) if QUICK else (8, 4)
    MODEL = SIZE
    SECONDS = 0.1 if QUICK else 1.0
SLICES, WARM_UP, ROUNDS = 6, 3, 3
DTYPE, TOLERANCE = (torch.bfloat16, 3e-2) if trains_in_bf16(torch.device(DEVICE)) else (torch.float32, 2e-3)
HALF = str(math.prod(PRESETS[PRESET].front_end.grid) // 2)  # visible patches
SWITCHES: dict[str, dict[str, Any]] = {
    "shipped": {},
    "mlp=plain": {"mlp": "plain"},
    "mlp=epilogue": {"mlp": "epilogue"},
    "residual=bf16-gradient": {"residual": "bf16-gradient"},
    "residual=in-product": {"residual": "in-product"},
    "residual=bf16": {"residual": "bf16"},
    "target_precision=fp8": {"target_precision": "fp8"},
    "overlap_front_end": {"overlap_front_end": True},
    "products fused": {"mlp": "epilogue", "residual": "in-product"},
    "products fused, fp8": {"mlp": "epilogue", "residual": "in-product", "target_precision": "fp8"},
}
CASES = [(batch, masks, "shipped") for masks in ("drawn", HALF) for batch in BATCHES]
CASES += [(BATCHES[0], "drawn", switch) for switch in SWITCHES if switch != "shipped"]
LEFT_TO_A_FULL_RUN = ("mlp=plain", "residual=bf16-gradient", "residual=bf16", "target_precision=fp8")
SHIPPED_LOSSES: dict[tuple[int, str], list[float]] = {}  # of the shipped step's warm-up, by (batch, masks)


def config(**step) -> Config:
    """Return the configuration of the fused engine with these step settings, for the masked objective.

    The short warm-up makes the learning rate grow fast, so that the weights move.
    """
    cfg = PRESETS[PRESET]
    model = dataclasses.replace(cfg.model, size=SIZE, target_layers=1)  # type: ignore[arg-type]
    optim = dataclasses.replace(cfg.optim, warmup_steps=50)
    step = dataclasses.replace(cfg.step, **step)
    return dataclasses.replace(cfg, model=model, optim=optim, step=step, objective=ObjectiveConfig())


def slices(mask: MaskConfig, count: int = SLICES) -> list[MaskConfig]:
    """Return `mask` at the middle of each of `count` equal slices of its range of masked shares."""
    low, high = mask.mask_ratio
    middles = [low + (high - low) * (i + 0.5) / count for i in range(count)]
    return [dataclasses.replace(mask, mask_ratio=(ratio, ratio)) for ratio in middles]


def noise(cfg: Config, batch: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Draw two batches of noise on the device: PCM, int16 `[B, S]`, and lengths, int32 `[B]`."""
    samples = round(cfg.source_seconds * cfg.front_end.sample_rate)
    draw = functools.partial(torch.randint, -9999, 9999, (batch, samples), dtype=torch.int16, device=DEVICE)
    generator = torch.Generator(DEVICE).manual_seed(0)
    lengths = torch.full((batch,), samples, dtype=torch.int32, device=DEVICE)
    return [(draw(generator=generator), lengths) for _ in range(2)]


def with_masks(engine: Engine, audio: list[tuple[torch.Tensor, torch.Tensor]], masks: list[MaskConfig]) -> list[Batch]:
    """Return one batch for each of `masks`. The batches use the entries of `audio` in turn."""
    made: list[Batch] = []
    for step, (mask, (pcm, lengths)) in enumerate(zip(masks, itertools.cycle(audio), strict=False)):
        sampler = MaskSampler(mask, engine.cfg.front_end.grid)
        made.append((pcm, lengths, engine.masks(sampler, step, len(pcm))))
    return made


def run(engine: Engine, batches: list[Batch], first: int) -> list[StepResult]:
    """Queue a step on each batch, with the schedule values of steps `first`, `first + 1`..., as the trainer does."""
    results = []
    for step, (pcm, lengths, masks) in enumerate(batches, first):
        with engine.ahead():
            patches = engine.patches(pcm, lengths, step)
        results.append(engine.train(patches, masks, step))
    return results


def losses(results: list[StepResult]) -> list[float]:
    """Return the losses of the steps, and fail if a step was non-finite."""
    values = torch.stack([result.loss for result in results]).tolist()
    bad = torch.stack([result.bad for result in results]).sum().item()
    assert all(map(math.isfinite, values)) and not bad, f"{bad:g} of {len(values)} steps were non-finite: {values}"
    return values


def timed_rounds(engine: Engine, batches: list[Batch], first: int) -> tuple[list[float], list[StepResult]]:
    """Run rounds for SECONDS, but at least ROUNDS of them.

    Returns (milliseconds per step of each round, results of all steps).
    """
    times: list[float] = []
    results: list[StepResult] = []
    gc.collect()
    gc.disable()
    try:
        wait(engine.device)
        begin = time.perf_counter()
        while time.perf_counter() - begin < SECONDS or len(times) < ROUNDS:
            tick = time.perf_counter()
            results += run(engine, batches, first + len(results))
            wait(engine.device)
            times.append(1e3 * (time.perf_counter() - tick) / len(batches))
    finally:
        gc.enable()
    return times, results


def visible(batch: Batch) -> int:
    """Return the number of visible patches in each clip of a batch."""
    first = batch[2][0]
    assert isinstance(first, Masks)
    return len(first.context) // first.clips


def by_visible(engine: Engine, batches: list[Batch], first: int) -> dict[str, float]:
    """Return the mean milliseconds of a step, including the host's wait for it, by the number of visible patches."""
    times: dict[str, list[float]] = {}
    wait(engine.device)
    for step, batch in enumerate(batches, first):
        tick = time.perf_counter()
        engine.step(*batch, step)
        wait(engine.device)
        times.setdefault(str(visible(batch)), []).append(1e3 * (time.perf_counter() - tick))
    return {patches: statistics.mean(values) for patches, values in sorted(times.items())}


@functools.cache
def small_losses(cfg: Config) -> list[float]:
    """Return the losses of four steps on 16 clips, which have few and many visible patches in turn.

    On a GPU, the first two steps run eagerly and the last two in CUDA graphs.
    """
    engine = Engine(cfg, torch.device(DEVICE))
    few_and_many = [slices(cfg.mask)[i] for i in (-1, 0)]
    return losses(run(engine, with_masks(engine, noise(cfg, 16), 2 * few_and_many), 0))


def check_shipped() -> None:
    plain = small_losses(dataclasses.replace(config(), impl="reference"))
    assert small_losses(config()) == pytest.approx(plain, rel=TOLERANCE), "the losses of fused and eager steps differ"


def check_switch(cfg: Config, case: tuple[int, str], found: list[float]) -> None:
    """Compare `found`, the losses of the warm-up of this case, with those of the shipped step."""
    shipped = SHIPPED_LOSSES.get(case)
    if shipped is None:  # the shipped step did not run in this process
        found, shipped = small_losses(cfg), small_losses(config())
    rel = 0.1 if cfg.step.target_precision == "fp8" else 3e-2  # fp8 changes the targets: see NOTES.md
    assert found == pytest.approx(shipped, rel=rel), "the losses differ from those of the step as shipped"


class Measured(NamedTuple):
    times: list[float]  # milliseconds per step of each round
    floor_ms: float
    warm_up_losses: list[float]
    more: dict[str, Any]  # further fields of the record


def measure(cfg: Config, batch: int, masks: list[MaskConfig], case: str) -> Measured:
    """Warm up and time a new engine, which is freed when this function returns."""
    rate = product_flops_per_ms(DTYPE, DEVICE)
    audio = noise(cfg, batch)
    before = reserved()
    engine = Engine(cfg, torch.device(DEVICE))
    batches = with_masks(engine, audio, masks)
    warm_up = [result for i in range(WARM_UP) for result in run(engine, batches, i * len(batches))]
    times, results = timed_rounds(engine, batches, len(warm_up))
    by_visible_ms = by_visible(engine, batches, len(warm_up) + len(results))
    losses(results)

    floor_ms = statistics.mean(engine.flops(parts) for *_, parts in batches) / rate
    graphs = [] if engine.graphs is None else [graph for graph in engine.graphs.seen.values() if graph is not None]
    if engine.graphs is not None and engine.graphs.reported:
        left_out({f"{case} in CUDA graphs": "; ".join(sorted(engine.graphs.reported))})
    median = statistics.median(times)
    more = {
        "batch": batch,
        "model": MODEL,
        "clips_per_second": 1e3 * batch / median,
        "mfu": floor_ms / median,
        "peak_bytes": torch.cuda.max_memory_reserved() - before if DEVICE == "cuda" else None,
        "by_visible_ms": by_visible_ms,
        "graphs": len(graphs),
    }
    return Measured(times, floor_ms, losses(warm_up), more)


def reserved() -> int:
    """Return the bytes that are reserved on the GPU, and restart the count of their peak."""
    release_memory(torch.device(DEVICE))
    if DEVICE != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_reserved()


@pytest.mark.parametrize(("batch", "masks", "switch"), CASES, ids=["-".join(map(str, case)) for case in CASES])
def test_step(batch, masks, switch, record):
    cfg = config(**SWITCHES[switch])
    if QUICK and DEVICE == "cuda" and switch in LEFT_TO_A_FULL_RUN:
        pytest.skip("a quick run times only the switches that the goal needs")
    fused = DEVICE == "cuda" and (cfg.step.mlp == "epilogue" or cfg.step.residual == "in-product")
    if fused and (why_not := products.why_not(torch.empty(0, device=DEVICE, dtype=torch.bfloat16), products.ALL)):
        pytest.skip(why_not)
    if cfg.step.target_precision == "fp8" and (DEVICE != "cuda" or torch.cuda.get_device_capability() < (8, 9)):
        pytest.skip("float8 products need a GPU of compute capability 8.9 or later")
    if switch != "shipped" and cfg == config():
        pytest.skip(f"{switch} is the shipped setting, which the case [{batch}-{masks}-shipped] times")
    check_shipped()
    half = dataclasses.replace(cfg.mask, mask_ratio=(0.5, 0.5))
    shape = f"{MODEL}, batch {batch}, {'masks as drawn' if masks == 'drawn' else f'{masks} visible'}"
    shape += f", {'as shipped' if switch == 'shipped' else switch}"
    measured = measure(cfg, batch, slices(cfg.mask) if masks == "drawn" else [half] * SLICES, shape)
    release_memory(torch.device(DEVICE))
    if switch == "shipped":
        SHIPPED_LOSSES[batch, masks] = measured.warm_up_losses
    else:
        check_switch(cfg, (batch, masks), measured.warm_up_losses)

    counts = sorted(map(int, measured.more["by_visible_ms"]))
    seen = f"drawn {counts[0]}-{counts[-1]}" if masks == "drawn" else masks
    fields = {**measured.more, "visible": seen, "switch": switch}
    record("step", shape, {"fused": measured.times}, floor_ms=measured.floor_ms, more={"fused": fields})
    print(f"  {fields['clips_per_second']:.4g} clips/s, MFU {fields['mfu']:.1%}, {seen} visible", file=sys.stderr)


def test_step_profile(record):
    """Profile the kernels of three replayed steps of the shipped engine, with few, half and many patches visible."""
    cfg, device, batch = config(), torch.device(DEVICE), BATCHES[0]
    check_shipped()
    rate = product_flops_per_ms(DTYPE, DEVICE)
    release_memory(device)
    engine = Engine(cfg, device)
    batches = with_masks(engine, noise(cfg, batch), slices(cfg.mask, 3))
    for i in range(WARM_UP):
        losses(run(engine, batches, i * len(batches)))
    wait(device)
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (DEVICE == "cuda")) as profiled:
        begin = time.perf_counter()
        results = run(engine, batches, WARM_UP * len(batches))
        wait(device)
        seconds = time.perf_counter() - begin
    losses(results)
    found = breakdown(profiled, device, seconds, len(batches))
    flops = sum(engine.flops(parts) for *_, parts in batches)
    del engine, batches, results
    release_memory(device)
    if not found.kernels:
        pytest.skip("the profiler sees no kernels on this device")
    print("\n" + report(found, seconds, 3, flops, 1e3 * rate), file=sys.stderr)
    kernels = [kernel._asdict() for kernel in found.kernels[:25]]
    more = {"batch": batch, "model": MODEL, "kinds": found.kinds, "kernels": kernels}
    times = {"fused": [1e3 * seconds / 3]}
    record("step_profile", f"{MODEL}, batch {batch}, masks as drawn, as shipped", times, more={"fused": more})
