"""Benchmark bias_gelu against F.gelu(x + bias), eager and compiled.

A time is milliseconds per call. Two cases are timed: forward and backward with the gradients of x and bias, and the
forward pass without a gradient, which the target encoder needs. The bias is a float32 parameter, as in the training
step. The floor is the bytes that must move, divided by the copy rate measured in the same run. The forward pass moves x
and y; the backward pass moves dy, x and dx.
"""

import functools

import pytest
import torch
import torch.nn.functional as F
from ceilings import SECONDS, copy_bytes_per_ms, rotating
from conftest import left_out
from records import DEVICE, QUICK

from ajepa_kernels import bias_gelu

DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
# In a step of 1,024 clips, SIZES are the hidden layers of the context encoder and of the predictor, TARGETS is that of
# the target encoder.
SIZES = [(65536, 3072), (131072, 1536)] if DEVICE == "cuda" else [(256, 64)] if QUICK else [(2048, 3072)]
TARGETS = (131072, 3072) if DEVICE == "cuda" else (256, 64) if QUICK else (2048, 3072)
CHECKED = 8192  # rows that are compared with float64


def draw(M, C):
    return torch.randn(M, C, device=DEVICE, dtype=DTYPE)


def check(functions, want, *inputs):
    """Check the results of all functions against those of `want` in float64."""
    rights = want(*(t.detach().double().requires_grad_(t.requires_grad) for t in inputs))
    for name, function in functions.items():
        for got, right in zip(function(*inputs), rights, strict=True):
            bound = (4 if got.dim() == 2 else 64) * torch.finfo(DTYPE).eps  # vectors are sums over the rows
            assert (got.double() - right).norm() < bound * right.norm(), name


def both_ways(function, x, bias, upstream):
    y = function(x, bias)
    return y, *torch.autograd.grad(y, (x, bias), upstream)


@pytest.mark.parametrize("approximate", ["none"] if QUICK else ["none", "tanh"])
@pytest.mark.parametrize(("M", "C"), SIZES)
def test_bias_gelu(M, C, approximate, interleave, record):
    def make(rows=M):
        bias = torch.randn(C, device=DEVICE)
        return draw(rows, C).requires_grad_(), bias.requires_grad_(), draw(rows, C)

    def plain(x, bias):
        return F.gelu(x + bias.to(x.dtype), approximate=approximate)

    functions = {"ajepa bias_gelu": functools.partial(bias_gelu, approximate=approximate), "plain PyTorch": plain}
    if QUICK:
        left_out({"torch.compile": "compiled peers are left out of a quick run"})
    else:
        torch.compiler.reset()  # together with dynamic=False, so that each case is compiled for its own shapes
        functions["torch.compile"] = torch.compile(plain, dynamic=False)
    calls = {name: functools.partial(both_ways, function) for name, function in functions.items()}
    check(calls, functools.partial(both_ways, plain), *make(min(M, CHECKED)))
    nbytes = M * C * torch.finfo(DTYPE).bits // 8  # of one tensor
    times = interleave({name: rotating(call, make, 2 * nbytes) for name, call in calls.items()}, SECONDS)
    shape, floor = f"{M} x {C}, {approximate}, forward + backward", 5 * nbytes / copy_bytes_per_ms()
    record("bias_gelu", shape, times, plain="plain PyTorch", peers=["torch.compile"], floor_ms=floor)
    note_missing_kernel()


@torch.no_grad()
def test_without_gradient(interleave, record):
    """Time the target encoder's GELU. F.gelu adds no bias, because there the product before it adds the bias."""
    M, C = TARGETS

    def make(rows=M):
        return draw(rows, C), torch.zeros(C, device=DEVICE)  # a bias of zero, so that both variants compute the same

    calls = {"ajepa bias_gelu": lambda x, bias: (bias_gelu(x, bias),), "plain PyTorch": lambda x, bias: (F.gelu(x),)}
    check(calls, calls["plain PyTorch"], *make(min(M, CHECKED)))
    nbytes = M * C * torch.finfo(DTYPE).bits // 8
    times = interleave({name: rotating(call, make, nbytes) for name, call in calls.items()}, SECONDS)
    floor = 2 * nbytes / copy_bytes_per_ms()
    record("bias_gelu", f"{M} x {C}, none, forward without gradient", times, plain="plain PyTorch", floor_ms=floor)
    note_missing_kernel()


def note_missing_kernel():
    if DEVICE == "cpu":
        left_out({"the kernel": "needs a GPU; on a CPU bias_gelu runs its plain definition"})
