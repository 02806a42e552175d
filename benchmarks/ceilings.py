"""The rates that floors are computed from, measured in the run that reports them, and inputs that no cache holds."""

import functools
import itertools
from collections.abc import Callable

import torch
import torch._functorch.config
from records import DEVICE, QUICK

from ajepa.training import roofline

torch._functorch.config.donated_buffer = False  # `alone_backward` reads what torch.compile saves again and again

# Seconds of timing a shape. A CPU runs the plain definitions, which only shows that everything works.
SECONDS = (0.6 if QUICK else 3.0) if DEVICE == "cuda" else (0.05 if QUICK else 1.0)
CACHE_BYTES = 180 << 20 if DEVICE == "cuda" else 4 << 20 if QUICK else 64 << 20


def copy_bytes_per_ms() -> float:
    return roofline.copy_bytes_per_ms(DEVICE)


def rotating(function: Callable[..., object], make: Callable[[], tuple], bytes_each: int) -> Callable[[], object]:
    """`function` on a next set of inputs at each call, of enough sets to overflow the caches."""
    sets = itertools.cycle([make() for _ in range(min(1 + CACHE_BYTES // max(bytes_each, 1), 64))])
    return lambda: function(*next(sets))


def alone_backward(build: Callable[[], tuple], bytes_each: int) -> Callable[[], object]:
    """The backward pass of graphs that `build` makes: (outputs, leaves, gradients of the outputs).

    They are built on the stream that first asks for it, because autograd runs it on the stream of the forward pass.
    """
    ready: dict[object, Callable[[], object]] = {}

    def run():
        stream = torch.cuda.current_stream() if DEVICE == "cuda" else None
        if stream not in ready:
            ready.clear()
            again = functools.partial(torch.autograd.grad, retain_graph=True)
            ready[stream] = rotating(again, build, bytes_each)
        return ready[stream]()

    return run
