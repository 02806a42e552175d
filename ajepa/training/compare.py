"""Throughput against plain PyTorch: several engines train on the same batches in alternation."""

import contextlib
import dataclasses
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from ajepa.config import Config, Impl
from ajepa.model.masks import Masks, MaskSampler
from ajepa.training.corpus import Corpus, to_device
from ajepa.training.engine import Engine
from ajepa.training.run_log import warn
from ajepa.utils.devices import release_memory, reserved_memory, wait

Batch = tuple[torch.Tensor, torch.Tensor, Masks | list[Masks]]  # pcm, lengths, masks
PHASES = ("front end", "forward", "backward", "update")


@dataclass
class Timing:
    """Measurements of one engine."""

    seconds: list[float] = field(default_factory=list)  # of each counted step, from PCM to updated weights
    losses: list[float] = field(default_factory=list)  # of every step, warm-up included
    flops: float = 0.0  # per step, median over the batches' masks
    peak_bytes: int | None = None  # device memory reserved in setup and warm-up; None on a CPU
    phases: dict[str, float] = field(default_factory=dict)  # median seconds of each of PHASES; empty if not requested


def time_engines(
    configs: dict[str, Config],
    device: torch.device,
    batches: list[Batch],
    warm_up: int = 1,
    split_steps: int = 0,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Timing]:
    """Run every batch through every engine in turn (A B A B), after `warm_up` uncounted steps on the first batches.

    Each configuration gets a new engine. If a GPU cannot hold all engines at once, they run one after the other.
    `split_steps` further steps are timed phase by phase, with a synchronization after each phase. `say` is told what is
    being warmed up.
    """
    try:
        return _time_together(configs, device, batches, warm_up, split_steps, say)
    except torch.cuda.OutOfMemoryError:
        if len(configs) == 1:
            raise
    timings: dict[str, Timing] = {}
    for name, cfg in configs.items():
        timings |= _time_together({name: cfg}, device, batches, warm_up, split_steps, say)
    return timings


def _time_together(configs, device, batches: list[Batch], warm_up: int, split_steps: int, say) -> dict[str, Timing]:
    engines: dict[str, Engine] = {}
    timings = {name: Timing() for name in configs}
    for name, timing in timings.items():
        release_memory(device)  # memory cached by an earlier engine would not be counted for this one
        before = reserved_memory(device)
        engine = engines[name] = Engine(configs[name], device)
        say(f"warming up {name}: {warm_up} step{'s' * (warm_up > 1)} that do not count")
        for step in range(warm_up):
            timing.losses.append(engine.step(*batches[step % len(batches)], step).loss.item())
        if device.type == "cuda":
            timing.peak_bytes = reserved_memory(device) - before
    for step, batch in enumerate(batches, start=warm_up):
        for name, engine in engines.items():
            wait(device)
            tick = time.perf_counter()
            result = engine.step(*batch, step)
            wait(device)
            timings[name].seconds.append(time.perf_counter() - tick)
            timings[name].losses.append(result.loss.item())
    for name, engine in engines.items():
        timings[name].flops = statistics.median(engine.flops(masks) for *_, masks in batches)
    if split_steps:
        steps = [(batches[i % len(batches)], warm_up + len(batches) + i) for i in range(split_steps)]
        for name, engine in engines.items():
            timings[name].phases = split(engine, steps)
    return timings


def split(engine: Engine, steps: list[tuple[Batch, int]]) -> dict[str, float]:
    """Median seconds of each of PHASES, without CUDA graphs, which cannot be timed by phase."""
    graphs, engine.graphs = engine.graphs, None
    rows = []
    try:
        for batch, step in steps:
            with _marks(engine) as marks:
                engine.step(*batch, step)
                marks["end"] = _now(engine.device)
            times = list(marks.values())
            rows.append([end - begin for begin, end in itertools.pairwise(times)])
    finally:
        engine.graphs = graphs
    return {phase: statistics.median(column) for phase, column in zip(PHASES, zip(*rows, strict=True), strict=True)}


@contextlib.contextmanager
def _marks(engine: Engine) -> Iterator[dict[str, float]]:
    """Record when each of a step's PHASES begins, after the device has finished the previous phase.

    The marks are set at the start and end of the front end and of backward, so the step must have one micro-batch.
    """
    marks: dict[str, float] = {}

    def marked(function, begin: str, end: str):
        def run(*args, **kwargs):
            marks[begin] = _now(engine.device)
            out = function(*args, **kwargs)
            marks[end] = _now(engine.device)
            return out

        return run

    backward = torch.Tensor.backward
    engine.patches = marked(engine.patches, "front end", "forward")  # type: ignore[method-assign]
    torch.Tensor.backward = marked(backward, "backward", "update")  # type: ignore[method-assign]
    try:
        yield marks
    finally:
        del engine.patches
        torch.Tensor.backward = backward  # type: ignore[method-assign]


def compare(cfg: Config, device: torch.device, batches: list[Batch], impls: list[Impl]) -> dict[str, float]:
    """Clips per second of each engine, from its median step.

    A CUDA graph is first replayed in the third step of its shapes, and torch.compile generates code in the first.
    """
    graphs = device.type == "cuda" and cfg.step.cuda_graph
    configs: dict[str, Config] = {impl: dataclasses.replace(cfg, impl=impl) for impl in impls}
    warm_up = 2 * len(batches) if graphs else len(batches) if "compile" in impls else 1
    say = (lambda text: print(text, file=sys.stderr)) if cfg.compare else (lambda _: None)
    timings = time_engines(configs, device, batches, warm_up, say=say)
    clips = len(batches[0][0]) * cfg.objective.count
    return {impl: clips / statistics.median(timing.seconds) for impl, timing in timings.items()}


def compare_engines(
    cfg: Config, device: torch.device, corpus: Corpus, steps: int, world_size: int = 1
) -> dict[str, float]:
    """Clips per second of plain PyTorch and of this run's engine on one device, over its share of `steps` batches.

    Empty where `steps` is 0, or where both engines do not fit into the GPU's memory.
    """
    if steps == 0:
        return {}
    impls: list[Impl] = ["reference", "compile", cfg.impl] if cfg.compare else ["reference", cfg.impl]
    sampler = MaskSampler(cfg.mask, cfg.front_end.grid, seed=cfg.seed)
    with contextlib.closing(corpus.loader(cfg, None, 0, world_size)) as loader:
        pairs = [to_device(next(loader), device) for _ in range(steps)]
    batches: list[Batch] = []
    for i, (pcm, lengths) in enumerate(pairs):
        parts = sampler.parts(i, cfg.optim.steps, cfg.step.sizes(len(pcm) * cfg.objective.count))
        batches.append((pcm, lengths, [masks.to(device) for masks in parts]))
    try:
        return compare(cfg, device, batches, list(dict.fromkeys(impls)))
    except torch.cuda.OutOfMemoryError:
        warn("no comparison with plain PyTorch: it does not fit into the GPU's remaining memory")
        return {}


def table(rates: dict[str, float]) -> str:
    """Clips per second of each engine, and its ratio to plain PyTorch (`reference`)."""
    rows = [f"{'engine':<12}{'clips/s':>12}{'x plain':>10}"]
    rows += [f"{impl:<12}{rate:>12,.1f}{rate / rates['reference']:>10.2f}" for impl, rate in rates.items()]
    return "\n".join(rows)


def _now(device: torch.device) -> float:
    wait(device)
    return time.perf_counter()
