"""What the operations share of autograd and autocast."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch


def autocast_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype that autocast gives `x`: its own outside of autocast, and for float64, which autocast leaves alone."""
    if x.dtype == torch.float64 or x.is_meta or not torch.is_autocast_enabled(x.device.type):
        return x.dtype
    return torch.get_autocast_dtype(x.device.type)


class Function(torch.autograd.Function):
    """With `setup_context`, which `torch.func` needs, but without what torch pays for it at every call."""

    @classmethod
    def apply(cls, *args: Any) -> Any:
        if torch._C._are_functorch_transforms_active():
            return super().apply(*args)
        # does not inspect forward's signature: 40 us
        return super(torch.autograd.Function, cls).apply(*args)  # type: ignore[misc]


class _NotTwice(torch.autograd.Function):
    @staticmethod
    def forward(*tensors):
        return tensors

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError("ajepa_kernels: gradients of gradients are not implemented; impl='reference' has them")


def first_order(backward: Callable[..., tuple]) -> Callable[..., tuple]:
    """Makes `backward(ctx, saved, *grads)` a Function's backward whose results raise when they are differentiated.

    torch's `once_differentiable` sees to that only where an incoming gradient requires grad: otherwise second-order
    terms, which also come from what was saved, would go missing in silence.
    """

    @functools.wraps(backward)
    def wrapper(ctx: Any, *grads: torch.Tensor | None) -> tuple:
        saved = ctx.saved_tensors  # once: checkpointing frees what it hands out
        with torch.no_grad():
            results = backward(ctx, saved, *grads)
        if not torch.is_grad_enabled():
            return results
        tensors = [x for x in results if x is not None]
        marked = iter(_NotTwice.apply(*tensors, *(x for x in (*saved, *grads) if x is not None and x.requires_grad)))
        return tuple(None if x is None else next(marked) for x in results)

    return wrapper
