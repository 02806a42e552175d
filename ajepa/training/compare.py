"""Throughput against plain PyTorch: the same batches through several engines, in alternation."""

import contextlib
import dataclasses
import gc
import itertools
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from ajepa.config import Config, Impl
from ajepa.model.masks import Masks
from ajepa.training.engine import Engine, wait

Batch = tuple[torch.Tensor, torch.Tensor, Masks | list[Masks]]  # pcm, lengths, masks
PHASES = ("front end", "forward", "backward", "update")


@dataclass
class Timing:
    """What one engine did with the batches."""

    seconds: list[float] = field(default_factory=list)  # of each step, PCM to updated weights
    losses: list[float] = field(default_factory=list)  # of every step, the warm-up's too
    flops: float = 0.0  # of a step, median over the batches' masks
    peak_bytes: int | None = None  # device memory its weights, moments and warm-up steps reserved; None on a CPU
    phases: dict[str, float] = field(default_factory=dict)  # median seconds of PHASES; empty where not asked for


def time_engines(
    configs: dict[str, Config],
    device: torch.device,
    batches: list[Batch],
    warm_up: int = 1,
    split_steps: int = 0,
) -> dict[str, Timing]:
    """Every batch through every engine in turn (A B A B), after `warm_up` uncounted steps on the first batches.

    A fresh engine of each configuration; where a GPU does not hold all of them at once, one after the other.
    `split_steps` further steps are timed phase by phase, with a wait after each.
    """
    try:
        return _time_together(configs, device, batches, warm_up, split_steps)
    except torch.cuda.OutOfMemoryError:
        if len(configs) == 1:
            raise
    apart: dict[str, Timing] = {}
    for name, cfg in configs.items():
        apart |= _time_together({name: cfg}, device, batches, warm_up, split_steps)
    return apart


def _time_together(configs, device, batches: list[Batch], warm_up: int, split_steps: int) -> dict[str, Timing]:
    engines: dict[str, Engine] = {}
    timings = {name: Timing() for name in configs}
    for name, timing in timings.items():
        release(device)  # what another engine has freed is not to serve this one uncounted
        before = _reserved(device)
        engine = engines[name] = Engine(configs[name], device)
        for step in range(warm_up):
            timing.losses.append(engine.step(*batches[step % len(batches)], step).loss.item())
        if device.type == "cuda":
            timing.peak_bytes = torch.cuda.memory_reserved(device) - before
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


def release(device: torch.device) -> None:
    """Memory of engines that are no more: each refers to itself, by its methods in graphs and compiled functions."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def split(engine: Engine, steps: list[tuple[Batch, int]]) -> dict[str, float]:
    """Median seconds of each of PHASES, outside CUDA graphs: these have no phases to wait between."""
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
    """When a step's PHASES begin, each after the device has finished the one before: marks at the front end's and
    backward's begin and end. Of a step of one micro-batch."""
    marks: dict[str, float] = {}

    def marked(function, begin: str, end: str):
        def run(*args, **kwargs):
            marks[begin] = _now(engine.device)
            out = function(*args, **kwargs)
            marks[end] = _now(engine.device)
            return out

        return run

    front_end, backward = engine.front_end, torch.Tensor.backward
    engine.front_end = marked(front_end, "front end", "forward")
    torch.Tensor.backward = marked(backward, "backward", "update")  # type: ignore[method-assign]
    try:
        yield marks
    finally:
        engine.front_end, torch.Tensor.backward = front_end, backward  # type: ignore[method-assign]


def compare(cfg: Config, device: torch.device, batches: list[Batch], impls: list[Impl]) -> dict[str, float]:
    """Clips per second of each engine, from its median step."""
    graphs = device.type == "cuda" and cfg.step.cuda_graph  # a graph is replayed at the third step of its shapes
    configs: dict[str, Config] = {impl: dataclasses.replace(cfg, impl=impl) for impl in impls}
    timings = time_engines(configs, device, batches, warm_up=2 * len(batches) if graphs else 1)
    return {impl: len(batches[0][0]) / statistics.median(timing.seconds) for impl, timing in timings.items()}


def table(rates: dict[str, float]) -> str:
    """Clips per second of each engine, and its ratio to plain PyTorch (`reference`)."""
    rows = [f"{'engine':<12}{'clips/s':>12}{'x plain':>10}"]
    rows += [f"{impl:<12}{rate:>12,.1f}{rate / rates['reference']:>10.2f}" for impl, rate in rates.items()]
    return "\n".join(rows)


def _now(device: torch.device) -> float:
    wait(device)
    return time.perf_counter()


def _reserved(device: torch.device) -> int:
    return torch.cuda.memory_reserved(device) if device.type == "cuda" else 0
