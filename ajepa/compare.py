"""Throughput against plain PyTorch: the same batches through several engines, in alternation."""

import dataclasses
import statistics
import time

import torch

from ajepa.config import Config, Impl
from ajepa.engine import Engine
from ajepa.masks import Masks

Batch = tuple[torch.Tensor, torch.Tensor, Masks]  # pcm, lengths, masks


def time_engines(
    cfg: Config, device: torch.device, batches: list[Batch], impls: list[Impl], warm_up: int = 1
) -> dict[Impl, list[float]]:
    """Seconds of each step: every batch through every engine in turn (A B A B), from PCM to updated weights.

    Fresh engines of the same seed. The first `warm_up` batches are run once more, uncounted, beforehand.
    """
    engines = {impl: Engine(dataclasses.replace(cfg, impl=impl), device) for impl in impls}
    seconds: dict[Impl, list[float]] = {impl: [] for impl in impls}
    for i, (pcm, lengths, masks) in enumerate(batches[:warm_up] + batches):
        for impl, engine in engines.items():
            _wait(device)
            tick = time.perf_counter()
            engine.step(pcm, lengths, masks, i)
            _wait(device)
            if i >= warm_up:
                seconds[impl].append(time.perf_counter() - tick)
    return seconds


def compare(cfg: Config, device: torch.device, batches: list[Batch], impls: list[Impl]) -> dict[str, float]:
    """Clips per second of each engine, from its median step."""
    clips = len(batches[0][0])
    return {impl: clips / statistics.median(t) for impl, t in time_engines(cfg, device, batches, impls).items()}


def table(rates: dict[str, float]) -> str:
    """Clips per second of each engine, and its ratio to plain PyTorch (`reference`)."""
    rows = [f"{'engine':<12}{'clips/s':>12}{'x plain':>10}"]
    rows += [f"{impl:<12}{rate:>12,.1f}{rate / rates['reference']:>10.2f}" for impl, rate in rates.items()]
    return "\n".join(rows)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
