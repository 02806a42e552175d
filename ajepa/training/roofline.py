"""Measured limits of this machine: the throughput of a large copy and of a large matrix product."""

import functools
import time
from collections.abc import Callable

import torch


def best_ms(function: Callable[[], object], device: str, repeats: int = 10) -> float:
    """Time of the fastest of `repeats` calls in milliseconds; the first call does not count."""
    times = []
    for _ in range(repeats):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    return min(times[1:])


@functools.cache
def copy_bytes_per_ms(device: str) -> float:
    """Bytes that a large copy reads and writes per millisecond."""
    source = torch.empty(2**30 if device == "cuda" else 2**27, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    return 2 * source.numel() / best_ms(lambda: target.copy_(source), device)


@functools.cache
def product_flops_per_ms(dtype: torch.dtype, device: str) -> float:
    """Floating-point operations per millisecond of a large square product in `dtype`, 2 n^3 in all."""
    n = 8192 if device == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * n**3 / best_ms(lambda: a @ b, device)
