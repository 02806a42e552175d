"""`--profile`: where the time of some steps went, as a trace to look at and as a table."""

import re
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from ajepa.training.engine import wait

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
                found = breakdown(self.profile, self.device, seconds, self.steps)
                self.say(report(found, seconds, self.steps, total, peak))
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


class Kernel(NamedTuple):
    """A kernel (GPU) or an operator (CPU), and what it took of the profiled time."""

    name: str
    kind: str  # of KINDS
    ms: float  # a step
    calls: float  # a step
    share: float  # of the wall time


class Breakdown(NamedTuple):
    """Where the wall time of some steps went."""

    kinds: dict[str, float]  # share of the wall time of each of KINDS, and of "idle", when no kernel ran
    kernels: list[Kernel]  # the dearest first


def breakdown(profiled: profile, device: torch.device, seconds: float, steps: int) -> Breakdown:
    """What `steps` profiled steps of together `seconds` spent their time on.

    Kernels of several streams may run at once, so that the shares may add up to more than 1.
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
    """`found` as text: the share of each kind, and the dearest kernels. `flops`: of all steps; `peak`: FLOP/s."""
    lines = [f"profile of {steps} steps, {1e3 * seconds / steps:.1f} ms each, {flops / seconds / 1e12:.3g} TFLOP/s"]
    lines[0] += f", MFU {flops / seconds / peak:.1%}" if peak else ""
    lines += [f"  {kind:<26}{share:>7.1%}" for kind, share in found.kinds.items()]
    lines.append(f"  {'dearest':<60}{'ms a step':>10}{'calls':>8}{'share':>8}")
    for kernel in found.kernels[:12]:
        name = kernel.name if len(kernel.name) <= 58 else kernel.name[:55] + "..."
        lines.append(f"  {name:<60}{kernel.ms:>10.2f}{kernel.calls:>8.1f}{kernel.share:>8.1%}")
    return "\n".join(lines)
