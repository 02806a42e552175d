"""Measures the rates that floors are computed from in the run that reports them, and makes inputs that miss caches."""

import functools
import itertools
from collections.abc import Callable

import torch
import torch._functorch.config
from records import DEVICE, QUICK

from ajepa.training import roofline

torch._functorch.config.donated_buffer = False  # `backward_only` reads the saved tensors repeatedly

# The seconds for which a shape is timed. A CPU runs the plain definitions, which only shows that everything works.
SECONDS = (0.6 if QUICK else 3.0) if DEVICE == "cuda" else (0.05 if QUICK else 1.0)
CACHE_BYTES = 180 << 20 if DEVICE == "cuda" else 4 << 20 if QUICK else 64 << 20


def copy_bytes_per_ms() -> float:
    return roofline.copy_bytes_per_ms(DEVICE)


def rotating(function: Callable[..., object], make: Callable[[], tuple], bytes_each: int) -> Callable[[], object]:
    """Return a function that calls `function` on the next of several input sets, which together overflow the caches."""
    sets = itertools.cycle([make() for _ in range(min(1 + CACHE_BYTES // max(bytes_each, 1), 64))])
    return lambda: function(*next(sets))


def backward_only(build: Callable[[], tuple], bytes_each: int) -> Callable[[], object]:
    """Return a function that runs only the backward pass of graphs that `build` makes.

    `build` returns (outputs, leaves, gradients of the outputs). The graphs are built on the stream of the first call,
    because autograd runs the backward pass on the stream of the forward pass.
    """
    ready: dict[object, Callable[[], object]] = {}

    def run():
        stream = torch.cuda.current_stream() if DEVICE == "cuda" else None
        if stream not in ready:
            ready.clear()
            backward = functools.partial(torch.autograd.grad, retain_graph=True)
            ready[stream] = rotating(backward, build, bytes_each)
        return ready[stream]()

    return run
