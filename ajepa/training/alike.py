"""What all ranks of a run must have in common when it starts: code, settings and data.

Ranks that differ in these would train on, each on its own idea of the run, and often unnoticed: gradients have the same
shapes whatever they were computed from. Each rank describes itself in texts, and all ranks compare the descriptions.
"""

import hashlib
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import ajepa
import ajepa_kernels
from ajepa.config import Config
from ajepa.data.index import Index
from ajepa.training.ranks import ElsewhereError, Ranks
from ajepa.utils.cli import flag, leaves
from ajepa.utils.errors import UserError
from ajepa_kernels import _extension

PER_MACHINE = {
    "device",
    "threads",
    "loader_threads",
    "pin_cores",
}  # settings that may differ between the machines of a run
SHOWN = 3  # different sorts of ranks that an error names


class UnlikeError(UserError, RuntimeError):
    """The ranks were started with different code, settings or data."""


def check_code(ranks: Ranks) -> None:
    """Raise UnlikeError unless all ranks run the same code. Like every check here, all ranks must call it."""
    if not ranks.alone:
        _compare(ranks, describe_code(), "runs other code", "install the same versions on all nodes")


def check_settings(ranks: Ranks, cfg: Config) -> None:
    """Raise UnlikeError unless all ranks have the same settings, but for those in `PER_MACHINE`."""
    if not ranks.alone:
        settings = {flag(name): repr(value) for name, value in leaves(cfg) if name not in PER_MACHINE}
        _compare(ranks, settings, "has other settings", "start all ranks with the same flags")


def check_data(ranks: Ranks, training: Index, evaluation: Index | None) -> None:
    """Raise UnlikeError unless all ranks index the same recordings. `evaluation` is None where it is `training`."""
    if ranks.alone:
        return
    indices = {"--data": training, "--eval-data": evaluation}
    found = {name: f"{len(i):,} recordings ({i.fingerprint})" for name, i in indices.items() if i is not None}
    remedy = "all nodes must see the same files under the same paths; those of the synthetic set are under AJEPA_CACHE"
    _compare(ranks, found, "finds other recordings", remedy)


def describe_code() -> dict[str, str]:
    """Versions of what computes, by name. Those of our packages end with a hash of their files, which may be edited.

    Of the compiled part, only its kind counts, because the same sources give other bytes on each machine.
    """
    found = {}
    for package in (ajepa, ajepa_kernels):
        root, digest = Path(package.__path__[0]), hashlib.sha256()
        for path in sorted(root.rglob("*.py")):
            digest.update(f"{path.relative_to(root).as_posix()}\0".encode())
            digest.update(hashlib.sha256(path.read_bytes()).digest())
        found[package.__name__] = f"{package.__version__} {digest.hexdigest()[:8]}"
    compiled = "C++ and CUDA" if _extension.CUDA else "C++" if _extension.AVAILABLE else "absent"
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "absent"
    python = ".".join(map(str, sys.version_info[:2]))
    return {**found, "its compiled part": compiled, "torch": torch.__version__, "triton": triton, "Python": python}


def _compare(ranks: Ranks, mine: dict[str, str], what: str, remedy: str) -> None:
    """Raise UnlikeError on rank 0 and ElsewhereError on the others unless `mine` is the same on all ranks."""
    (first_host, first), *others = ranks.gather((platform.node(), mine))
    unlike: dict[tuple[str, str], list[str]] = {}  # by machine and differences, the ranks
    for rank, (host, theirs) in enumerate(others, start=1):
        differing = [name for name in {**first, **theirs} if theirs.get(name) != first.get(name)]
        if differing:
            text = ", ".join(f"{name} {theirs.get(name)} instead of {first.get(name)}" for name in differing)
            unlike.setdefault((host, text), []).append(str(rank))
    if unlike and not ranks.is_first:
        raise ElsewhereError
    if unlike:
        found = [
            f"rank {', '.join(numbers)} ({host}) {what} than rank 0 ({first_host}): {text}"
            for (host, text), numbers in unlike.items()
        ]
        more = f"; and {len(found) - SHOWN} others" if len(found) > SHOWN else ""
        raise UnlikeError(f"{'; '.join(found[:SHOWN])}{more}; {remedy}")
