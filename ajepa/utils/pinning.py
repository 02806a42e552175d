"""Binds the ranks of a machine to cores of their own, near their GPUs.

`torchrun --numa-binding` does this for the processes that it starts. What torch has for it cannot be used here: its
functions are private, need the program numactl, and divide the cores by the GPUs of the machine, not by its ranks.
"""

import contextlib
import os
import platform
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ajepa.utils import cores

SYSTEM = Path("/sys/devices/system")
PCI = Path("/sys/bus/pci/devices")
BOOT = Path("/proc/sys/kernel/random/boot_id")
THREADS = Path("/proc/self/task")


class Place(NamedTuple):
    """Where a rank runs. The ranks exchange their places before they are bound."""

    host: str
    cpus: list[int]  # the processors it may use; none where the system does not tell
    node: int  # NUMA node of its GPU; -1 if it has none, or if the system does not tell


class Core(NamedTuple):
    """A physical core, and those of its processors (hyperthreads) that may be used."""

    node: int  # its NUMA node, -1 if the system does not tell
    cpus: list[int]
    package: int  # its socket


def place(device: torch.device) -> Place:
    """The place of this process, whose device is `device`."""
    cpus = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_setaffinity") else []
    node = -1
    if device.type == "cuda":
        gpu: Any = torch.cuda.get_device_properties(device)  # torch declares no pci_* to type checkers
        node = _number(PCI / f"{gpu.pci_domain_id:04x}:{gpu.pci_bus_id:02x}:{gpu.pci_device_id:02x}.0" / "numa_node")
    # Containers of one machine may have the same boot id, and machines made from one image the same name.
    return Place(f"{platform.node()} {_text(BOOT)}", cpus, node)


def pin(places: list[Place], rank: int, wanted: bool = True) -> str:
    """Bind this process to its own share of the cores that the ranks of its machine may use.

    Its threads are bound too, those that run already as well as later ones; but torch has chosen their number when it
    was imported. Call it therefore before the loader, whose threads are one per core by default. The cores stay as they
    are where the launcher has bound the ranks already, so that their cores differ; where a container may use its cores
    for only a part of the time, because others then use them as well; and where there are fewer cores than ranks.

    In any case `ajepa.utils.cores.sharers` is from now on the number of ranks that really use this rank's cores.

    Args:
        places: `place` of every rank of the run, in rank order.
        rank: the number of this process.
        wanted: False binds nothing.

    Returns:
        A line for the log, such as "rank 3: cores 24-31 (NUMA node 1)".
    """
    mine = places[rank]
    peers = [other for other in places if other.host == mine.host]
    before, own, note = set(mine.cpus), set(mine.cpus), ""
    if any(other.cpus != mine.cpus for other in peers):
        note = ", bound by the launcher"
    elif wanted and before and len(peers) > 1:
        index = sum(other.host == mine.host for other in places[:rank])
        own = share(before, [other.node for other in peers], index) if cores.quota() >= len(before) else set()
        try:
            if own:
                _bind(before, own)
        except OSError as error:
            own, note = set(), f": {error.strerror}"
    if not own:
        own, note = before, f", not bound{note}"
    bound = own != before
    cores.sharing = 1 if bound else sum(not own.isdisjoint(other.cpus) for other in peers) or len(peers)
    return f"rank {rank}: {_describe(own)}{note}"


def share(cpus: set[int], nodes: list[int], index: int) -> set[int]:
    """The processors of one of the ranks of a machine; none if there are fewer cores than ranks.

    The ranks of a socket divide its cores evenly, in the order of the NUMA nodes of both. A socket may have more nodes
    than GPUs, so its nodes by themselves would leave cores without a rank. All cores are divided among all ranks where
    the node of a GPU is not known, or its socket has too few cores that may be used.

    Args:
        cpus: the processors that the ranks may use.
        nodes: the NUMA node of each rank's GPU.
        index: the rank's place in `nodes`.
    """
    found = _cores(cpus)
    sockets = {node: frozenset(c.package for c in found if c.node == node) for node in {core.node for core in found}}
    homes = [sockets.get(node) for node in nodes]
    parts = {home: [core for core in found if sockets[core.node] == home] for home in homes}
    if any(len(part) < homes.count(home) for home, part in parts.items()):
        homes, parts = [None] * len(nodes), {None: found}
    part = parts[homes[index]]
    ranks = sorted((r for r, home in enumerate(homes) if home == homes[index]), key=lambda r: (nodes[r], r))
    if len(part) < len(ranks):
        return set()
    first, end = (len(part) * i // len(ranks) for i in (ranks.index(index), ranks.index(index) + 1))
    return {cpu for core in part[first:end] for cpu in core.cpus}


def _cores(cpus: set[int]) -> list[Core]:
    """The cores that `cpus` belong to, in the order of their NUMA nodes."""
    nodes = _nodes()
    found = {}
    for cpu in sorted(cpus):
        topology = SYSTEM / f"cpu/cpu{cpu}/topology"
        together = sorted(_numbers(_text(topology / "thread_siblings_list")) & cpus | {cpu})
        found[together[0]] = Core(nodes.get(cpu, -1), together, _number(topology / "physical_package_id"))
    return sorted(found.values())


def _nodes() -> dict[int, int]:
    """The NUMA node of each processor; none if the system does not tell."""
    folders = SYSTEM.glob("node/node[0-9]*")
    return {cpu: int(folder.name[4:]) for folder in folders for cpu in _numbers(_text(folder / "cpulist"))}


def _bind(before: set[int], own: set[int]) -> None:
    """Bind all threads of this process that are bound as it is. Raises OSError where this is forbidden."""
    os.sched_setaffinity(0, own)
    for thread in [int(folder.name) for folder in THREADS.glob("[0-9]*")]:
        with contextlib.suppress(OSError):  # the thread has ended
            if os.sched_getaffinity(thread) == before:  # a library that binds its threads itself knows why
                os.sched_setaffinity(thread, own)


def _describe(cpus: set[int]) -> str:
    """Such as "cores 0-7, 64-71 (NUMA node 0)"."""
    starts = [cpu for cpu in sorted(cpus) if cpu - 1 not in cpus]
    ends = [cpu for cpu in sorted(cpus) if cpu + 1 not in cpus]
    ranges = [str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True)]
    nodes = _nodes()
    of = sorted({nodes[cpu] for cpu in cpus & nodes.keys()})
    named = f" (NUMA node{'s' * (len(of) > 1)} {', '.join(map(str, of))})" if of else ""
    return f"cores {', '.join(ranges) or 'unknown'}{named}"


def _numbers(text: str) -> set[int]:
    """The numbers of a list such as "0-3,8"."""
    ends = [[int(end) for end in word.split("-")] for word in text.split(",") if word]
    return {cpu for first, *rest in ends for cpu in range(first, (rest or [first])[0] + 1)}


def _number(path: Path) -> int:
    text = _text(path)
    return int(text) if text else -1


def _text(path: Path) -> str:
    with contextlib.suppress(OSError):
        return path.read_text().strip()
    return ""
