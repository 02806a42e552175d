"""`--profile`: profile some steps, write a trace file and print a table of where the time went."""

import re
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from ajepa.utils.devices import wait

SKIPPED = 10  # first steps, with compilation, graph capture and a cold file cache
# A kernel (GPU) or an operator (CPU) is of the first kind whose pattern matches its name.
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
    """Profiles `steps` steps once, after the first ten, and writes `trace.json` into the run folder."""

    def __init__(self, folder: Path, steps: int, device: torch.device, say: Callable[[str], None]):
        self.path, self.steps, self.device, self.say = folder / "trace.json", steps, device, say
        self.done = 0
        self.flops: list[Callable[[], float]] = []  # called at the end, because they read the device
        self.profile: profile | None = None

    def step(self, flops: Callable[[], float], peak: float | None) -> None:
        """Call after each step. `flops()` returns the step's FLOPs; `peak` is the device's peak in FLOP/s, if known."""
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
                found = breakdown(self.profile, self.device, seconds, self.steps)
                self.say(report(found, seconds, self.steps, total, peak))
                self.say(f"trace written to {self.path}")
                self.profile = None

    def close(self) -> None:
        if self.profile is not None:
            self.profile.stop()
            self.say(f"the run ended before {SKIPPED + self.steps} steps: nothing was profiled")


def union(spans: Iterable[tuple[float, float]]) -> float:
    """Total time covered by the intervals (begin, end); overlaps count once."""
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total


class Kernel(NamedTuple):
    """A kernel (GPU) or an operator (CPU) and its part of the profiled time."""

    name: str
    kind: str  # one of KINDS
    ms: float  # per step
    calls: float  # per step
    share: float  # of the wall time


class Breakdown(NamedTuple):
    """Where the wall time of some steps went."""

    kinds: dict[str, float]  # share of the wall time by kind; "idle" is the share without a kernel
    kernels: list[Kernel]  # longest time first


def breakdown(profiled: profile, device: torch.device, seconds: float, steps: int) -> Breakdown:
    """Break down the time of `steps` profiled steps that took `seconds` together.

    Kernels of several streams may overlap, so the shares may add up to more than 1.
    """
    on_gpu = device.type == "cuda"
    kernels = []
    for event in profiled.key_averages():
        if not _counts(event, on_gpu):
            continue
        spent = (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e6
        share = spent / seconds
        kernels.append(Kernel(event.key, kind_of(event.key), 1e3 * spent / steps, event.count / steps, share))
    kernels.sort(key=lambda kernel: -kernel.ms)
    kinds = dict.fromkeys(KINDS, 0.0)
    for kernel in kernels:
        kinds[kernel.kind] += kernel.share
    busy = sum(kinds.values())
    if on_gpu:
        spans = [(e.time_range.start, e.time_range.end) for e in profiled.events() if _counts(e, on_gpu)]
        busy = union(spans) / 1e6 / seconds
    return Breakdown({**kinds, "idle": max(0.0, 1 - busy)}, kernels)


def _counts(event, on_gpu: bool) -> bool:
    """Whether a profiler's event is a kernel (on a GPU; an annotation only spans kernels) or an operator (on a CPU)."""
    if on_gpu:
        return event.device_type == DeviceType.CUDA and not event.is_user_annotation
    return event.device_type != DeviceType.CUDA


def report(found: Breakdown, seconds: float, steps: int, flops: float, peak: float | None) -> str:
    """Format `found` as text. `flops` counts all profiled steps; `peak` is the device's peak in FLOP/s."""
    lines = [f"profile of {steps} steps, {1e3 * seconds / steps:.1f} ms each, {flops / seconds / 1e12:.3g} TFLOP/s"]
    lines[0] += f", MFU {flops / seconds / peak:.1%}" if peak else ""
    lines += [f"  {kind:<26}{share:>7.1%}" for kind, share in found.kinds.items()]
    lines.append(f"  {'longest':<60}{'ms/step':>10}{'calls':>8}{'share':>8}")
    for kernel in found.kernels[:12]:
        name = kernel.name if len(kernel.name) <= 58 else kernel.name[:55] + "..."
        lines.append(f"  {name:<60}{kernel.ms:>10.2f}{kernel.calls:>8.1f}{kernel.share:>8.1%}")
    return "\n".join(lines)
