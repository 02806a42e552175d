"""The processors that this process may use, and how many of them other processes leave free."""

import math
import os
import time
from pathlib import Path
from typing import NamedTuple

QUOTAS = ("/sys/fs/cgroup/cpu.max", "/sys/fs/cgroup/cpu/cpu.cfs_quota_us")  # of version 2 and of version 1


class Snapshot(NamedTuple):
    """Seconds since the system started, at one moment."""

    now: float
    own: float  # processor time of this process
    idle: dict[int, float]  # idle time of each processor that this process is bound to


start: Snapshot | None = None  # of a command, before it imported anything large
sharing: int | None = None  # ranks that use this process's processors (`ajepa.utils.pinning`); None: all of its machine


def cores() -> int:
    """Number of processors this process may use: those it is bound to, and no more than its container's quota."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(bound, quota())))


def sharers() -> int:
    """The number of ranks, this one included, that use the processors of this process."""
    return sharing or local_ranks()


def local_ranks() -> int:
    """The number of ranks on this machine, which torchrun sets."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def quota() -> float:
    """Processors' worth of time that the container may use; infinite without a limit."""
    for path in map(Path, QUOTAS):
        try:
            words = path.read_text().split()
            period = words[1] if len(words) > 1 else path.with_name("cpu.cfs_period_us").read_text()
            if words[0] not in ("max", "-1"):
                return int(words[0]) / int(period)
        except (OSError, ValueError, IndexError, ZeroDivisionError):
            continue
    return math.inf


def snapshot() -> Snapshot | None:
    """The present moment; None if the system does not tell the idle time. Waiting for a disk counts as idle."""
    try:
        lines = Path("/proc/stat").read_text().splitlines()
        mine = os.sched_getaffinity(0)
    except (OSError, AttributeError):
        return None
    rows = [line.split() for line in lines if line.startswith("cpu") and line[3].isdigit()]
    tick = os.sysconf("SC_CLK_TCK")
    idle = {int(row[0][3:]): (int(row[4]) + int(row[5])) / tick for row in rows if int(row[0][3:]) in mine}
    return Snapshot(time.monotonic(), time.process_time(), idle)


def free_cores(since: Snapshot | None) -> float | None:
    """How many processors other processes have left to this one since a snapshot; None if the system does not tell."""
    end = snapshot()
    if since is None or end is None or end.now - since.now < 0.05:
        return None
    idle = sum(end.idle[cpu] - since.idle[cpu] for cpu in since.idle.keys() & end.idle.keys())
    return min((idle + end.own - since.own) / (end.now - since.now), len(end.idle))
