"""`--profile`: where the time of some steps went, as a trace to look at and as a table."""

import re
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from ajepa.engine import wait

SKIPPED = 10  # compilation, graph capture, file cache
# The first that matches the name of a kernel (GPU) or of an operator (CPU).
KINDS = {
    "front end": r"log_mel|fft|fbank|stft",
    "attention": r"attention|flash|fmha|sdpa|softmax|bmm",
    "optimiser": r"adam|ema_update|lerp|multi_tensor|_foreach_",
    "GEMM": r"gemm|nvjet|cutlass|cublas|xmma|addmm|\bmm\b|linear|mkldnn|onednn",
    "copies": r"memcpy|memset|copy_|aten::_to_copy|aten::to\b",
    "element-wise and norms": r"",
}


def kind_of(name: str) -> str:
    return next(kind for kind, pattern in KINDS.items() if re.search(pattern, name, re.IGNORECASE))


class StepProfile:
    """Profiles `steps` steps after the first ten, once, and writes `trace.json` into the run folder."""

    def __init__(self, folder: Path, steps: int, device: torch.device, say: Callable[[str], None]):
        self.path, self.steps, self.device, self.say = folder / "trace.json", steps, device, say
        self.done = 0
        self.flops: list[Callable[[], float]] = []  # asked at the end: they read the device
        self.profile: profile | None = None

    def step(self, flops: Callable[[], float], peak: float | None) -> None:
        """After each step; `flops()`: of that step, `peak`: FLOP/s of the device, where known."""
        if not self.steps:
            return
        self.done += 1
        if self.done == SKIPPED:
            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (self.device.type == "cuda")
            wait(self.device)
            self.profile, self.start = profile(activities=activities), time.perf_counter()
            self.profile.start()
        elif self.profile is not None:
            self.flops.append(flops)
            if self.done == SKIPPED + self.steps:
                wait(self.device)
                seconds = time.perf_counter() - self.start
                self.profile.stop()
                self.profile.export_chrome_trace(str(self.path))
                total = sum(flops() for flops in self.flops)
                self.say(report(self.profile, self.device, seconds, self.steps, total, peak))
                self.say(f"trace written to {self.path}")
                self.profile = None

    def close(self) -> None:
        if self.profile is not None:
            self.profile.stop()
            self.say(f"the run ended before {SKIPPED + self.steps} steps: nothing was profiled")


def union(spans: Iterable[tuple[float, float]]) -> float:
    """How long at least one of these (begin, end) lasts."""
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total


def report(profiled: profile, device: torch.device, seconds: float, steps: int, flops: float, peak) -> str:
    """Share of the wall time by kind, and the dearest kernels (GPU) or operators (CPU). Idle: none of them ran. Kernels
    of several streams may run at once, so that the shares add up to more than the rest."""
    on_gpu = device.type == "cuda"
    times: dict[str, tuple[float, int]] = {}
    for event in profiled.key_averages():
        if (event.device_type == DeviceType.CUDA) != on_gpu:
            continue
        us = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        times[event.key] = (us / 1e6, event.count)
    shares = dict.fromkeys(KINDS, 0.0)
    for name, (spent, _) in times.items():
        shares[kind_of(name)] += spent / seconds
    lines = [f"profile of {steps} steps, {1e3 * seconds / steps:.1f} ms each, {flops / seconds / 1e12:.3g} TFLOP/s"]
    lines[0] += f", MFU {flops / seconds / peak:.1%}" if peak else ""
    lines += [f"  {kind:<26}{share:>7.1%}" for kind, share in shares.items()]
    busy = sum(shares.values())
    if on_gpu:
        spans = [(e.time_range.start, e.time_range.end) for e in profiled.events() if e.device_type == DeviceType.CUDA]
        busy = union(spans) / 1e6 / seconds
    lines.append(f"  {'idle':<26}{max(0.0, 1 - busy):>7.1%}")
    lines.append(f"  {'dearest':<60}{'ms a step':>10}{'calls':>8}{'share':>8}")
    for name, (spent, calls) in sorted(times.items(), key=lambda item: -item[1][0])[:12]:
        shown = name if len(name) <= 58 else name[:55] + "..."
        lines.append(f"  {shown:<60}{1e3 * spent / steps:>10.2f}{calls / steps:>8.1f}{spent / seconds:>8.1%}")
    return "\n".join(lines)
