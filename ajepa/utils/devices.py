"""The device of a run: its choice and precision, waiting for its work, and its memory."""

import contextlib
import gc
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]


def choose_device(name: str) -> torch.device:
    """The device called `name`; "auto" means the GPU if there is one, else the CPU."""
    return torch.device(name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu")


def trains_in_bf16(device: torch.device) -> bool:
    """Whether training in bfloat16 is faster than in float32: on a GPU, and on a CPU that multiplies bfloat16."""
    if device.type != "cpu":
        return True
    capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.11 lacks it
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def wait(device: torch.device) -> None:
    """Block until the device has finished all queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def available_memory() -> int:
    """Bytes of the CPU's memory that this process can still take; `sys.maxsize` where the system does not tell.

    The least of what the system has available and what each of the process's control groups leaves.
    """
    found = [sys.maxsize]
    with contextlib.suppress(OSError, ValueError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        found += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    for folder in _control_groups():
        for limit, usage, cache in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            with contextlib.suppress(OSError, ValueError, KeyError):
                free = int((folder / limit).read_text()) - int((folder / usage).read_text())
                stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                found.append(max(0, free) + int(stat[cache]))  # the system drops cached files when memory is short
    return min(found)


def _control_groups() -> Iterator[Path]:
    """Folders of the memory control groups that hold this process, in both versions of Linux's control groups."""
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, name = line.split(":", 2)
            root = Path("/sys/fs/cgroup/memory" if "memory" in controllers.split(",") else "/sys/fs/cgroup")
            own = root / name.strip("/")
            yield from itertools.takewhile(lambda folder: folder != root.parent, (own, *own.parents))  # noqa: B023


def peak_memory(device: torch.device) -> int:
    """The most bytes that this process has reserved on a GPU, or has held in a CPU's memory (0 if unknown)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    if resource is None:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def reserved_memory(device: torch.device) -> int:
    """Bytes that this process now reserves on a GPU; 0 for a CPU."""
    return torch.cuda.memory_reserved(device) if device.type == "cuda" else 0


def release_memory(device: torch.device) -> None:
    """Return the memory of deleted models to the device. Engines hold reference cycles, so the collector must run."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
