"""The rates that floors are computed from, measured in the run that reports them, and inputs that no cache holds."""

import itertools
from collections.abc import Callable

from conftest import DEVICE

from ajepa import ceilings

SECONDS = 3.0 if DEVICE == "cuda" else 1.0  # of timing a shape: CPUs run the plain definitions, to see that all works
CACHE_BYTES = 180 << 20 if DEVICE == "cuda" else 64 << 20


def copy_bytes_per_ms() -> float:
    return ceilings.copy_bytes_per_ms(DEVICE)


def rotating(function: Callable[..., object], make: Callable[[], tuple], bytes_each: int) -> Callable[[], object]:
    """`function` on a next set of inputs at each call, of enough sets to overflow the caches."""
    sets = itertools.cycle([make() for _ in range(min(1 + CACHE_BYTES // max(bytes_each, 1), 64))])
    return lambda: function(*next(sets))
