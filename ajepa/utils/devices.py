"""The device of a run: its choice and precision, waiting for its work, and its memory."""

import contextlib
import gc
import math
import os
import sys
from pathlib import Path

import torch

from ajepa.utils import cores
from ajepa.utils.cores import free_cores
from ajepa.utils.errors import ConfigError

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

GROUPS = Path("/sys/fs/cgroup")


def choose_device(name: str) -> torch.device:
    """The device called `name`; "auto" means the GPU if there is one, else the CPU.

    Raises ConfigError for "cuda" where there is no GPU.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: no CUDA device is here; use --device cpu")
    return torch.device(name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu")


def choose_threads(asked: int) -> int:
    """Number of CPU threads for torch: `asked`, or for 0 as many as a command finds free cores.

    Where OMP_NUM_THREADS is set, and in programs that are no commands of ajepa, 0 leaves torch's number as it is.
    """
    most = torch.get_num_threads()
    free = None if asked or "OMP_NUM_THREADS" in os.environ else free_cores(cores.start)
    if free is None:
        return asked or most
    share = free / cores.sharers()
    return max(1, min(most, math.ceil(share - 0.25)))  # a core counts if others leave more than a quarter of it


def trains_in_bf16(device: torch.device) -> bool:
    """Whether training in bfloat16 is faster than in float32: on a GPU, and on a CPU that multiplies bfloat16."""
    if device.type != "cpu":
        return True
    capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.11 lacks it
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def evaluates_in_bf16(device: torch.device, precision: str) -> bool:
    """Whether encoding and fine-tuning compute in bfloat16: if `precision` is "bf16", or "auto" on a GPU."""
    return precision == "bf16" or (precision == "auto" and device.type == "cuda")


def autocast_of(device: torch.device, precision: str) -> contextlib.AbstractContextManager:
    """The context in which encoding and fine-tuning compute in `precision`: "fp32", "bf16" or "auto"."""
    bf16 = evaluates_in_bf16(device, precision)
    return torch.autocast(device.type, torch.bfloat16) if bf16 else contextlib.nullcontext()


def wait(device: torch.device) -> None:
    """Block until the device has finished all queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(device: torch.device) -> int:
    """The most bytes that this process has reserved on a GPU, or has held in a CPU's memory (0 if unknown)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    if resource is None:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def available_memory() -> int:
    """Bytes of a CPU's memory that can still be taken; `sys.maxsize` if the system does not say.

    It is the least of what the machine has and of what the control groups of this process (a container, a batch job)
    leave. Memory that the system would free, such as caches of files, counts as available.
    """
    free = sys.maxsize
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    with contextlib.suppress(OSError, ValueError):
        own = Path("/proc/self/cgroup").read_text().splitlines()
        for place in (line.split(":", 2) for line in own):
            if place[1] in ("", "memory"):
                free = min(free, _group_memory(place[1], place[2].strip("/")))
    return free


def _group_memory(controller: str, place: str) -> int:
    """Bytes that a control group and those above it leave: version 2 has the controller "", version 1 "memory"."""
    root, limit, usage = GROUPS / controller, "memory.limit_in_bytes", "memory.usage_in_bytes"
    if not controller:
        limit, usage = "memory.max", "memory.current"
    free = sys.maxsize
    for folder in (root / place, *(root / place).parents):
        with contextlib.suppress(OSError, ValueError):  # "max" is no limit
            most, used = int((folder / limit).read_text()), int((folder / usage).read_text())
            caches = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            free = min(free, most - used + int(caches.get("total_inactive_file", caches.get("inactive_file", 0))))
        if folder == root:
            break
    return max(0, free)


def free_memory(device: torch.device) -> int:
    """Bytes of the memory of `device` that can still be taken."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory()


def reserved_memory(device: torch.device) -> int:
    """Bytes that this process now reserves on a GPU; 0 for a CPU."""
    return torch.cuda.memory_reserved(device) if device.type == "cuda" else 0


def release_memory(device: torch.device) -> None:
    """Return the memory of deleted models to the device. Engines hold reference cycles, so the collector must run."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
