"""Benchmark swiglu against F.silu(gate + bias) * (value + bias), eager and compiled.

A time is milliseconds per call, forward and backward with the gradients of gate, value and both biases. Gate and value
are the halves of the output of one product, which lie side by side in memory. "two halves" passes them as two views,
whose gradients PyTorch then joins. The biases are float32 parameters. The floor is the bytes that must move, divided by
the copy rate measured in the same run: forward reads gate and value and writes y; backward reads dy, gate and value and
writes two gradients.
"""

import functools

import pytest
import torch
import torch.nn.functional as F
from ceilings import SECONDS, copy_bytes_per_ms, rotating
from conftest import left_out
from records import DEVICE, QUICK

from ajepa_kernels import swiglu

DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
# rows and inner width of the context encoder and of the predictor in a step of 1,024 clips
SIZES = [(65536, 2048), (131072, 1024)] if DEVICE == "cuda" else [(256, 64)] if QUICK else [(2048, 2048)]
CHECKED = 8192  # rows that are compared with float64


def two_halves(both, gate_bias, value_bias):
    return swiglu(*both.chunk(2, -1), gate_bias, value_bias)


def side_by_side(both, gate_bias, value_bias):
    return swiglu(both, None, gate_bias, value_bias)


def plain(both, gate_bias, value_bias):
    gate, value = both.chunk(2, -1)
    return F.silu(gate + gate_bias.to(both.dtype)) * (value + value_bias.to(both.dtype))


def both_ways(function, upstream, *leaves):
    y = function(*leaves)
    return y, *torch.autograd.grad(y, leaves, upstream)


@pytest.mark.parametrize(("M", "C"), SIZES)
def test_swiglu(M, C, interleave, record):
    def make(rows=M):
        both = torch.randn(rows, 2 * C, device=DEVICE, dtype=DTYPE)
        leaves = both, *(torch.randn(C, device=DEVICE) for _ in range(2))
        upstream = torch.randn(rows, C, device=DEVICE, dtype=DTYPE)
        return upstream, *(t.requires_grad_() for t in leaves)

    functions = {"ajepa swiglu": side_by_side, "ajepa, two halves": two_halves, "plain PyTorch": plain}
    if QUICK:
        left_out({"torch.compile": "compiled peers are left out of a quick run"})
    else:
        torch.compiler.reset()  # together with dynamic=False, so that each case is compiled for its own shapes
        functions["torch.compile"] = torch.compile(plain, dynamic=False)
    upstream, *leaves = make(min(M, CHECKED))
    doubles = upstream.double(), *(t.detach().double().requires_grad_() for t in leaves)
    want = both_ways(plain, *doubles)
    for name, function in functions.items():
        for got, right in zip(both_ways(function, upstream, *leaves), want, strict=True):
            bound = (4 if got.dim() == 2 else 64) * torch.finfo(DTYPE).eps  # vectors are sums over the rows
            assert (got.double() - right).norm() < bound * right.norm(), name
    nbytes = M * C * torch.finfo(DTYPE).bits // 8  # of one tensor
    calls = {name: functools.partial(both_ways, function) for name, function in functions.items()}
    times = interleave({name: rotating(call, make, 3 * nbytes) for name, call in calls.items()}, SECONDS)
    shape, floor = f"{M} x {C}, forward + backward", 8 * nbytes / copy_bytes_per_ms()
    record("swiglu", shape, times, plain="plain PyTorch", peers=["torch.compile"], floor_ms=floor)
    if DEVICE == "cpu":
        left_out({"the kernel": "needs a GPU; on a CPU swiglu runs its plain definition"})
