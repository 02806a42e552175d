"""Timers and records shared by the benchmarks. `pytest benchmarks/` runs them all with sizes for this machine.

Variants of one benchmark are timed in turns (A B, B A), so that other work on the machine affects all of them alike.
A benchmark checks its variants before it times them. If a check fails, the benchmark's earlier records are dropped.
"""

import functools
import gc
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import records
import result_files
import torch
from records import DEVICE, QUICK

sys.path.append(str(Path(__file__).parent.parent / "tests"))
from missing import *  # noqa: F403

Times = dict[str, list[float]]  # milliseconds of each call, by variant
LEFT_OUT: dict[str, dict[str, str]] = {}  # {test: {what it does not measure on this machine: why}}


def percentile(times: list[float], share: float) -> float:
    return statistics.quantiles(times, n=100, method="inclusive")[round(100 * share) - 1] if times[1:] else times[0]


def _prepare(function: Callable[[], object], graphed: bool) -> tuple[Callable[[], object], int, str]:
    """Warm up, and capture a CUDA graph of enough calls to hide the launch, if `graphed`.

    Returns (function to time, number of calls that it makes, reason why it is no graph although it should be).
    """
    function()
    if not graphed:
        return function, 1, ""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        function()
    torch.cuda.synchronize()
    graph, calls = torch.cuda.CUDAGraph(), 10
    try:
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(calls):
                function()
    except RuntimeError as error:
        torch.cuda.synchronize()
        return function, 1, _first_line(error)
    return graph.replay, calls, ""


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def left_out(reasons: dict[str, str]) -> None:
    """Note what this test does not measure on this machine, for the summary and the result file."""
    LEFT_OUT.setdefault(os.environ["PYTEST_CURRENT_TEST"].rpartition(" ")[0], {}).update(reasons)


@pytest.fixture(autouse=True)
def rehearsal(monkeypatch):
    """Make quick runs on a CPU small, since they only show that everything works.

    Their models may have the size "tiny x 1", an encoder of one layer. They run on one thread, because several threads
    spin while they wait. Their torch.compile traces without generating code.
    """
    if not QUICK or DEVICE != "cpu":
        yield
        return
    from ajepa.config import SIZES

    width, _, heads = SIZES["tiny"]
    monkeypatch.setitem(SIZES, "tiny x 1", (width, 1, heads))
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def interleave() -> Callable[..., Times]:
    """interleave({name: function}, seconds=3.0, rounds=7) -> times. Every round calls each function, in a new order.

    Timing stops after `seconds`, but not before `rounds` rounds; a quick run asks for fewer, 5 on a GPU and 2 on a CPU.
    On a GPU, pass functions that rotate through their inputs. A variant that cannot run on this machine is left out
    with its reason, and one that cannot be captured in a CUDA graph is launched call by call. Our own variants must run
    and be captured. `outside_graphs` names variants whose work a graph would not hold although the capture succeeds,
    because they work on the CPU or on other streams.
    """

    def run(
        variants: dict[str, Callable[[], object]],
        seconds: float = 3.0,
        rounds: int = 7 if not QUICK else 2 if DEVICE == "cpu" else 5,
        outside_graphs: Iterable[str] = (),
    ) -> Times:
        ready = {}
        for name, function in variants.items():
            ours = name.startswith("ajepa")
            try:
                *ready[name], no_graph = _prepare(function, DEVICE != "cpu" and name not in outside_graphs)
            except Exception as error:
                if ours:
                    raise
                left_out({name: _first_line(error)})
                continue
            assert not (ours and no_graph), f"{name} cannot be captured in a CUDA graph: {no_graph}"
            if no_graph:
                left_out({f"{name} in a CUDA graph": f"launched call by call: {no_graph}"})
        times: Times = {name: [] for name in ready}
        names, order = list(ready), random.Random(0)
        gc.collect()
        gc.disable()
        try:
            start = time.perf_counter()
            while time.perf_counter() - start < seconds or len(next(iter(times.values()))) < rounds:
                order.shuffle(names)  # a library's threads spin for a while and slow whichever function comes next
                for name in names:
                    function, calls = ready[name]
                    begin = time.perf_counter()
                    function()
                    if DEVICE == "cuda":
                        torch.cuda.synchronize()
                    times[name].append(1e3 * (time.perf_counter() - begin) / calls)
        finally:
            gc.enable()
        return times

    return run


@pytest.fixture
def record(request) -> Callable[..., list[dict]]:
    """record(benchmark, shape, times, plain=, peers=, floor_ms=, more=) -> records, which are kept if the test passes.

    Args:
        benchmark, shape: what was timed.
        times: what `interleave` returned.
        plain: the variant that is plain PyTorch. A variant's ratio is the median of plain PyTorch over its own median:
            above 1 the variant is faster.
        peers: variants of other libraries. The fastest of them is the best peer.
        floor_ms: the time of the least work at a measured rate. None can beat it on a GPU; on a CPU some variants do. A
            variant's `floor_share` is floor_ms / median.
        more: further fields of a variant's record, such as `clips_per_second` and `mfu`.
    """
    written: list[dict] = []
    request.node.user_properties.append(("records", written))

    def write(
        benchmark: str,
        shape: str,
        times: Times,
        *,
        plain: str | None = None,
        peers: Iterable[str] = (),
        floor_ms: float | None = None,
        more: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> list[dict]:
        medians = {name: statistics.median(values) for name, values in times.items()}
        best = min((peer for peer in peers if peer in medians), key=lambda peer: medians[peer], default=None)
        new = [
            {
                "benchmark": benchmark,
                "variant": name,
                "shape": shape,
                "median_ms": medians[name],
                "p20_ms": percentile(values, 0.2),
                "p80_ms": percentile(values, 0.8),
                "floor_share": None if floor_ms is None else floor_ms / medians[name],
                "ratio_to_plain": medians[plain] / medians[name] if plain in medians else None,
                "ratio_to_best_peer": None if best is None else medians[best] / medians[name],
                "best_peer": best,
                **(more or {}).get(name, {}),
            }
            for name, values in times.items()
        ]
        written.extend(new)
        columns = ("median ms", "p20", "p80", "of floor", "x plain")
        print(f"\n{benchmark} {shape:<{max(0, 35 - len(benchmark))}}", *(f"{c:>10}" for c in columns), file=sys.stderr)
        for r in sorted(new, key=lambda r: r["median_ms"]):
            numbers = [f"{r[key]:10.3f}" for key in ("median_ms", "p20_ms", "p80_ms")]
            ratios = [f"{r[key]:10.2f}" if r[key] else " " * 10 for key in ("floor_share", "ratio_to_plain")]
            print(f"  {r['variant']:34}", *numbers, *ratios, file=sys.stderr)
        return new

    return write


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Write the records of a passed test into the result file. In a run of gpu.py, worker.py takes them instead."""
    if call.when == "call":
        item.user_properties.append(("left_out", LEFT_OUT.get(item.nodeid, {})))
    report = yield
    if records.JOURNAL:
        return report
    if report.failed:
        records.put(records.results_path(), item.nodeid, [])
    elif report.when == "call":
        kept = dict(item.user_properties)
        if report.passed and kept.get("records"):
            records.put(records.results_path(), item.nodeid, kept["records"])
        records.put_left_out(records.results_path(), item.nodeid, kept["left_out"])
    return report


def pytest_terminal_summary(terminalreporter):
    lines = result_files.left_out_lines(LEFT_OUT)
    if lines:
        terminalreporter.section("left out on this machine")
    for line in lines:
        terminalreporter.write_line(line)


def pytest_sessionfinish(session):
    if records.JOURNAL:
        return
    option = session.config.option
    everything = not (option.keyword or option.markexpr or option.collectonly or session.testsfailed)
    if everything and all(Path(argument).is_dir() for argument in session.config.args):
        records.forget_others(records.results_path(), {item.nodeid for item in session.items})
