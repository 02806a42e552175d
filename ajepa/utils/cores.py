"""The processors that this process may use, and how many of them are free."""

import math
import os
import time
from pathlib import Path

QUOTAS = ("/sys/fs/cgroup/cpu.max", "/sys/fs/cgroup/cpu/cpu.cfs_quota_us")  # of version 2 and of version 1


def cores() -> int:
    """Number of processors this process may use: those it is bound to, and no more than its container's quota."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(bound, quota())))


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


def free_cores(seconds: float = 0.2) -> float | None:
    """How many of the processors that this process is bound to were idle for `seconds`; None if the system can't tell.

    Waiting for a disk counts as idle.
    """
    before = _idle()
    time.sleep(seconds)
    after = _idle()
    if before is None or after is None:
        return None
    ticks = os.sysconf("SC_CLK_TCK") * seconds
    return sum(min(1.0, (after[cpu] - before[cpu]) / ticks) for cpu in before.keys() & after.keys())


def _idle() -> dict[int, int] | None:
    """Ticks for which each processor of this process has been idle."""
    try:
        lines = Path("/proc/stat").read_text().splitlines()
        mine = os.sched_getaffinity(0)
    except (OSError, AttributeError):
        return None
    rows = [line.split() for line in lines if line.startswith("cpu") and line[3].isdigit()]
    return {int(row[0][3:]): int(row[4]) + int(row[5]) for row in rows if int(row[0][3:]) in mine}
