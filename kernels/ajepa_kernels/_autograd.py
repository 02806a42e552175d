"""Autograd and autocast helpers that the operations share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch


def autocast_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype that autocast casts `x` to: x's own outside autocast, and for float64, which autocast never casts."""
    if x.dtype == torch.float64 or x.is_meta or not torch.is_autocast_enabled(x.device.type):
        return x.dtype
    return torch.get_autocast_dtype(x.device.type)


class Function(torch.autograd.Function):
    """`torch.autograd.Function` with `setup_context`, which `torch.func` needs, without torch's overhead per call."""

    @classmethod
    def apply(cls, *args: Any) -> Any:
        if torch._C._are_functorch_transforms_active():
            return super().apply(*args)
        # skips torch's inspection of forward's signature, which takes 40 us
        return super(torch.autograd.Function, cls).apply(*args)  # type: ignore[misc]


class BiasGradient(Function):
    """Returns x, to which a bias was added without a gradient. Its backward gives the bias the sum of x's gradient.

    This is the plain definition of what an op does whose backward also computes the gradient of the bias of the layer
    before it. The sum runs over the axes that precede those of the bias, and has its dtype.
    """

    @staticmethod
    def forward(x, bias):
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, bias = inputs
        ctx.axes, ctx.dtype = bias.dim(), bias.dtype
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, dx):
        if dx is None or not ctx.needs_input_grad[1]:
            return dx, None
        rows = dx.reshape(-1, *dx.shape[dx.dim() - ctx.axes :])
        # a CPU would first convert all rows to float32
        return dx, rows.sum(0, dtype=ctx.dtype) if dx.is_cuda else rows.sum(0).to(ctx.dtype)


class _NotTwice(torch.autograd.Function):
    @staticmethod
    def forward(*tensors):
        return tensors

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError("ajepa_kernels: the kernels do not implement gradients of gradients; use impl='reference'")


def first_order(backward: Callable[..., tuple]) -> Callable[..., tuple]:
    """Turns `backward(ctx, saved, *grads)` into a Function's backward whose results raise when they are differentiated.

    torch's `once_differentiable` raises only if an incoming gradient requires grad. Second-order terms also come from
    the saved tensors, and would then be missing without an error.
    """

    @functools.wraps(backward)
    def wrapper(ctx: Any, *grads: torch.Tensor | None) -> tuple:
        saved = ctx.saved_tensors  # read once, because activation checkpointing frees the tensors on access
        with torch.no_grad():
            results = backward(ctx, saved, *grads)
        if not torch.is_grad_enabled():
            return results
        tensors = [x for x in results if x is not None]
        marked = iter(_NotTwice.apply(*tensors, *(x for x in (*saved, *grads) if x is not None and x.requires_grad)))
        return tuple(None if x is None else next(marked) for x in results)

    return wrapper
