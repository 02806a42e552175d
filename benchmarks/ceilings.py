"""The rates that floors are computed from, measured in the run that reports them, and inputs that no cache holds."""

import functools
import itertools
import sys
import time
from collections.abc import Callable

import torch
from conftest import DEVICE

SECONDS = 3.0 if DEVICE == "cuda" else 1.0  # of timing a shape: CPUs run the plain definitions, to see that all works
CACHE_BYTES = 180 << 20 if DEVICE == "cuda" else 64 << 20


def _best_ms(function: Callable[[], object], repeats: int = 10) -> float:
    times = []
    for _ in range(repeats):
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    return min(times[1:])


@functools.cache
def copy_bytes_per_ms() -> float:
    """Bytes read and written by a large copy."""
    source = torch.empty(2**30 if DEVICE == "cuda" else 2**27, dtype=torch.uint8, device=DEVICE).random_()
    target = torch.empty_like(source)
    return 2 * source.numel() / _best_ms(lambda: target.copy_(source))


@functools.cache
def product_flops_per_ms(dtype: torch.dtype) -> float:
    n = 8192 if DEVICE == "cuda" else 1024
    a, b = (torch.randn(n, n, device=DEVICE, dtype=dtype) for _ in range(2))
    return 2 * n**3 / _best_ms(lambda: a @ b)


def rotating(function: Callable[..., object], make: Callable[[], tuple], bytes_each: int) -> Callable[[], object]:
    """`function` on a next set of inputs at each call, of enough sets to overflow the caches."""
    sets = itertools.cycle([make() for _ in range(min(1 + CACHE_BYTES // max(bytes_each, 1), 64))])
    return lambda: function(*next(sets))


def left_out(reasons: dict[str, str]) -> None:
    for variant, reason in reasons.items():
        print(f"  left out: {variant}: {reason}", file=sys.stderr)
