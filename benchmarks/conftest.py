"""Timers and records shared by the benchmarks. `pytest benchmarks/` runs them all with sizes for this machine.

Variants of one benchmark are timed in turns (A B A B), so that what else the machine does hits all of them alike.
"""

import gc
import json
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch

RESULTS = Path(__file__).parent / "results"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Times = dict[str, list[float]]  # milliseconds of each call, by variant


def device_name() -> str:
    if DEVICE == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return f"cpu {model[1] if model else platform.machine()}"


def environment() -> dict:
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=Path(__file__).parent
    ).stdout.strip()
    versions = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}
    return {"device": device_name(), "cores": torch.get_num_threads(), "versions": versions, "commit": commit}


def percentile(times: list[float], share: float) -> float:
    return statistics.quantiles(times, n=100, method="inclusive")[round(100 * share) - 1]


def _prepare(function: Callable[[], object]) -> tuple[Callable[[], object], int]:
    """Warms up; on a GPU, a CUDA graph of enough calls to hide the launch, and how many."""
    function()
    if DEVICE == "cpu":
        return function, 1
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        function()
    torch.cuda.synchronize()
    graph, calls = torch.cuda.CUDAGraph(), 10
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(calls):
            function()
    return graph.replay, calls


@pytest.fixture(scope="session")
def interleave() -> Callable[..., Times]:
    """interleave({name: function}, seconds=3.0, rounds=7) -> times: every function once a round, in turns.

    Stops after `seconds` and at least `rounds` rounds. On a GPU, pass functions that rotate through their inputs.
    """

    def run(variants: dict[str, Callable[[], object]], seconds: float = 3.0, rounds: int = 7) -> Times:
        ready = {name: _prepare(function) for name, function in variants.items()}
        times: Times = {name: [] for name in variants}
        gc.collect()
        gc.disable()
        try:
            start = time.perf_counter()
            while time.perf_counter() - start < seconds or len(next(iter(times.values()))) < rounds:
                for name, (function, calls) in ready.items():
                    begin = time.perf_counter()
                    function()
                    if DEVICE == "cuda":
                        torch.cuda.synchronize()
                    times[name].append(1e3 * (time.perf_counter() - begin) / calls)
        finally:
            gc.enable()
        return times

    return run


@pytest.fixture(scope="session")
def record() -> Callable[..., list[dict]]:
    """record(benchmark, shape, times, plain=, peers=, floor_ms=) -> the records it wrote and printed.

    Args:
        benchmark, shape: what was timed.
        times: of `interleave`.
        plain: the variant that is plain PyTorch. Ratios are its median over a variant's: above 1 the variant is faster.
        peers: variants by others; the fastest of them is the best peer.
        floor_ms: the time no implementation can beat; a variant's share of it is floor_ms / median.
    """

    def write(
        benchmark: str,
        shape: str,
        times: Times,
        *,
        plain: str | None = None,
        peers: Iterable[str] = (),
        floor_ms: float | None = None,
    ) -> list[dict]:
        medians = {name: statistics.median(values) for name, values in times.items()}
        best = min((peer for peer in peers if peer in medians), key=lambda peer: medians[peer], default=None)
        records = [
            {
                "benchmark": benchmark,
                "variant": name,
                "shape": shape,
                "median_ms": medians[name],
                "p20_ms": percentile(values, 0.2),
                "p80_ms": percentile(values, 0.8),
                "floor_share": None if floor_ms is None else floor_ms / medians[name],
                "ratio_to_plain": None if plain is None else medians[plain] / medians[name],
                "ratio_to_best_peer": None if best is None else medians[best] / medians[name],
                "best_peer": best,
            }
            for name, values in times.items()
        ]
        slug = re.sub(r"[^a-z0-9]+", "-", device_name().lower()).strip("-")
        path = RESULTS / f"{slug}.json"
        kept = json.loads(path.read_text())["records"] if path.exists() else []
        new = {(r["benchmark"], r["shape"]) for r in records}
        kept = [old for old in kept if (old["benchmark"], old["shape"]) not in new]
        commit = {"commit": environment()["commit"]}
        path.parent.mkdir(exist_ok=True)
        path.write_text(
            json.dumps({**environment(), "records": kept + [{**r, **commit} for r in records]}, indent=1) + "\n"
        )
        print(f"\n{benchmark} {shape}", file=sys.stderr)
        for r in sorted(records, key=lambda r: r["median_ms"]):
            numbers = [f"{r[key]:10.3f}" for key in ("median_ms", "p20_ms", "p80_ms")]
            ratios = [f"{r[key]:8.2f}" if r[key] else " " * 8 for key in ("floor_share", "ratio_to_plain")]
            print(f"  {r['variant']:34}", *numbers, *ratios, file=sys.stderr)
        return records

    return write
